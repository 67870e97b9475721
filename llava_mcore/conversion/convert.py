"""Published models to checkpoints of this project and back.

Both directions go tensor by tensor over one plan (``layouts.planned``), write aside, compare everything with the source and only
then take the final name. No model is built, except to compare logits at the end.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch

from llava_mcore.conversion import distributed, exported, hf_files, layouts, logits, workers
from llava_mcore.conversion.families import OUR_MODULE, ConversionError
from llava_mcore.conversion.transfer import (
    ExportShare,
    ImportShare,
    check_export,
    check_import,
    compare_sum,
    cut,
    export_share,
    import_share,
)
from llava_mcore.conversion.verify import Report, compare
from llava_mcore.conversion.views import UNUSED, CheckpointView, HuggingFaceView, View, open_view
from llava_mcore.conversion.weights import MAX_SHARD_BYTES, Info, SafetensorsReader, cast, lay_out, open_weights, put, shard_plan
from llava_mcore.conversion.workers import Progress, nothing
from llava_mcore.platform import device
from llava_mcore.training import checkpoint_folder as folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("source", "llava-hf", "decoder")


def import_hf(
    source: str | Path,
    out: str | Path,
    *,
    tower: str | Path | None = None,
    projector: str | Path | None = None,
    vocab_size: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    compare_logits: bool = True,
    processes: int = 1,
    progress: Progress = nothing,
) -> Report | None:
    """Turns a published model into a checkpoint of this project that loads under any layout.

    Args:
        source: a folder with config.json and weights (safetensors or bin): a LLaVA, LLaVA-NeXT or LLaVA-OneVision of
            transformers, an original LLaVA, or a decoder alone.
        out: the checkpoint to write.
        tower: a folder with the vision tower, for an original LLaVA or a decoder that comes without one.
        projector: a folder or file with a projector (``mm_projector.bin``), for a decoder; without it a decoder gets one with the
            random weights that training from scratch starts from.
        vocab_size: rows of the vocabulary, at least those of the source; new ones are the mean of the old. None: as many as the
            source and the tokens added to its tokenizer need.
        dtype: float32, bfloat16 or float16 for all weights (None: as they are).
        overwrite: replace an existing checkpoint.
        verify: read everything back and compare it with the source before the checkpoint takes its name.
        compare_logits: with ``verify``, compare the logits with those of transformers where it is installed and memory allows.
        processes: work in so many processes, each on its share of the tensors.
        progress: called with bytes: all of them once for writing and once for comparing.

    Returns:
        the comparison, or None without ``verify``.

    Raises:
        ConversionError, CheckpointError: naming the file, tensor or setting that is wrong; nothing is left under ``out``.
    """
    target = _dtype(dtype)
    _require_one_process()
    _require_apart(source, out)
    place = layouts.source(source, tower, projector, vocab_size)
    with closing(HuggingFaceView(place)) as view, _writing(out, view, target, overwrite) as partial:
        (partial / folder.WEIGHTS).mkdir()
        shares = [
            ImportShare(place, partial, number, keys, target, view.layout.rows)
            for number, keys in enumerate(cut([(t, view.info(t).nbytes) for t in view.plan.tensors], processes))
        ]
        moved = workers.run(import_share, shares, progress)
        distributed.finish(partial / folder.WEIGHTS, [written for parts, _ in moved for written in parts])
        hf_files.carry(view, partial)
        unused = _put_unused(view, partial, target, progress)
        folder.write_model_settings(partial, view.settings)
        about = {"imported_from": str(Path(source).resolve()), "architecture": view.layout.kind}
        folder.write_meta(partial, step=0, contents=["model"], **about)
        if not verify:
            return None
        report = Report()
        checks = [replace(share, sums=sums) for share, (_, sums) in zip(shares, moved, strict=True)]
        for found in workers.run(check_import, checks, progress):
            report.add(found)
        with closing(SafetensorsReader({partial / folder.HF / UNUSED: None})) as written:
            report.add(compare_sum("not built", name, written, wanted) for name, wanted in unused.items())
        if compare_logits:
            report.logits, report.logits_differ = logits.compare(place.path, partial, view.layout.kind, target)
        return report.require()


def export_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    layout: str = "source",
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    compare_logits: bool = True,
    processes: int = 1,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = nothing,
) -> Report | None:
    """Turns a checkpoint of this project into a published model.

    A model that was imported gets its source's names, config and unused tensors back, down to the last bit; one that was trained
    from scratch becomes a folder that ``LlavaForConditionalGeneration.from_pretrained`` loads, with a config without the tower
    layers it never had.

    Args:
        checkpoint: the checkpoint; its optimizer is not read.
        out: the folder to write.
        layout: "source": as it was imported; "llava-hf": for transformers, whatever it was imported from; "decoder": its
            language model alone, as ``AutoModelForCausalLM`` loads it.
        dtype: float32, bfloat16 or float16 for all weights (None: as they are).
        overwrite: replace an existing folder.
        verify: read everything back and compare it with the checkpoint before the folder takes its name.
        compare_logits: with ``verify``, compare the logits with those of transformers where it is installed and memory allows.
        processes: work in so many processes, each on its share of the tensors.
        max_shard_bytes: a larger model is split into shards with an index.
        progress: called with bytes: all of them once for writing and once for comparing.

    Returns:
        the comparison, or None without ``verify``.

    Raises:
        ConversionError, CheckpointError: naming the file, tensor or setting that is wrong; nothing is left under ``out``.
    """
    target = _dtype(dtype)
    _require_one_process()
    _require_apart(checkpoint, out)
    if layout not in LAYOUTS:
        raise ConversionError(f"layout {layout!r} is unknown; known: {', '.join(LAYOUTS)}")
    with closing(CheckpointView(checkpoint, layout)) as view:
        form = exported.form_of(view)
        infos = {name: _cast_info(info, target) for name, info in form.infos.items()}
        with _writing(out, view, target, overwrite) as partial:
            places = lay_out(partial, infos, shard_plan(infos, max_shard_bytes))
            tensors = [(t, view.info(t).nbytes) for t in view.plan.tensors if t.module in view.modules]
            shares = [ExportShare(view.path, view.asked, partial, places, keys, target) for keys in cut(tensors, processes)]
            moved = workers.run(export_share, shares, progress)
            sums = put(partial, places, _loose(form.loose(), target, progress))
            hf_files.write(view, form, partial, Counter(info.dtype for info in infos.values()).most_common(1)[0][0])
            if not verify:
                return None
            report = Report()
            checks = [replace(share, sums=found) for share, found in zip(shares, moved, strict=True)]
            for found in workers.run(check_export, checks, progress):
                report.add(found)
            with closing(open_weights(partial)) as written:
                report.add(compare_sum("not built", name, written, wanted) for name, wanted in sums.items())
            hf_files.require_same_model(view, form, partial)
            if compare_logits:
                report.logits, report.logits_differ = logits.compare(partial, view.path, view.layout, target)
            return report.require()


def load_hf_into(sharded_state_dict: dict[str, Any], source: str | Path) -> None:
    """Fills this rank's slices of a model from a Hugging Face folder, without a checkpoint between; no process waits for another.

    A learned token that the folder lacks keeps the value it has.

    Args:
        sharded_state_dict: the model's, keyed as in weights/.
        source: the folder with config.json and safetensors.

    Raises:
        ConversionError: naming the keys that the folder does not hold or that have another shape there.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    from llava_mcore.models.vision import resized_positions

    slices: dict[str, list[ShardedTensor]] = defaultdict(list)
    for value in nested_values(sharded_state_dict):
        built = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        for shard in built:
            if isinstance(shard, ShardedTensor):
                slices[shard.key].append(shard)
    with closing(HuggingFaceView(source)) as view, torch.no_grad():
        missing = sorted(slices.keys() - {entry.ours for entry in view.plan.tensors})
        missing = [name for name in missing if not name.startswith(OUR_MODULE["learned_tokens"])]
        if missing:
            raise ConversionError(f"{source}: holds no {', '.join(missing[:5])} ({len(missing)} such); it is another model")
        for entry in (entry for entry in view.plan.tensors if entry.ours in slices):
            whole = view.whole(entry)
            for shard in slices[entry.ours]:
                if entry.ours == "vision_tower.position_embedding":  # the model's pictures may be of another size
                    whole = resized_positions(whole, shard.global_shape[0], view.settings.vision.class_token)
                if tuple(shard.global_shape) != tuple(whole.shape):
                    raise ConversionError(
                        f"{source}: {entry.ours} has shape {list(whole.shape)}, the model's has {list(shard.global_shape)}"
                    )
                shard.data.copy_(whole[shard.global_slice()].reshape(shard.data.shape))


