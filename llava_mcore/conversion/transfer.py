"""What one process does of a conversion: its share of the tensors moved, and read back and compared.

Every published tensor has its CRC-32 taken on the way out of the source (after ``--dtype``, if any). What was written is then
read back, taken apart again and compared with these, so that the source is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llava_mcore.conversion import fusions, layouts
from llava_mcore.conversion.distributed import Written, write_part
from llava_mcore.conversion.families import Tensor
from llava_mcore.conversion.layouts import Source
from llava_mcore.conversion.verify import Found
from llava_mcore.conversion.views import CheckpointView, HuggingFaceView, mean_row
from llava_mcore.conversion.weights import Info, Reader, cast, checksum, open_weights, put, raw
from llava_mcore.conversion.workers import Progress
from llava_mcore.training import checkpoint_folder as folder

# Key of ours -> checksums of its published parts, in order.
Sums = dict[str, list[int]]


@dataclass(frozen=True)
class ImportShare:
    """Tensors that one process takes from a published model.

    Attributes:
        source: the published model.
        checkpoint: the checkpoint being written.
        number: of the process.
        keys: our names of its tensors.
        dtype: of what is written (None: as it is).
        rows: of the published vocabulary.
        sums: for the comparison; empty while writing.
    """

    source: Source
    checkpoint: Path
    number: int
    keys: frozenset[str]
    dtype: torch.dtype | None
    rows: int
    sums: Sums = field(default_factory=dict)


def import_share(share: ImportShare, progress: Progress) -> tuple[list[Written], Sums]:
    """Writes one file of weights/."""
    sums: Sums = {}
    with closing(HuggingFaceView(share.source)) as view:

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for entry in view.plan.tensors:
                if entry.ours in share.keys:
                    yield entry.ours, _taken(view, entry, share.dtype, sums)
                    progress(view.info(entry).nbytes)

        return write_part(share.checkpoint / folder.WEIGHTS, share.number, tensors()), sums


def _taken(view: HuggingFaceView, entry: Tensor, dtype: torch.dtype | None, sums: Sums) -> torch.Tensor:
    """One tensor of ours, the checksums of its parts noted."""
    parts = [cast(part, dtype) for part in view.parts(entry)]
    sums[entry.ours] = [checksum(part) for part in parts]
    return view.joined(parts, entry)


def check_import(share: ImportShare, progress: Progress) -> list[Found]:
    """Reads a share back and compares its parts with the source's checksums."""
    found: list[Found] = []
    with closing(CheckpointView(share.checkpoint)) as view:
        for entry in layouts.planned(view.settings, view.naming, share.rows).tensors:
            if entry.ours in share.keys:
                found += _checked(view, entry, share.sums[entry.ours])
                progress(view.info(entry).nbytes)
    return found


def _checked(view: CheckpointView, entry: Tensor, sums: Sequence[int]) -> Iterator[Found]:
    whole = view.whole(entry)
    if entry.fusion == "vocab":
        old, size = entry.part_shapes[0][0], view.settings.language.vocab_size
        added, padding = whole[old:size], whole[size:]
        if len(added):
            same = bool((raw(added) == raw(mean_row(whole[:old]).expand_as(added))).all())
            yield Found(entry.module, f"{entry.ours} (new rows)", _info(added), None if same else "not the mean of the others")
        if len(padding):
            yield Found(
                entry.module, f"{entry.ours} (padding)", _info(padding), "rows that are not zero" if padding.any() else None
            )
    parts = fusions.split(whole, entry)
    del whole
    for name, part, wanted in zip(entry.names, parts, sums, strict=True):
        yield Found(entry.module, name, _info(part), None if checksum(part) == wanted else "another checksum than the source's")


def _info(tensor: torch.Tensor) -> Info:
    return Info(tuple(tensor.shape), tensor.dtype, "")


@dataclass(frozen=True)
class ExportShare:
    """Tensors that one process takes from a checkpoint of this project.

    Attributes:
        checkpoint: the checkpoint.
        layout: whose names are written.
        out: the folder being written; its files exist, with their headers.
        places: published name -> file and offset in it.
        keys: our names of its tensors.
        dtype: of what is written (None: as it is).
        sums: for the comparison; empty while writing.
    """

    checkpoint: Path
    layout: str
    out: Path
    places: Mapping[str, tuple[str, int]]
    keys: frozenset[str]
    dtype: torch.dtype | None
    sums: dict[str, int] = field(default_factory=dict)


def export_share(share: ExportShare, progress: Progress) -> dict[str, int]:
    """Writes tensors to their places in the files of the folder; the checksum of each published one."""
    with closing(CheckpointView(share.checkpoint, share.layout)) as view:

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for entry in view.plan.tensors:
                if entry.ours not in share.keys:
                    continue
                parts = view.parts(entry)
                for name in entry.names:
                    part = cast(parts.pop(0), share.dtype)
                    yield name, part
                    if view.tied_head and name == view.embedding:
                        yield view.tied_head, part
                progress(view.info(entry).nbytes)

        return put(share.out, share.places, tensors())


def check_export(share: ExportShare, progress: Progress) -> list[Found]:
    """Reads a share back from the published files and compares it with the checkpoint's checksums."""
    found = []
    with closing(CheckpointView(share.checkpoint, share.layout)) as view, closing(open_weights(share.out)) as written:
        for entry in view.plan.tensors:
            if entry.ours not in share.keys:
                continue
            for name in [*entry.names, *([view.tied_head] if view.tied_head and entry.names[0] == view.embedding else [])]:
                found.append(compare_sum(entry.module, name, written, share.sums[name]))
            progress(view.info(entry).nbytes)
    return found


def compare_sum(module: str, name: str, written: Reader, wanted: int) -> Found:
    """One published tensor against the checksum its bytes had when they were written."""
    same = checksum(written.read(name)) == wanted
    return Found(module, name, written.infos[name], None if same else "another checksum than the checkpoint's")


def cut(tensors: Sequence[tuple[Tensor, int]], count: int) -> list[frozenset[str]]:
    """Keys of ``count`` runs of tensors with about equally many bytes each (fewer runs if there are fewer tensors)."""
    total, done = sum(size for _, size in tensors), 0
    runs: list[set[str]] = [set() for _ in range(count)]
    for tensor, size in tensors:
        runs[min(count - 1, done * count // max(1, total))].add(tensor.ours)
        done += size
    return [frozenset(run) for run in runs if run]
