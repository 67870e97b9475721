"""Bad samples: how many a run bears, and the list of those that later runs leave out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_mcore.data.errors import DatasetError

WINDOW = 100_000  # samples that the rate is taken over
BUCKETS = 10  # it moves on in as many steps


@dataclass(frozen=True)
class BadSample:
    """A sample that was not trained on."""

    dataset: str  # folder
    shard: str
    key: str
    offset: int  # bytes into the shard
    error: str
    place: int = 0  # among the samples of its step

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.error}"

    def line(self, step: int) -> str:
        """As it stands in the quarantine log."""
        return json.dumps({"step": step, **{name: value for name, value in asdict(self).items() if name != "place"}})


class BadBudget:
    """Counts bad samples over a whole run and says when they are too many.

    Args:
        total: that the run bears.
        rate: largest share of the last ``WINDOW`` samples (asked for once a thousand were seen).
        in_a_row: that stop the run.
        state: of an earlier part of the run.
    """

    def __init__(self, total: int, rate: float, in_a_row: int, state: dict[str, Any] | None = None) -> None:
        self._total, self._rate, self._in_a_row = total, rate, in_a_row
        state = state or {}
        self.count: int = state.get("count", 0)
        self._row: int = state.get("row", 0)
        self._recent: list[list[int]] = state.get("recent", [[0, 0]])  # samples and bad ones of each bucket

    def add(self, samples: int, bad: Sequence[BadSample]) -> str | None:
        """Counts a step.

        Args:
            samples: of the step.
            bad: those that failed.

        Returns:
            What is too much, if anything is.
        """
        self.count += len(bad)
        longest = self._runs(samples, sorted(sample.place for sample in bad))
        self._recent[-1][0] += samples
        self._recent[-1][1] += len(bad)
        seen, failed = (sum(column) for column in zip(*self._recent, strict=True))
        if self._recent[-1][0] >= WINDOW // BUCKETS:
            self._recent = [*self._recent, [0, 0]][-BUCKETS:]
        if not bad:
            return None
        if self.count > self._total:
            return f"{self.count} bad samples are more than data.max_bad_samples={self._total}"
        if longest >= self._in_a_row:
            return f"{longest} bad samples in a row reach data.max_bad_in_a_row={self._in_a_row}"
        if seen >= 1000 and failed > self._rate * seen:
            return f"{failed} bad samples among the last {seen:,} are more than data.max_bad_rate={self._rate}"
        return None

    def _runs(self, samples: int, places: list[int]) -> int:
        """The longest run of bad samples that ends in this step; keeps the one its end leaves open."""
        longest, expected = 0, 0
        for place in places:
            self._row = self._row + 1 if place == expected else 1
            expected = place + 1
            longest = max(longest, self._row)
        if samples and (not places or expected != samples):
            self._row = 0
        return longest

    def state_dict(self) -> dict[str, Any]:
        """What the budget is made of again; fit for JSON."""
        return {"count": self.count, "row": self._row, "recent": self._recent}


class QuarantineList:
    """Samples to leave out: versions that were appended one after the other, each in force from a position of the order on.

    A JSON file ``{"versions": [{"from_sample": N, "samples": [{"dataset": digest, "shard": name, "key": key}, ...]}, ...]}``.
    A run that has passed a version's position goes on only with that version unchanged.

    Raises:
        DatasetError: the file cannot be read.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._versions: list[dict[str, Any]] = []
        if path is None:
            return
        try:
            self._versions = json.loads(Path(path).read_text(encoding="utf-8"))["versions"]
            starts = [version["from_sample"] for version in self._versions]
            for version in self._versions:
                for sample in version["samples"]:
                    _name(sample)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"data.quarantine={path} is no quarantine list ({type(error).__name__}: {error})") from error
        if starts != sorted(starts):
            raise DatasetError(f"data.quarantine={path}: its versions must come in force one after the other, not at {starts}")

    def at(self, position: int) -> set[tuple[str, str, str]]:
        """Digest of the dataset, shard and key of every sample that is left out at a position."""
        return {_name(sample) for version in self._in_force(position) for sample in version["samples"]}

    def digest(self, position: int) -> str:
        """Of the versions in force at a position, for the state of a run."""
        return hashlib.sha256(json.dumps(self._in_force(position), sort_keys=True).encode()).hexdigest()[:16]

    def _in_force(self, position: int) -> list[dict[str, Any]]:
        return [version for version in self._versions if version["from_sample"] <= position]


def _name(sample: dict[str, str]) -> tuple[str, str, str]:
    return sample["dataset"], sample["shard"], sample["key"]


def append_version(path: Path, from_sample: int, samples: Iterable[tuple[str, str, str]]) -> int:
    """Adds a version to a quarantine list (or begins one) and returns how many samples it names that none before did.

    Raises:
        DatasetError: the list cannot be read, or has a version that comes into force later.
    """
    QuarantineList(path if path.exists() else None)
    versions = json.loads(path.read_text(encoding="utf-8"))["versions"] if path.exists() else []
    if versions and versions[-1]["from_sample"] > from_sample:
        raise DatasetError(f"{path} has a version from sample {versions[-1]['from_sample']} on; a new one cannot come before it")
    known = {_name(sample) for version in versions for sample in version["samples"]}
    new = sorted(set(samples) - known)
    versions.append(
        {"from_sample": from_sample, "samples": [dict(zip(("dataset", "shard", "key"), name, strict=True)) for name in new]}
    )
    path.write_text(json.dumps({"versions": versions}, indent=1), encoding="utf-8")
    return len(new)
