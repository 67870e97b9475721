"""Where the numbers of a step are kept: ``metrics.jsonl`` always, TensorBoard and Weights & Biases where they are asked for.

All three get the same names and the same numbers. A run that was resumed leaves one curve: what an earlier process wrote at or
after the first step of this one is dropped (``metrics.jsonl``), hidden (TensorBoard's purge) or kept as it was (wandb refuses
steps it already has; after a resume in the same layout they are bit-identical anyway).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

METRICS_FILE = "metrics.jsonl"


class Logger(Protocol):
    """Anything that keeps the numbers of a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep one step's numbers."""

    def close(self) -> None:
        """Write out what is still buffered."""


class MetricsFile:
    """One JSON object a line and a step, in full precision, so that two curves can be compared to the last bit.

    JSON knows no NaN: what is not finite is written as the string "nan", "inf" or "-inf", which ``float()`` reads back.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self.path = run_dir / METRICS_FILE
        run_dir.mkdir(parents=True, exist_ok=True)
        drop_from(self.path, first_step)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line, and hand it to the system at once: a killed run keeps every step it finished."""
        values = {name: value if math.isfinite(value) else str(float(value)) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLogger:
    """Event files under ``tensorboard/`` in the run folder."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports torch and tensorboard: only where it is asked for

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue one step's scalars; a thread writes them."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out and close."""
        self._writer.close()


class WandbLogger:
    """Weights & Biases, online or offline. The run's id is kept in the run folder, so that a resumed run is the same run."""

    def __init__(self, run_dir: Path, mode: str, project: str, config: Mapping[str, Any]) -> None:
        import wandb  # slow to import and not everyone's: only where it is asked for

        run_dir.mkdir(parents=True, exist_ok=True)
        id_file = run_dir / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.is_file() else ""
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            mode="offline" if mode == "offline" else "online",
            id=run_id or None,
            resume="allow" if run_id else None,
            config=dict(config),
        )
        id_file.write_text(self._run.id + "\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue one step's numbers; a process of wandb's writes or sends them."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Wait until everything is written or sent."""
        self._run.finish()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.jsonl`` (or of the one in a run folder), non-finite values as floats again."""
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{name: value if name == "step" else float(value) for name, value in json.loads(line).items()} for line in lines]


def drop_from(path: Path, first_step: int) -> None:
    """Leave only the lines before ``first_step``; a line cut short by a kill goes too. Written aside and renamed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] < first_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)
