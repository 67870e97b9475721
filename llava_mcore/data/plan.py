"""The plan of a run, made from the index alone: which samples a step holds, and which of them share a stream.

A window is a whole number of steps. Its samples stand at consecutive positions of the order; they are packed together, and the
streams, in a keyed order, are cut evenly into the window's steps. Nothing here knows of ranks, and nothing is read or decoded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llava_mcore.data.order import STREAMS, key, permute
from llava_mcore.data.packing import Stream, pack
from llava_mcore.data.quarantine import BadSample, QuarantineList
from llava_mcore.data.sample import count_visual, frames_of
from llava_mcore.data.sources import Blend, Drawn
from llava_mcore.geometry import Geometry
from llava_mcore.settings.schema import DataSettings


@dataclass(frozen=True)
class PlannedSample:
    """A sample of a step, known from the index."""

    source: int
    epoch: int  # of the source
    index: int  # in the source's dataset
    length: int  # tokens, image embeddings included
    pictures: int  # tiles and frames through the tower
    visual: int  # tokens of those that are image embeddings


@dataclass(frozen=True)
class StepPlan:
    """One step, over all ranks."""

    index: int
    samples: list[PlannedSample]
    streams: list[Stream]  # numbers of samples
    left_out: list[tuple[PlannedSample, str]]  # what cannot be trained on, and why; in a window's first step
    geometry: Geometry  # what its pictures and clips become


@dataclass(frozen=True)
class _Window:
    samples: list[PlannedSample]
    steps: list[list[Stream]]
    left_out: list[tuple[PlannedSample, str]]


class Planner:
    """Random access to the steps of a run.

    Args:
        blend: the order.
        data: stream length and packing.
        geometry: what pictures and clips become, when a schedule has run its course.
        seed: of the order of streams.
        global_batch_size: samples of a step; on average, where a window has several steps.
        total_samples: samples of the whole run; the last step may be short. None: endless.
        schedule: a step, from 0, to what they become in it; a window has that of its first step. None: always ``geometry``.
        max_positions: of a sample in the decoder, where merged or pooled pictures keep theirs. None: any number.
    """

    def __init__(
        self,
        blend: Blend,
        data: DataSettings,
        geometry: Geometry,
        *,
        seed: int,
        global_batch_size: int,
        total_samples: int | None = None,
        schedule: Callable[[int], Geometry] | None = None,
        max_positions: int | None = None,
    ) -> None:
        self.blend = blend
        self._data, self.geometry, self.seed = data, geometry, seed
        self._batch, self._total, self._schedule = global_batch_size, total_samples, schedule
        self._max_positions = max_positions
        self.window_steps = max(1, data.packing_window // global_batch_size) if data.packing else 1
        """Steps of a window."""
        self._frames = frames_of(data)
        self.quarantine = QuarantineList(data.quarantine)
        self._window = functools.lru_cache(maxsize=2)(self._plan)

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None: endless."""
        return None if self._total is None else -(-self._total // self._batch)

    def step(self, number: int) -> StepPlan:
        """The plan of one step, the same wherever it is made."""
        if self.steps is not None and number >= self.steps:
            raise IndexError(f"step {number} of {self.steps}")
        window, place = divmod(number, self.window_steps)
        planned = self._window(window)
        streams = planned.steps[place]
        members = sorted(sample for stream in streams for sample in stream)
        renumbered = {sample: number for number, sample in enumerate(members)}
        return StepPlan(
            index=number,
            samples=[planned.samples[sample] for sample in members],
            streams=[[renumbered[sample] for sample in stream] for stream in streams],
            left_out=planned.left_out if place == 0 else [],
            geometry=self.geometry_at(number),
        )

    def geometry_at(self, step: int) -> Geometry:
        """What pictures and clips become in a step: the same in all of its window, whose streams are packed together."""
        return self.geometry if self._schedule is None else self._schedule(step // self.window_steps * self.window_steps)

    def room(self, geometry: Geometry, tiles: np.ndarray | int) -> np.ndarray:
        """The most tokens of a sample with so many tiles: as its stream and the decoder's positions have room."""
        most = self._data.sequence_length
        if self._max_positions is None:
            return np.full_like(tiles, most)
        return np.clip(self._max_positions - np.asarray(tiles) * geometry.skipped, 0, most)

    def describe(self) -> str:
        """What is read and how it is packed, for a log."""
        parts = []
        for source in self.blend.sources:
            rejected = len(source.lengths.rejected)
            left_out = f", of which {rejected:,} cannot be used (prepare_data.py lint says why)" if rejected else ""
            parts.append(f"{source.dataset.path} ({source.order.size:,} samples{left_out})")
        packed = f"packed over {self.window_steps} steps" if self.window_steps > 1 else "packed step by step"
        return f"{', '.join(parts)}; {packed if self._data.packing else 'one sample in each stream'}"

    def window_start(self, step: int) -> int:
        """First position of the window that a step lies in."""
        return step // self.window_steps * self.window_steps * self._batch

    def epochs_over(self, step: int) -> list[tuple[int, int]]:
        """The epochs (number of the dataset, of its epoch) whose last sample came with this step, or before it in its window."""
        ends = (step + 1) % self.window_steps == 0 or step + 1 == self.steps
        return self.blend.epochs_over(*self._positions(step // self.window_steps)) if ends else []

    def _positions(self, window: int) -> tuple[int, int]:
        size = self.window_steps * self._batch
        last = (window + 1) * size
        return window * size, last if self._total is None else min(last, self._total)

    def _plan(self, window: int) -> _Window:
        first, last = self._positions(window)
        drawn = self.blend.at(first, last)
        lengths, tiles, visual, left_out = self._measure(drawn, first, self.geometry_at(window * self.window_steps))
        columns = (drawn.source, drawn.epoch, drawn.index, lengths, tiles, visual)
        samples = [PlannedSample(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        used = [number for number in range(len(samples)) if number not in left_out]
        steps = -(-(last - first) // self._batch)
        return _Window(samples, self._streams(window, samples, used, steps), [(samples[n], why) for n, why in left_out.items()])

    def _measure(self, drawn: Drawn, first: int, geometry: Geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]:
        """Tokens, tiles and image embeddings of each sample, and which are left out."""
        lengths, tiles, embeddings = np.zeros((3, len(drawn.index)), dtype=np.int64)
        left_out: dict[int, str] = {}
        quarantined = self.quarantine.at(first)
        capacity = self._data.sequence_length
        for number in np.unique(drawn.source).tolist():
            source = self.blend.sources[number]
            here = np.flatnonzero(drawn.source == number)
            indices = drawn.index[here]
            text, head = (column[indices].astype(np.int64) for column in (source.lengths.text, source.lengths.head))
            tiles[here], visual = count_visual(source.dataset, indices, geometry, self._frames)
            embeddings[here] = visual
            room = self.room(geometry, tiles[here])
            lengths[here] = np.minimum(text + visual, room)
            left_out |= {n: source.lengths.rejected[int(drawn.index[n])] for n in here[text == 0].tolist()}
            crowded = (text > 0) & (visual > 0) & (head + visual > room)
            for n, end in zip(here[crowded].tolist(), (head + visual)[crowded].tolist(), strict=True):
                left_out[n] = f"its pictures do not fit: the last ends at token {end}, " + (
                    f"but data.sequence_length is {capacity}"
                    if end > capacity
                    else f"at position {end + tiles[n] * geometry.skipped}, but the decoder is made for {self._max_positions} "
                    "(model.language.max_position_embeddings); set positions=counted where patches are merged or pooled"
                )
            if quarantined:
                digest, dataset = source.dataset.digest, source.dataset
                for n, index in zip(here.tolist(), indices.tolist(), strict=True):
                    if (digest, dataset.shard(index), dataset.key(index)) in quarantined:
                        left_out.setdefault(n, "is on the quarantine list")
        return lengths, tiles, embeddings, left_out

    def _streams(self, window: int, samples: list[PlannedSample], used: list[int], steps: int) -> list[list[Stream]]:
        """The streams of each step."""
        if not self._data.packing:
            return [[[number] for number in used]]
        streams = self._packed(samples, used)
        if steps == 1 or len(streams) < steps:  # some step would have nothing: each is packed for itself
            edges = [self._batch * step for step in range(steps + 1)]
            return [self._packed(samples, [n for n in used if a <= n < b]) for a, b in zip(edges, edges[1:], strict=False)]
        if self._data.shuffle:
            order = permute(np.arange(len(streams), dtype=np.int64), len(streams), key(self.seed, STREAMS, window))
            streams = [streams[number] for number in order.tolist()]
        multiple = self._data.streams_multiple
        while 2 * multiple > max(2, len(streams) // steps):  # steps would be of very different sizes
            multiple //= 2
        groups = -(-len(streams) // multiple)
        edges = [groups * step // steps * multiple for step in range(steps + 1)]
        return [streams[a:b] for a, b in zip(edges, edges[1:], strict=False)]

    def _packed(self, samples: list[PlannedSample], used: list[int]) -> list[Stream]:
        packed = pack([samples[number].length for number in used], self._data.sequence_length)
        return [[used[place] for place in stream] for stream in packed]


def bad_sample(blend: Blend, sample: PlannedSample, reason: str, place: int = 0) -> BadSample:
    """A sample with the name that a user finds it by."""
    dataset = blend.sources[sample.source].dataset
    index = sample.index
    return BadSample(str(dataset.path), dataset.shard(index), dataset.key(index), dataset.offset(index), reason, place)
