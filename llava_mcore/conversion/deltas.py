"""Weights published as differences to a base model, as Vicuna's and LLaVA's first ones were.

A tensor that the base has too is stored as target minus base; rows that a vocabulary has gained, and tensors that the base
lacks, as they are (LLaVA's ``apply_delta.py`` and ``make_delta.py``).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from llava_mcore.conversion.families import ConversionError
from llava_mcore.conversion.layouts import CONFIG, PREFIXES
from llava_mcore.conversion.views import HF_FILES, TOKENIZER_FILES
from llava_mcore.conversion.weights import MAX_SHARD_BYTES, Info, Reader, lay_out, open_weights, put, shard_plan
from llava_mcore.conversion.workers import Progress, nothing
from llava_mcore.training import checkpoint_folder as folder

# The two tensors that may have more rows than the base's.
TABLES = ("embed_tokens.weight", "lm_head.weight")


def apply_delta(
    base: str | Path, delta: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = nothing
) -> int:
    """Writes base + delta, in the delta's type and with its config and tokenizer.

    Returns:
        how many tensors were added to the base's.

    Raises:
        ConversionError, CheckpointError: naming the tensor or file that does not fit; nothing is left under ``out``.
    """
    return _combine(Path(base), Path(delta), Path(out), 1, overwrite, progress)


def make_delta(
    base: str | Path, target: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = nothing
) -> int:
    """Writes target - base, in the target's type; applying it gives the target back up to one rounding of that type.

    Returns:
        how many tensors the base was subtracted from.

    Raises:
        ConversionError, CheckpointError: naming the tensor or file that does not fit; nothing is left under ``out``.
    """
    return _combine(Path(base), Path(target), Path(out), -1, overwrite, progress)


def _combine(base: Path, other: Path, out: Path, sign: int, overwrite: bool, progress: Progress) -> int:
    """``other + sign * base`` for what both have."""
    for path in (base, other):
        if not (path / CONFIG).is_file():
            raise ConversionError(f"{path}: no {CONFIG} there; name a folder with a published model")
    with ExitStack() as stack:
        bases, others = (stack.enter_context(closing(open_weights(path))) for path in (base, other))
        pairs = _pairs(bases, others, base, other)
        infos = {name: Info(info.shape, info.dtype, "") for name, info in others.infos.items()}
        needed, free = sum(info.nbytes for info in infos.values()), shutil.disk_usage(_existing(out)).free
        if needed > free:
            raise ConversionError(f"{out}: {needed:,} bytes are needed and {free:,} are free on this disk; make room")

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name in infos:
                tensor = others.read(name)
                if name in pairs:
                    under = bases.read(pairs[name]).to(tensor.dtype)
                    (tensor[: len(under)] if under.ndim else tensor).add_(under, alpha=sign)
                progress(tensor.nbytes)
                yield name, tensor

        try:
            with folder.published(out, overwrite=overwrite) as partial:
                put(partial, lay_out(partial, infos, shard_plan(infos, MAX_SHARD_BYTES)), tensors())
                for name in (*HF_FILES, *TOKENIZER_FILES):
                    if (other / name).is_file():
                        shutil.copyfile(other / name, partial / name)
        except OSError as error:
            raise ConversionError(f"{out}: cannot be written ({error}); nothing was left under that name") from error
    return len(pairs)


def _pairs(bases: Reader, others: Reader, base: Path, other: Path) -> dict[str, str]:
    """Names that both have -> the base's. A LLaVA keeps its decoder under a prefix that a plain one does not have."""
    known = {_plain(name): name for name in bases.infos}
    pairs, problems = {}, []
    for name, info in others.infos.items():
        if (found := known.get(_plain(name))) is None or not info.dtype.is_floating_point:
            continue
        under = bases.infos[found].shape
        grown = name.endswith(TABLES) and info.shape[0] >= under[0] and info.shape[1:] == under[1:]
        if info.shape != under and not grown:
            problems.append(f"{name}: {list(info.shape)} in {other}, {list(under)} in {base}")
        pairs[name] = found
    missing = sorted(known[name] for name in known.keys() - {_plain(name) for name in others.infos})
    problems += [f"{name} is only in {base}" for name in missing if not name.endswith("inv_freq")]
    if not pairs:
        problems.insert(0, "they have no name in common")
    if problems:
        raise ConversionError(f"{other} does not fit {base}: " + "; ".join(problems[:5]) + f" ({len(problems)} such)")
    return pairs


def _plain(name: str) -> str:
    """A decoder's tensor by the name it has in a decoder alone; any other name as it is."""
    for prefix in PREFIXES["language_model"]:
        if name.startswith(prefix) and not name.startswith(("model.vision", "model.mm_", "model.multi_modal")):
            return "model." + name.removeprefix(prefix)
    return "lm_head.weight" if name.endswith("lm_head.weight") else name


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
