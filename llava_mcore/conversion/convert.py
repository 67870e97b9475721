"""Hugging Face folders to checkpoints of this project and back.

Both directions go tensor by tensor over one plan (``families.plan``), write aside, compare everything with the source and
only then take the final name. No model is built.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device

from llava_mcore.conversion import fusions, hf_config, views
from llava_mcore.conversion.families import DEFAULT_NAMING, ConversionError, Tensor, plan
from llava_mcore.conversion.verify import Progress, Report, compare, total_bytes
from llava_mcore.conversion.views import CheckpointView, HuggingFaceView, View
from llava_mcore.conversion.weights import MAX_SHARD_BYTES, Info, cast, save_distributed, write_file, write_folder
from llava_mcore.platform import device
from llava_mcore.settings.schema import ModelSettings
from llava_mcore.training import checkpoint_folder as folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def nothing(count: int) -> None:
    """The progress nobody watches."""


def import_hf(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = nothing,
) -> Report | None:
    """Turns a Hugging Face LLaVA folder into a checkpoint of this project that loads under any layout.

    Args:
        source: the folder with config.json and safetensors.
        out: the checkpoint to write.
        dtype: float32, bfloat16 or float16 for all weights (None: as they are).
        overwrite: replace an existing checkpoint.
        verify: compare every tensor with the source before the checkpoint takes its name.
        progress: called with bytes: all of them once for writing and once for comparing.

    Returns:
        the comparison, or None without ``verify``.

    Raises:
        ConversionError, CheckpointError: naming the file, tensor or setting that is wrong; nothing is left under ``out``.
    """
    target = _dtype(dtype)
    _require_apart(source, out)
    with _alone(), closing(HuggingFaceView(source)) as view, _writing(out, view, target, overwrite) as partial:
        save_distributed(partial / folder.WEIGHTS, _joined(view, target, progress))
        folder.write_model_settings(partial, view.settings)
        _sidecars(view, partial, target, progress)
        folder.write_meta(partial, step=0, contents=["model"], imported_from=str(Path(source).resolve()))
        if not verify:
            return None
        with closing(CheckpointView(partial)) as written:
            return compare(written, view, dtype=target, progress=progress).require()


def export_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = nothing,
) -> Report | None:
    """Turns a checkpoint of this project into a folder that ``LlavaForConditionalGeneration.from_pretrained`` loads.

    A model that was imported gets its source's names, config and unused tensors back; one that was trained from scratch gets
    a config without the tower layers it never had.

    Args:
        checkpoint: the checkpoint; its optimizer is not read.
        out: the folder to write.
        dtype: float32, bfloat16 or float16 for all weights (None: as they are).
        overwrite: replace an existing folder.
        verify: compare every tensor with the checkpoint before the folder takes its name.
        max_shard_bytes: a larger model is split into shards with an index.
        progress: called with bytes: all of them once for writing and once for comparing.

    Returns:
        the comparison, or None without ``verify``.

    Raises:
        ConversionError, CheckpointError: naming the file, tensor or setting that is wrong; nothing is left under ``out``.
    """
    target = _dtype(dtype)
    _require_apart(checkpoint, out)
    with _alone(), closing(CheckpointView(checkpoint)) as view:
        scratch = not (view.path / folder.HF / views.CONFIG).is_file()
        unused = _identity(view) if scratch else _kept_unused(view)
        infos, tensors = _published(view, unused, target, progress)
        with _writing(out, view, target, overwrite) as partial:
            write_folder(partial, infos, tensors, max_shard_bytes)
            _write_hf_files(view, partial, scratch, Counter(info.dtype for info in infos.values()).most_common(1)[0][0])
            if not verify:
                return None
            with closing(HuggingFaceView(partial)) as written:
                expected = _as_scratch(view.settings) if scratch else view.settings
                if not hf_config.same_model(written.settings, expected):
                    raise ConversionError(f"{out}: its {views.CONFIG} would describe another model than {checkpoint}")
                return compare(written, view, dtype=target, unused=not scratch, progress=progress).require()


def load_hf_into(sharded_state_dict: dict[str, Any], source: str | Path) -> None:
    """Fills this rank's slices of a model from a Hugging Face folder, without a checkpoint between; no process waits for another.

    Args:
        sharded_state_dict: the model's, keyed as in weights/.
        source: the folder with config.json and safetensors.

    Raises:
        ConversionError: naming the keys that the folder does not hold or that have another shape there.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    slices: dict[str, list[ShardedTensor]] = defaultdict(list)
    for value in nested_values(sharded_state_dict):
        built = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        for shard in built:
            if isinstance(shard, ShardedTensor):
                slices[shard.key].append(shard)
    with closing(HuggingFaceView(source)) as view, torch.no_grad():
        missing = sorted(slices.keys() - {entry.ours for entry in view.plan.tensors})
        if missing:
            raise ConversionError(f"{source}: holds no {', '.join(missing[:5])} ({len(missing)} such); it is another model")
        for entry, whole in view.joined(slices.keys()):
            for shard in slices[entry.ours]:
                if tuple(shard.global_shape) != entry.shape:
                    raise ConversionError(
                        f"{source}: {entry.ours} has shape {list(entry.shape)}, the model's has {list(shard.global_shape)}"
                    )
                shard.data.copy_(whole[shard.global_slice()].reshape(shard.data.shape))


