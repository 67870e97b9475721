"""What follows from the settings, the data and the number of processes: asked by the trainer, the dry run and nobody's user."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from llava_mcore.settings.compose import SettingsError
from llava_mcore.settings.layouts import layout_problems
from llava_mcore.settings.schema import Settings


@dataclass(frozen=True, kw_only=True)
class Derived:
    """Numbers nobody sets."""

    num_samples: int
    """Samples of the data set."""
    world_size: int
    """Processes in all."""
    data_parallel: int
    """Replicas of the model."""
    steps: int
    """Optimizer steps of the whole schedule."""
    warmup_steps: int
    """Steps of the linear warmup, rounded up."""
    total_samples: int
    """Samples the run consumes. The last step is short where this is no multiple of the global batch."""


def derive(settings: Settings, num_samples: int, world_size: int) -> Derived:
    """Steps, warmup and data-parallel size.

    Shares are taken as written, in decimal: 0.07 of 100 steps is 7, where binary floats would round 7.000000000000001 up to 8.

    Raises:
        SettingsError: if ``world_size`` processes cannot hold the layout, or there is nothing to train on.
    """
    train, parallel = settings.train, settings.parallel
    problems = layout_problems(settings, world_size)
    if num_samples < 1:
        problems.append(f"data.path={settings.data.path}: {num_samples} samples, nothing to train on")
    if problems:
        raise SettingsError(problems)
    if train.steps is not None:
        total_samples = train.steps * train.global_batch_size
    else:
        total_samples = math.ceil(Fraction(str(train.epochs)) * num_samples)
    steps = -(-total_samples // train.global_batch_size)
    return Derived(
        num_samples=num_samples,
        world_size=world_size,
        data_parallel=world_size // parallel.model_ranks,
        steps=steps,
        warmup_steps=math.ceil(Fraction(str(train.warmup_ratio)) * steps),
        total_samples=total_samples,
    )
