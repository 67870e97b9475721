"""Is every tensor of one checkpoint, bit for bit, in the other? Compared in the published form: what was fused is split first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from llava_mcore.conversion import fusions
from llava_mcore.conversion.families import ConversionError, Tensor
from llava_mcore.conversion.layouts import in_default_naming
from llava_mcore.conversion.views import CheckpointView, View
from llava_mcore.conversion.weights import cast, raw

Progress = Callable[[int], object]


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
    """What a comparison found."""

    lines: dict[str, Line] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether all tensors are the same."""
        return not self.differing

    @property
    def differing(self) -> list[str]:
        """Names of tensors that differ, each with how."""
        return [name for line in self.lines.values() for name in line.differing]

    @property
    def tensors(self) -> int:
        """How many tensors were compared."""
        return sum(line.tensors for line in self.lines.values())

    def add(self, module: str, name: str, tensor: torch.Tensor, difference: str | None) -> None:
        """Counts one tensor."""
        line = self.lines.setdefault(module, Line(module))
        line.tensors += 1
        line.nbytes += tensor.nbytes
        line.dtypes.add(str(tensor.dtype).removeprefix("torch."))
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
        return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])

    def require(self) -> Report:
        """Raises ConversionError naming the tensors if some differ."""
        if not self.ok:
            first = "\n  ".join(self.differing[:10])
            raise ConversionError(f"{len(self.differing)} of {self.tensors} tensors do not match the original:\n  {first}")
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


def compare(
    view: View, original: View, *, dtype: torch.dtype | None = None, unused: bool = True, progress: Progress = lambda n: None
) -> Report:
    """Compares every tensor of ``view`` with ``original``, whatever kind each is and whatever names each uses.

    Args:
        view: what was written.
        original: what it was made of.
        dtype: the type the original was cast to on the way.
        unused: compare what the model does not build as well.
        progress: called with the bytes that were compared.

    Returns:
        the report; differences do not raise.
    """
    if _keys(view) != _keys(original):
        mine, theirs = _keys(view), _keys(original)
        raise ConversionError(
            f"{view.path} and {original.path} hold different models; only in one of them: "
            f"{', '.join(sorted(mine.symmetric_difference(theirs))[:5])}"
        )
    report = Report()
    for (entry, mine_parts), (other, parts) in zip(_walk(view, report), original.parts(), strict=True):
        assert entry.ours == other.ours
        for name, a, b in zip(other.names, mine_parts, parts, strict=True):
            b = cast(b, dtype)
            report.add(entry.module, name, a, difference(a, b))
            progress(b.nbytes)
    if unused:
        _compare_unused(view, original, dtype, report, progress)
    return report


def _keys(view: View) -> set[str]:
    return {entry.ours for entry in view.plan.tensors}


def _walk(view: View, report: Report) -> Iterator[tuple[Tensor, list[torch.Tensor]]]:
    """The view's parts; rows that pad the vocabulary are checked on the way, as splitting drops them."""
    if not isinstance(view, CheckpointView):
        yield from view.parts()
        return
    for entry, whole in view.joined():
        if entry.fusion == "vocab":
            rows = whole[entry.part_shapes[0][0] :]
            if rows.numel():
                report.add(entry.module, f"{entry.ours} (padding)", rows, "rows that are not zero" if rows.any() else None)
        yield entry, fusions.split(whole, entry)


def _compare_unused(view: View, original: View, dtype: torch.dtype | None, report: Report, progress: Progress) -> None:
    mine = {in_default_naming(name, view.naming): name for name in view.unused()}
    theirs = {in_default_naming(name, original.naming): name for name in original.unused()}
    for name in sorted(set(mine) | set(theirs)):
        if name not in mine or name not in theirs:
            where = original.path if name in theirs else view.path
            report.lines.setdefault("not built", Line("not built")).differing.append(f"{name}: only in {where}")
            continue
        a, b = view.read_unused(mine[name]), cast(original.read_unused(theirs[name]), dtype)
        report.add("not built", name, a, difference(a, b))
        progress(b.nbytes)


def total_bytes(view: View, unused: bool = True) -> int:
    """Bytes of all tensors of a checkpoint, for progress and for the room on disk."""
    built = sum(view.info(entry).nbytes for entry in view.plan.tensors)
    return built + (sum(info.nbytes for info in view.unused().values()) if unused else 0)
