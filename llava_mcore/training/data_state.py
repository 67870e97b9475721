"""What a run knows of its data: how far it is, which samples were bad, and that none was lost or came twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llava_mcore.data.account import Account
from llava_mcore.data.loader import Step
from llava_mcore.data.plan import Planner
from llava_mcore.data.position import Position
from llava_mcore.data.quarantine import BadBudget, BadSample
from llava_mcore.parallel.groups import Groups
from llava_mcore.settings.schema import Settings

QUARANTINE_LOG = "quarantine.jsonl"


class DataError(RuntimeError):
    """The data does not allow the run to go on; every rank raises it at the same step."""


class DataState:
    """Keeps the books of a run's data; every rank has one, and all of them the same.

    Args:
        settings: of the run.
        planner: of the run.
        groups: process groups.
        is_first: whether this rank writes and says what is said once.
    """

    def __init__(self, settings: Settings, planner: Planner, groups: Groups, is_first: bool) -> None:
        self._settings, self._planner, self._groups, self._is_first = settings, planner, groups, is_first
        self._position = Position(planner, settings.data, settings.train.seed, settings.train.global_batch_size)
        self._account, self._own = Account(), Account()  # of all ranks up to the last merge, and of this one since
        self._budget = self._new_budget(None)
        self._log = Path(settings.train.output_dir) / QUARANTINE_LOG

    @property
    def bad_samples(self) -> int:
        """Samples that could not be used, since the start of the run."""
        return self._budget.count

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a checkpoint after ``step`` steps keeps, a few hundred bytes; collective."""
        self._merge()
        return {
            **self._position.state_dict(step),
            "bad_samples": self._budget.state_dict(),
            "account": self._account.state_dict(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint, with any number of ranks.

        Raises:
            DatasetError: it was counted in other data or another order.
        """
        self._position.check(state)
        self._budget = self._new_budget(state["bad_samples"])
        self._account, self._own = Account(state["account"]), Account()
        if self._is_first and self._log.exists():  # what came after the checkpoint comes again
            lines = self._log.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= state["step"]]
            self._log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def finish(self, step: Step, bad: int) -> None:
        """Books a finished step; collective.

        Args:
            step: this rank's.
            bad: samples that failed on all ranks.

        Raises:
            DataError: too many samples were bad, or an epoch that ends here does not hold every sample once.
        """
        reads = self._groups.replica.rank() == 0
        if reads:
            self._own.merge(step.account)
        if self._is_first and step.left_out:
            self._write(step.index + 1, step.left_out)
        found = self._gathered(step.bad if reads else []) if bad else []
        too_many = self._budget.add(step.samples, found)
        if self._is_first and found:
            self._write(step.index + 1, found)
            for sample in found:
                print(f"skipped sample: {sample}", file=sys.stderr, flush=True)
        if too_many:
            raise DataError(
                f"{too_many}; the last: {found[-1]}. All are in {self._log}; look at them with tools/prepare_data.py lint, "
                f"or raise the limit"
            )
        if over := self._planner.epochs_over(step.index):
            self._merge()
            for source, epoch in over:
                self._close(source, epoch)

    def _close(self, source: int, epoch: int) -> None:
        drawn = self._planner.blend.sources[source]
        if problem := self._account.close(source, epoch, drawn.order):
            raise DataError(
                f"epoch {epoch + 1} of {drawn.dataset.path} does not hold every sample once: {problem}. Checkpoints before it "
                f"are intact; please report this"
            )
        if self._is_first:
            print(f"epoch {epoch + 1} of {drawn.dataset.path}: {drawn.order.size:,} samples, every one once", flush=True)

    def _new_budget(self, state: dict[str, Any] | None) -> BadBudget:
        data = self._settings.data
        return BadBudget(data.max_bad_samples, data.max_bad_rate, data.max_bad_in_a_row, state)

    def _merge(self) -> None:
        """Adds what all ranks have counted since the last time."""
        parts: list[dict[str, list[int]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, self._own.state_dict())
        for part in parts:
            self._account.merge(Account(part))
        self._own = Account()

    def _gathered(self, own: list[BadSample]) -> list[BadSample]:
        parts: list[list[BadSample]] = [[]] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        return sorted((sample for part in parts for sample in part), key=lambda sample: sample.place)

    def _write(self, step: int, samples: list[BadSample]) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.writelines(sample.line(step) + "\n" for sample in samples)


def _step_of(line: str) -> float:
    """The step of a line of the log; none is reached by a line that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
