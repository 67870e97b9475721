"""What a run draws its samples from: one dataset, or a mixture of several."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import yaml

from llava_mcore.data.errors import DatasetError
from llava_mcore.data.lengths import Lengths, load_lengths
from llava_mcore.data.mixture import ByEpochs, ByWeight, Interleaving, Scheduled
from llava_mcore.data.order import Order
from llava_mcore.data.sample import rendering_of
from llava_mcore.data.shards import ShardDataset
from llava_mcore.data.tokenizer import Tokenizer
from llava_mcore.settings.schema import DataSettings, SourceSettings


@dataclass(frozen=True)
class Source:
    """One dataset of a run, with its own endless order."""

    dataset: ShardDataset
    lengths: Lengths
    order: Order


@dataclass(frozen=True)
class Drawn:
    """Samples at consecutive positions; arrays of one length, int64."""

    position: np.ndarray
    source: np.ndarray
    epoch: np.ndarray  # of the source
    index: np.ndarray  # in the source's dataset


class Blend:
    """The endless order of a run: which sample of which dataset stands at each position.

    Args:
        sources: the datasets.
        interleaving: deals positions out to them.
        epoch_samples: positions that make one epoch of the run.
        identity: what the order depends on beside the datasets; fit for JSON.
    """

    def __init__(self, sources: Sequence[Source], interleaving: Interleaving, epoch_samples: int, identity: Any) -> None:
        self.sources = list(sources)
        self.epoch_samples = epoch_samples
        self._interleaving = interleaving
        parts = [[source.dataset.digest, source.lengths.digest] for source in sources]
        self.digest = hashlib.sha256(json.dumps([parts, identity], sort_keys=True).encode()).hexdigest()[:16]
        """Of everything the order depends on but the seed."""

    def at(self, first: int, last: int) -> Drawn:
        """The samples at positions [first, last)."""
        positions = np.arange(first, last, dtype=np.int64)
        sources, numbers = self._interleaving.at(positions)
        epochs, indices = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(sources).tolist():
            here = np.flatnonzero(sources == number)
            epochs[here], indices[here] = self.sources[number].order.at(numbers[here])
        return Drawn(positions, sources, epochs, indices)

    def epochs_over(self, first: int, last: int) -> list[tuple[int, int]]:
        """The epochs (number of the dataset, of its epoch) that end with a position in [first, last)."""
        over = []
        before, after = self._interleaving.before(first), self._interleaving.before(last)
        for number, source in enumerate(self.sources):
            epochs = range(before[number] // source.order.size, after[number] // source.order.size)
            over += [(number, epoch) for epoch in epochs]
        return over


def open_blend(data: DataSettings, tokenizer: Tokenizer, seed: int, global_batch_size: int) -> Blend:
    """Opens the datasets that the settings name.

    Raises:
        DatasetError: one of them, its text lengths or the mixture will not do; says what to do.
    """
    wanted = mixture_of(data)
    sources = []
    for number, settings in enumerate(wanted):
        dataset = ShardDataset(settings.path)
        lengths = load_lengths(dataset, tokenizer, rendering_of(data), data.tokenizer)
        if len(lengths.rejected) == len(dataset):
            first = next(iter(lengths.rejected.values()), "")
            raise DatasetError(f"no sample of {settings.path} can be used ({first}); see tools/prepare_data.py lint")
        try:
            # Two mentions of one dataset are two orders.
            order = Order(dataset.shard_sizes, seed + number, data.shuffle, data.shuffle_shards, settings.sampling_strategy)
        except ValueError as error:
            raise DatasetError(f"{settings.path}: {error}") from error
        sources.append(Source(dataset, lengths, order))
    sizes = [source.order.size for source in sources]
    identity = [[settings.weight, settings.epochs, settings.sampling_strategy] for settings in wanted]
    try:
        if wanted[0].weight is not None:
            interleaving = _by_weight([settings.weight for settings in wanted], global_batch_size)
            epoch = sum(sizes)
        else:
            epochs = [Fraction(str(settings.epochs or 1)) for settings in wanted]
            counts = [math.ceil(size * times) for size, times in zip(sizes, epochs, strict=True)]
            interleaving, epoch = ByEpochs(counts), sum(counts)
    except ValueError as error:
        raise DatasetError(f"data.mixture: {error}") from error
    return Blend(sources, interleaving, epoch, [identity, data.shuffle, data.shuffle_shards])


def _by_weight(weights: Sequence[Any], global_batch_size: int) -> Interleaving:
    """The interleaving of fixed weights, or of those that change at given steps."""
    steps = sorted({0, *(int(step) for weight in weights if isinstance(weight, dict) for step in weight)})

    def at(weight: Any, step: int) -> float:
        if not isinstance(weight, dict):
            return weight
        passed = [int(begin) for begin in weight if int(begin) <= step]
        if not passed:
            raise ValueError(f"a schedule of weights must say what holds from step 0 on, not from {min(weight)}")
        return weight[max(passed)]

    parts = {step * global_batch_size: ByWeight([at(weight, step) for weight in weights]) for step in steps}
    return Scheduled(parts)


def mixture_of(data: DataSettings) -> list[SourceSettings]:
    """The datasets the settings name, in whichever way.

    Raises:
        DatasetError: none is named, or ``data.mixture_file`` cannot be read.
    """
    if data.mixture:
        return data.mixture
    if data.path is not None:
        return [SourceSettings(path=data.path)]
    if data.mixture_file is None:
        raise DatasetError("data.path is not set, nor data.mixture or data.mixture_file")
    try:
        listed = yaml.safe_load(Path(data.mixture_file).read_text(encoding="utf-8"))["datasets"]
        if not listed:
            raise TypeError("`datasets` is empty")
        return DataSettings(mixture=listed).mixture  # type: ignore[call-arg]
    except (OSError, yaml.YAMLError, KeyError, TypeError, pydantic.ValidationError) as error:
        raise DatasetError(
            f"data.mixture_file={data.mixture_file} is no mixture ({type(error).__name__}: {str(error).strip()}); it needs a "
            f"list `datasets` of {{path, weight, epochs, sampling_strategy}}"
        ) from error