def write_sidecars(source: str | Path, checkpoint: Path) -> None:
    """Puts tokenizer/ and hf/ of a Hugging Face folder into a checkpoint whose weights come from it."""
    with closing(HuggingFaceView(source)) as view:
        _sidecars(view, checkpoint, None, nothing)


def describe(path: str | Path) -> str:
    """What converting a checkpoint of either kind would move: names, shapes, types and bytes. Nothing is written.

    Raises:
        ConversionError: naming all tensors that are missing, unexpected or of a wrong shape.
    """
    with _alone(), closing(views.open_view(path)) as view:
        lines = [f"{view.path}: {view.kind}, {len(view.plan.tensors)} tensors, {total_bytes(view):,} bytes", ""]
        for entry in view.plan.tensors:
            info = view.info(entry)
            kind = str(info.dtype).removeprefix("torch.")
            ends = [" + ".join(entry.names), entry.ours]
            if isinstance(view, CheckpointView):
                ends.reverse()
            lines.append(f"{ends[0]}  ->  {ends[1]}  {list(entry.shape)} {kind} {info.nbytes:,} B")
        for name, info in view.unused().items():
            lines.append(f"{name}  (not built, carried along)  {list(info.shape)} {info.nbytes:,} B")
        # Opening has compared all names and shapes with the config; anything missing or unexpected did not come this far.
        return "\n".join([*lines, "", "nothing is missing, nothing is unexpected"])


def work(path: str | Path, *, verify: bool = True) -> int:
    """Bytes that a conversion reports as progress, near enough for a bar (padded rows are counted once too often)."""
    with _alone(), closing(views.open_view(path)) as view:
        return total_bytes(view) * (2 if verify else 1)


def inspect(path: str | Path) -> dict[str, Any]:
    """What a checkpoint of either kind holds, as plain values."""
    with _alone(), closing(views.open_view(path)) as view:
        found: dict[str, Any] = {"path": str(view.path), "kind": view.kind, "tensors": len(view.plan.tensors)}
        if isinstance(view, CheckpointView):
            found["meta"] = view.meta
        found["bytes"] = total_bytes(view)
        found["dtypes"] = sorted({str(view.info(entry).dtype).removeprefix("torch.") for entry in view.plan.tensors})
        found["not built"] = len(view.unused())
        found["names"] = dict(view.naming)
        found["model"] = asdict(view.settings)
        return found


