"""What is seen of a run: one console line a step, and the same numbers in ``metrics.jsonl``, TensorBoard and wandb.

The observer gets plain Python numbers that the loop already has on the host; it never touches a tensor, so it never makes the
device wait. All ranks make one, and only the first rank's does anything.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llava_mcore.settings.schema import Settings
from llava_mcore.training.observe.console import duration, format_line
from llava_mcore.training.observe.flops import peak_flops
from llava_mcore.training.observe.loggers import Logger, MetricsFile, TensorBoardLogger, WandbLogger, read_metrics

__all__ = ["Observer", "StepRecord", "read_metrics"]

RECENT_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, as numbers over all ranks.

    Attributes:
        step: the step just finished, counted from 1.
        steps: the last step of the run.
        loss: mean over the predicted tokens of the step.
        lr: learning rate of the step: one, or one a module.
        grad_norm: global gradient norm before clipping; None where it is not computed.
        tokens: tokens that are not padding, image embeddings included.
        slots: tokens with padding.
        seconds: wall time of the step, waiting for data included.
        samples: samples of the step.
        pictures: pictures of the step, their tiles and the frames of videos counted one by one.
        visual_tokens: those of the tokens that are image embeddings.
        bad_samples: samples skipped since the start of the run.
        waited: seconds of the step in which the model waited for data, mean over the ranks that read.
        flops: model FLOPs of the step (``FlopsCounter.step``).
        encoder_imbalance: longest over mean share of the pictures that were dealt over ranks; None where they were not.
        blank_pictures: pictures that only fill up the products of an FP8 tower; None without one.
    """

    step: int
    steps: int
    loss: float
    lr: float | Mapping[str, float]
    grad_norm: float | None
    tokens: int
    slots: int
    seconds: float
    samples: int
    pictures: int
    visual_tokens: int = 0
    bad_samples: int = 0
    waited: float = 0.0
    flops: int = 0
    encoder_imbalance: float | None = None
    blank_pictures: int | None = None


class Observer:
    """Shows and keeps the numbers of a run.

    The first step of a process pays for what happens once (compilation, buffers, a cold loader), so it is shown but left out of
    every average and estimate. Files are opened at the first record: its step says what a resumed run writes anew.
    """

    def __init__(self, settings: Settings, is_first: bool, world_size: int, device_name: str, run_dir: str | Path) -> None:
        """Make ready; reaches out to wandb at once, so that a missing login fails before the first step.

        Args:
            settings: of the run; the ``train`` group says what is written, and wandb keeps all of it.
            is_first: whether this process is the one that shows and writes.
            world_size: processes of the run, for MFU.
            device_name: as ``torch.cuda.get_device_name`` gives it, or anything without a known peak.
            run_dir: folder of the run.
        """
        self._active = is_first
        self._run_dir = Path(run_dir)
        self._train = settings.train
        self._peak = peak_flops(device_name, "float8" if settings.precision.fp8 else settings.train.dtype)
        self._world_size = world_size
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._counted_steps = self._counted_tokens = 0
        self._counted_seconds = 0.0
        self._started = False
        self._loggers: list[Logger] = []
        if is_first and self._train.wandb != "disabled":
            config = dataclasses.asdict(settings)
            self._loggers.append(WandbLogger(self._run_dir, self._train.wandb, self._train.wandb_project, config))

    def log(self, record: StepRecord) -> None:
        """Show and keep one step."""
        if not self._active:
            return
        if self._started:
            self._recent.append(record.seconds)
            self._counted_steps += 1
            self._counted_tokens += record.tokens
            self._counted_seconds += record.seconds
        else:
            self._open_files(record.step)
        metrics = self._metrics(record)
        for logger in self._loggers:
            logger.log(record.step, metrics)
        if record.step % self._train.log_every == 0 or record.step == record.steps:
            eta = statistics.median(self._recent) * (record.steps - record.step) if self._recent else None
            print(format_line(record.step, record.steps, metrics, eta), flush=True)

    def close(self) -> None:
        """Write out everything and say how fast it went. Calling it again does nothing."""
        if not self._active:
            return
        self._active = False
        for logger in self._loggers:
            logger.close()
        if self._counted_seconds > 0:
            rate = self._counted_tokens / self._counted_seconds
            print(
                f"{self._counted_steps} steps in {duration(self._counted_seconds)}, {rate:,.0f} tok/s "
                f"(the first step of the process left out); every step is in {self._run_dir}",
                flush=True,
            )

    def _open_files(self, first_step: int) -> None:
        self._started = True
        self._loggers.append(MetricsFile(self._run_dir, first_step))
        if self._train.tensorboard:
            self._loggers.append(TensorBoardLogger(self._run_dir, first_step))

    def _metrics(self, record: StepRecord) -> dict[str, float]:
        """The numbers under the names that every place uses."""
        seconds = max(record.seconds, 1e-9)
        metrics: dict[str, float] = {"loss": record.loss}
        if isinstance(record.lr, Mapping):
            metrics |= {f"lr/{module}": rate for module, rate in record.lr.items()}
        else:
            metrics["lr"] = record.lr
        if record.grad_norm is not None:
            metrics["grad_norm"] = record.grad_norm
        metrics |= {
            "tokens_per_second": record.tokens / seconds,
            "padding": 1 - record.tokens / record.slots if record.slots else 0.0,
            "step_ms": 1000 * record.seconds,
            # Ranks begin a process's first step at different times, so another's wait may be longer than this rank's step.
            "data_wait": min(1.0, record.waited / seconds),
            "model_tflops": record.flops / seconds / 1e12,
        }
        if self._peak:
            metrics["mfu"] = record.flops / seconds / (self._peak * self._world_size)
        if record.encoder_imbalance is not None:
            metrics["encoder_imbalance"] = record.encoder_imbalance
        if record.blank_pictures is not None:
            metrics["blank_pictures"] = record.blank_pictures
        metrics |= {
            "tokens": record.tokens,
            "visual_tokens": record.visual_tokens,
            "text_tokens": record.tokens - record.visual_tokens,
            "samples": record.samples,
            "pictures": record.pictures,
            "bad_samples": record.bad_samples,
        }
        return metrics
