"""What a checkpoint of either kind holds, for the eye."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_mcore.conversion.layouts import Source
from llava_mcore.conversion.verify import total_bytes
from llava_mcore.conversion.views import CheckpointView, HuggingFaceView, open_view
from llava_mcore.conversion.weights import checksum
from llava_mcore.training import checkpoint_folder as folder


def describe(source: Source | str | Path) -> str:
    """What converting would move: names, shapes, types and bytes. Nothing is written.

    Raises:
        ConversionError: naming all tensors that are missing, unexpected or of a wrong shape.
    """
    with closing(open_view(source)) as view:
        lines = [f"{view.path}: {view.kind}, {len(view.plan.tensors)} tensors, {total_bytes(view):,} bytes", ""]
        for entry in view.plan.tensors:
            info = view.info(entry)
            kind = str(info.dtype).removeprefix("torch.")
            ends = [" + ".join(entry.names), entry.ours]
            if isinstance(view, HuggingFaceView) and entry.module in view.made:
                ends[0] = "(random: the source has none)"
            if isinstance(view, CheckpointView):
                ends.reverse()
            lines.append(f"{ends[0]}  ->  {ends[1]}  {list(entry.shape)} {kind} {info.nbytes:,} B")
        for name, info in view.unused().items():
            lines.append(f"{name}  (not built, carried along)  {list(info.shape)} {info.nbytes:,} B")
        if isinstance(view, HuggingFaceView):
            lines += [f"{name}  (of another model, left out)" for name in view.left_out]
        # Opening has compared all names and shapes with the config; anything missing or unexpected did not come this far.
        return "\n".join([*lines, "", "nothing is missing, nothing is unexpected"])


def inspect(path: str | Path, *, checksums: bool = False) -> dict[str, Any]:
    """What a checkpoint of either kind holds, as plain values.

    Args:
        path: the checkpoint.
        checksums: add the CRC-32 of every published tensor, which reads all of them.
    """
    with closing(open_view(path)) as view:
        found: dict[str, Any] = {"path": str(view.path), "kind": view.kind}
        model = view.settings
        if isinstance(view, CheckpointView):
            found |= {
                "step": view.meta["step"],
                "saved from layout": view.meta.get("layout", "none: imported"),
                "meta": view.meta,
            }
            found["files"] = {file.name: file.stat().st_size for file in sorted(view.weights.path.iterdir())}
        else:
            found["layout of names"] = view.layout.kind
        found["family"] = {"vision": model.vision.family, "language": model.language.family}
        entries = view.plan.tensors
        found["tensors"], found["bytes"] = len(entries), total_bytes(view)
        sizes = {module: 0 for module in dict.fromkeys(entry.module for entry in entries)}
        for entry in entries:
            sizes[entry.module] += view.info(entry).nbytes // view.info(entry).dtype.itemsize
        found["parameters"] = sizes
        found["dtypes"] = sorted({str(view.info(entry).dtype).removeprefix("torch.") for entry in entries})
        found["not built"] = sorted(view.unused())
        found["names"] = dict(view.naming)
        found["model"] = asdict(model)
        stored = folder.read_settings(path) if isinstance(view, CheckpointView) else {}
        found |= {f"settings.{group}": values for group, values in stored.items() if group != "model"}
        if checksums:
            found["checksums"] = {
                name: f"{checksum(part):08x}"
                for entry in entries
                for name, part in zip(entry.names, view.parts(entry), strict=True)
            } | {name: f"{checksum(view.read_unused(name)):08x}" for name in view.unused()}
        return found