def compare_paths(path: str | Path, original: str | Path, progress: Progress = nothing) -> Report:
    """Compares two checkpoints, each of either kind."""
    with _alone(), closing(views.open_view(path)) as view, closing(views.open_view(original)) as source:
        return compare(view, source, unused=bool(view.unused() and source.unused()), progress=progress)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ConversionError(f"dtype {name!r} is unknown; known: {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


@contextmanager
def _alone() -> Iterator[None]:
    """One process, with the process group Megatron-Core asks for; the group is left again if it was made here."""
    size = max(device.world_size(), dist.get_world_size() if dist.is_initialized() else 1)
    if size > 1:
        raise ConversionError(f"conversion runs in one process, not in {size}; start it without torchrun, before the run")
    made = not dist.is_initialized()
    device.start()
    try:
        yield
    finally:
        if made:
            device.stop()


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


def _joined(view: HuggingFaceView, target: torch.dtype | None, progress: Progress) -> Iterator[tuple[str, torch.Tensor]]:
    for entry, whole in view.joined():
        progress(whole.nbytes)
        yield entry.ours, cast(whole, target)


def _sidecars(view: HuggingFaceView, partial: Path, target: torch.dtype | None, progress: Progress) -> None:
    """tokenizer/ and hf/: the source's files, its unused tensors, and how it named its tensors."""
    _copy(view.path, partial / folder.TOKENIZER, views.TOKENIZER_FILES)
    hf = partial / folder.HF
    _copy(view.path, hf, views.HF_FILES)
    unused = {name: _cast_info(info, target) for name, info in view.unused().items()}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in unused:
            tensor = view.read_unused(name)
            progress(tensor.nbytes)
            yield name, cast(tensor, target)

    write_file(hf / views.UNUSED, unused, tensors())
    absent = sorted(view.plan.unused.keys() - unused.keys())
    _write_json(hf / views.SOURCE, {"naming": dict(view.naming), "tied_head": view.tied_head, "absent": absent})


def _copy(source: Path, target: Path, names: Iterable[str]) -> None:
    present = [name for name in names if (source / name).is_file()]
    if present:
        target.mkdir(parents=True, exist_ok=True)
    for name in present:
        shutil.copyfile(source / name, target / name)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


Unused = dict[str, tuple[Info, torch.Tensor | None]]  # None: read from the checkpoint when its turn comes


def _kept_unused(view: CheckpointView) -> Unused:
    """The source's tensors that the model does not build, which must all have come along."""
    kept = view.unused()
    missing = sorted(view.plan.unused.keys() - kept.keys() - set(view.source.get("absent", ())))
    if missing:
        raise ConversionError(
            f"{view.path / folder.HF / views.UNUSED}: lacks {', '.join(missing[:5])} ({len(missing)} such), which "
            f"{views.CONFIG} calls for; import the source again, or remove {folder.HF}/ to export without them"
        )
    return {name: (info, None) for name, info in kept.items()}


def _as_scratch(model: ModelSettings) -> ModelSettings:
    """The same model with no tower layer after the selected one."""
    model = copy.deepcopy(model)
    model.vision.num_layers, model.vision.select_layer = model.vision.used_layers, -1
    return model


def _identity(view: CheckpointView) -> Unused:
    """Norms that change nothing, for names that transformers' class has and a model trained from scratch has not."""
    dtype = next(view.info(entry).dtype for entry in view.plan.tensors if entry.module == "vision_tower")
    made: Unused = {}
    for name, shape in plan(_as_scratch(view.settings), DEFAULT_NAMING).unused.items():
        tensor = torch.ones(shape, dtype=dtype) if name.endswith(".weight") else torch.zeros(shape, dtype=dtype)
        made[name] = (Info(shape, dtype, ""), tensor)
    return made


def _published(
    view: CheckpointView, unused: Unused, target: torch.dtype | None, progress: Progress
) -> tuple[dict[str, Info], Iterator[tuple[str, torch.Tensor]]]:
    """Every published tensor: shapes and types at once, the tensors themselves in the same order as they are drawn."""

    def info(entry: Tensor, shape: tuple[int, ...]) -> Info:
        return _cast_info(Info(shape, view.info(entry).dtype, ""), target)

    infos: dict[str, Info] = {}
    embedding = f"{view.naming['language_model']}embed_tokens.weight"
    for entry in view.plan.tensors:
        for name, shape in zip(entry.names, entry.part_shapes, strict=True):
            infos[name] = info(entry, shape)
            if name == embedding and view.tied_head:
                infos[view.tied_head] = infos[name]
    infos.update({name: _cast_info(about, target) for name, (about, _) in unused.items()})

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for entry, whole in view.joined():
            for name, part in zip(entry.names, fusions.split(whole, entry), strict=True):
                progress(part.nbytes)
                yield name, cast(part, target)
                if name == embedding and view.tied_head:
                    yield view.tied_head, cast(part, target)
        for name, (_, tensor) in unused.items():
            tensor = view.read_unused(name) if tensor is None else tensor
            progress(tensor.nbytes)
            yield name, cast(tensor, target)

    return infos, tensors()


def _write_hf_files(view: CheckpointView, partial: Path, scratch: bool, dtype: torch.dtype) -> None:
    """config.json and what lies beside it."""
    name = str(dtype).removeprefix("torch.")
    _copy(view.path / folder.TOKENIZER, partial, views.TOKENIZER_FILES)
    if scratch:
        _write_scratch_files(view, partial, name)
        return
    _copy(view.path / folder.HF, partial, views.HF_FILES)
    before = views.read_json(partial / views.CONFIG)
    config = hf_config.updated(before, view.settings)
    if config.get("dtype", config.get("torch_dtype")) != name:
        config = hf_config.set_dtype(config, name)
    if config != before:
        _write_json(partial / views.CONFIG, config)


def _write_scratch_files(view: CheckpointView, partial: Path, dtype: str) -> None:
    ids = _special_ids(view.path / folder.TOKENIZER)
    config = hf_config.from_settings(_as_scratch(view.settings), **ids)
    _write_json(partial / views.CONFIG, hf_config.set_dtype(config, dtype))
    _write_json(partial / views.GENERATION_CONFIG, {"bos_token_id": ids["bos_id"], "eos_token_id": ids["eos_id"]})
    data = folder.read_settings(view.path).get("data") or {}
    if {"image_mean", "image_std", "image_mode"} <= data.keys():
        processor = hf_config.preprocessor(view.settings.vision, data)
        _write_json(partial / "preprocessor_config.json", processor)


def _special_ids(tokenizer: Path) -> dict[str, int | None]:
    if not tokenizer.is_dir():
        return {"bos_id": None, "eos_id": None}
    from llava_mcore.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return {"bos_id": loaded.bos_id, "eos_id": loaded.eos_id}
