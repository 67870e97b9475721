"""Is every tensor of one checkpoint, bit for bit, in the other? Compared in the published form: what was fused is split first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from llava_mcore.conversion.families import ConversionError, Tensor
from llava_mcore.conversion.layouts import in_default_naming
from llava_mcore.conversion.views import CheckpointView, View
from llava_mcore.conversion.weights import Info, raw
from llava_mcore.conversion.workers import Progress, nothing


class Found(NamedTuple):
    """One tensor that was compared, and how it differs (None: not at all)."""

    module: str
    name: str
    info: Info
    difference: str | None


@dataclass
class Line:
    """One module in the table."""

    module: str
    tensors: int = 0
    nbytes: int = 0
    dtypes: set[str] = field(default_factory=set)
    differing: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What a comparison found.

    Attributes:
        lines: of the table, by module.
        logits: one line about the logits; None if they were not looked at.
        logits_differ: whether they are further apart than rounding explains.
    """

    lines: dict[str, Line] = field(default_factory=dict)
    logits: str | None = None
    logits_differ: bool = False

    @property
    def ok(self) -> bool:
        """Whether all is the same."""
        return not self.differing and not self.logits_differ

    @property
    def differing(self) -> list[str]:
        """Names of tensors that differ, each with how."""
        return [name for line in self.lines.values() for name in line.differing]

    @property
    def tensors(self) -> int:
        """How many tensors were compared."""
        return sum(line.tensors for line in self.lines.values())

    def add(self, found: Iterable[Found]) -> None:
        """Counts tensors."""
        for module, name, info, difference in found:
            line = self.lines.setdefault(module, Line(module))
            line.tensors += 1
            line.nbytes += info.nbytes
            line.dtypes.add(str(info.dtype).removeprefix("torch."))
            if difference:
                line.differing.append(f"{name}: {difference}")

    def table(self) -> str:
        """The "matches original" table."""
        rows = [("module", "tensors", "bytes", "type", "matches original")]
        for line in self.lines.values():
            says = f"NO, {len(line.differing)} differ" if line.differing else "yes, bit for bit"
            rows.append((line.module, f"{line.tensors:,}", f"{line.nbytes:,}", "+".join(sorted(line.dtypes)), says))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        last = [f"logits: {self.logits}"] if self.logits else []
        return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:], *last])

    def require(self) -> Report:
        """Raises ConversionError naming the tensors if some differ, or the logits if they do."""
        if self.differing:
            first = "\n  ".join(self.differing[:10])
            raise ConversionError(f"{len(self.differing)} of {self.tensors} tensors do not match the original:\n  {first}")
        if self.logits_differ:
            raise ConversionError(f"all tensors match the original, but the logits do not: {self.logits}")
        return self


def difference(tensor: torch.Tensor, original: torch.Tensor) -> str | None:
    """How two tensors differ, or None if they have one shape, one type and the same bits (NaNs and signed zeros included)."""
    if tensor.shape != original.shape:
        return f"shape {list(tensor.shape)} instead of {list(original.shape)}"
    if tensor.dtype != original.dtype:
        return f"type {tensor.dtype} instead of {original.dtype}"
    if torch.equal(raw(tensor), raw(original)):
        return None
    count = int((raw(tensor) != raw(original)).reshape(-1, tensor.dtype.itemsize).any(dim=1).sum())
    return f"{count} of {tensor.numel()} values differ"


def compare(view: View, original: View, *, progress: Progress = nothing) -> Report:
    """Compares every tensor of ``view`` with ``original``, whatever kind each is and whatever names each uses.

    What the model does not build is compared where both hold it.

    Returns:
        the report; differences do not raise.
    """
    mine, theirs = ({entry.ours: entry for entry in v.plan.tensors} for v in (view, original))
    if mine.keys() != theirs.keys():
        raise ConversionError(
            f"{view.path} and {original.path} hold different models; only in one of them: "
            f"{', '.join(sorted(mine.keys() ^ theirs.keys())[:5])}"
        )
    report = Report()
    for key, entry in mine.items():
        other = theirs[key]
        report.add(_padding(v, e) for v, e in ((view, entry), (original, other)) if _is_padded(v, e))
        parts = view.parts(entry)
        for name, a, b in zip(other.names, parts, original.parts(other), strict=True):
            report.add([Found(entry.module, name, Info(tuple(a.shape), a.dtype, ""), difference(a, b))])
            progress(b.nbytes)
    if view.unused() and original.unused():
        _compare_unused(view, original, report, progress)
    return report


def _is_padded(view: View, entry: Tensor) -> bool:
    return isinstance(view, CheckpointView) and entry.fusion == "vocab" and entry.shape[0] > view.settings.language.vocab_size


def _padding(view: View, entry: Tensor) -> Found:
    """The rows that pad the vocabulary, which splitting drops."""
    rows = view.whole(entry)[view.settings.language.vocab_size :]
    says = "rows that are not zero" if rows.any() else None
    return Found(entry.module, f"{entry.ours} (padding)", Info(tuple(rows.shape), rows.dtype, ""), says)


def _compare_unused(view: View, original: View, report: Report, progress: Progress) -> None:
    mine = {in_default_naming(name, view.naming): name for name in view.unused()}
    theirs = {in_default_naming(name, original.naming): name for name in original.unused()}
    for name in sorted(set(mine) | set(theirs)):
        if name not in mine or name not in theirs:
            where = original.path if name in theirs else view.path
            report.lines.setdefault("not built", Line("not built")).differing.append(f"{name}: only in {where}")
            continue
        a, b = view.read_unused(mine[name]), original.read_unused(theirs[name])
        report.add([Found("not built", name, Info(tuple(a.shape), a.dtype, ""), difference(a, b))])
        progress(b.nbytes)


def total_bytes(view: View) -> int:
    """Bytes of all tensors of a checkpoint, for progress and for the room on disk."""
    return sum(view.info(entry).nbytes for entry in view.plan.tensors) + sum(info.nbytes for info in view.unused().values())
