"""What every benchmark shares: alternating medians, a table, one JSON object.

A benchmark is ``python benchmarks/NAME.py [--quick] [--json FILE]``. It measures this project and its peer in turn, in one run,
and reports; it never fails because a number is low.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "Pillow")


@dataclass(frozen=True)
class Measure:
    """One comparison.

    Attributes:
        ours: this project's figure, in ``unit``.
        peer: the other's.
        unit: of both.
        at_least: what ``ratio`` is to reach.
        better: whether a higher or a lower figure is the better one.
        note: what was measured, for the reader of the record.
    """

    ours: float
    peer: float
    unit: str
    at_least: float
    better: Literal["higher", "lower"] = "higher"
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times better ours is: above 1 is in our favour, whichever way ``better`` points."""
        return self.ours / self.peer if self.better == "higher" else self.peer / self.ours

    def as_json(self) -> dict[str, Any]:
        """The measure as it stands in a record."""
        return {
            "ours": _significant(self.ours),
            "peer": _significant(self.peer),
            "ratio": _significant(self.ratio),
            "unit": self.unit,
            "at_least": self.at_least,
            "better": self.better,
            "note": self.note,
        }


def alternate(ours: Callable[[int], float], peer: Callable[[int], float], rounds: int, warmup: int = 1) -> tuple[float, float]:
    """Medians of two figures taken in turn, so that whatever else the machine does meets both.

    Args:
        ours: takes the number of the round and returns its figure.
        peer: likewise; every second round it goes first.
        rounds: rounds that count.
        warmup: rounds before them that do not; numbered from 0 as well.
    """
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(-warmup, rounds):
        for side in (0, 1) if number % 2 else (1, 0):
            figure = (ours, peer)[side](max(number, 0))
            if number >= 0:
                found[side].append(figure)
    return statistics.median(found[0]), statistics.median(found[1])


def machine() -> dict[str, Any]:
    """What the figures were taken on, without names of hosts or paths."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        **_gpu(),
    }


def commit() -> str:
    """The commit that was measured, with ``-dirty`` where files differ from it; "unknown" outside of a checkout."""
    try:
        name = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed.strip() else name


def record(benchmark: str, measures: Mapping[str, Measure]) -> dict[str, Any]:
    """The JSON object of a run."""
    return {
        "benchmark": benchmark,
        "commit": commit(),
        "machine": machine(),
        "measures": {name: measure.as_json() for name, measure in measures.items()},
    }


def table(measures: Mapping[str, Measure]) -> str:
    """The measures for the eye."""
    rows = [("measure", "ours", "peer", "unit", "ratio", "at least")]
    for name, measure in measures.items():
        figures = (
            f"{measure.ours:,.4g}",
            f"{measure.peer:,.4g}",
            measure.unit,
            f"{measure.ratio:.2f} x",
            f"{measure.at_least} x",
        )
        rows.append((name, *figures))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def run(
    benchmark: str, description: str, measures: Mapping[str, Callable[[bool], Measure]], arguments: Sequence[str] | None = None
) -> dict[str, Any]:
    """A benchmark's command line: measures, prints and writes.

    Args:
        benchmark: its name.
        description: of the command, for ``--help``.
        measures: name to the function that takes it; its argument says whether to be quick.
        arguments: of the command line; None: those of the process.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small models and few rounds: under a minute, for a first look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument("--only", nargs="+", choices=list(measures), metavar="MEASURE", help=f"of {', '.join(measures)}")
    options = parser.parse_args(arguments)
    taken: dict[str, Measure] = {}
    result = record(benchmark, {})
    for name in options.only or measures:
        taken[name] = measures[name](options.quick)
        print(f"{name}: {taken[name].ratio:.2f} x ({taken[name].note})", flush=True)
        result["measures"][name] = taken[name].as_json()
        if options.json is not None:  # after each, so that no figure is lost with a later one
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(taken)}")
    return result


def _gpu() -> dict[str, Any]:
    """The GPU and what is made for it, in a benchmark that has one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    packages = {name: _version(name) for name in ("transformer-engine", "flash-attn")}
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **packages}


def _significant(value: float) -> float:
    return float(f"{value:.5g}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