def write_sidecars(source: str | Path, checkpoint: Path) -> None:
    """Puts tokenizer/ and hf/ of a published model into a checkpoint whose weights come from it."""
    with closing(HuggingFaceView(source)) as view:
        hf_files.carry(view, checkpoint)
        _put_unused(view, checkpoint, None, nothing)


def compare_paths(path: str | Path, original: str | Path, progress: Progress = nothing) -> Report:
    """Compares two checkpoints, each of either kind."""
    with closing(open_view(path)) as view, closing(open_view(original)) as source:
        return compare(view, source, progress=progress)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ConversionError(f"dtype {name!r} is unknown; known: {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def _require_one_process() -> None:
    size = device.world_size()
    if size > 1:
        raise ConversionError(f"conversion runs in one process, not in {size}; start it without torchrun, before the run")


def _require_apart(source: str | Path, out: str | Path) -> None:
    one, other = Path(source).resolve(), Path(out).resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ConversionError(f"{out}: lies inside {source} or around it; choose another folder to write to")


@contextmanager
def _writing(out: str | Path, view: View, target: torch.dtype | None, overwrite: bool) -> Iterator[Path]:
    """``checkpoint_folder.published`` with the room on disk looked at first, and disk errors that name the folder."""
    needed = sum(_cast_info(view.info(entry), target).nbytes for entry in view.plan.tensors)
    needed += sum(_cast_info(info, target).nbytes for info in view.unused().values())
    parent = Path(os.path.abspath(out)).parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ConversionError(
            f"{out}: {needed:,} bytes are needed and {free:,} are free on this disk; make room or write elsewhere"
        )
    try:
        with folder.published(out, overwrite=overwrite) as partial:
            yield partial
    except OSError as error:
        raise ConversionError(f"{out}: cannot be written ({error}); nothing was left under that name") from error


def _cast_info(info: Info, target: torch.dtype | None) -> Info:
    return Info(info.shape, target, info.file) if target is not None and info.dtype.is_floating_point else info


def _put_unused(view: HuggingFaceView, partial: Path, target: torch.dtype | None, progress: Progress) -> dict[str, int]:
    """Carries along what the model does not build; the checksums."""
    names = {view.carried_name(name): name for name in view.unused()}
    infos = {name: _cast_info(view.unused()[stored], target) for name, stored in names.items()}
    places = lay_out(partial / folder.HF, infos, {UNUSED: list(infos)})
    reads = {name: bind(view.read_unused, stored) for name, stored in names.items()}
    return put(partial / folder.HF, places, _loose(reads, target, progress))


def _loose(
    tensors: Mapping[str, Callable[[], torch.Tensor]], target: torch.dtype | None, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, read in tensors.items():
        tensor = read()
        progress(tensor.nbytes)
        yield name, cast(tensor, target)
