"""The loader: what every data-parallel rank computes on, step by step.

The plan says which samples a step holds and which share a stream. Here the streams are dealt to ranks by cost, and a rank reads,
tokenises and decodes its own samples and no other's: bytes first, ``data.read_ahead`` steps before their turn.

Shape suffixes: T tokens of a micro-batch, E its image embeddings, N its tiles and frames, C H W one of them.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from llava_mcore.data.account import Account
from llava_mcore.data.conversation import IGNORE, EncodedSample
from llava_mcore.data.decode import Decoder, Request
from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.lengths import command_of
from llava_mcore.data.packing import Cost, Stream, deal
from llava_mcore.data.plan import PlannedSample, Planner, StepPlan, bad_sample
from llava_mcore.data.quarantine import BadSample
from llava_mcore.data.sample import Reading, positions_of
from llava_mcore.data.tokenizer import Tokenizer
from llava_mcore.geometry import SINGLE, Geometry, Shape
from llava_mcore.settings.schema import DataSettings

PAD_ID = 0


@dataclass
class Batch:
    """One micro-batch: ``micro_batch_size`` streams laid end to end."""

    input_ids_T: Tensor  # int64; image_token_id at every image embedding; 0 in the padding
    labels_T: Tensor  # int64, pre-shifted, -100 where nothing is predicted
    position_ids_T: (
        Tensor  # int64, from 0 in each sample and in each stream's padding tail; of merged patches about (geometry.py)
    )
    sample_lengths: list[int]  # sums to T; a stream's padding tail is a segment of its own, no sample crosses streams
    image_index_E: Tensor  # int64, where in T each image embedding goes, picture after picture
    pixel_values_NCHW: Tensor  # float32
    loss_tokens: int  # labels that are not -100
    real_tokens: int  # tokens that are not padding
    shapes: list[Shape] = field(default_factory=list)  # of the media, whose tiles the pixels are; none: each tile is a picture

    def labelled(self) -> Tensor:
        """The tokens that have a label, int64 [loss_tokens]."""
        return (self.labels_T != IGNORE).nonzero()[:, 0]


@dataclass
class Step:
    """What one data-parallel rank does in one optimizer step. Counts are of the whole step, over all ranks."""

    index: int
    batches: list[Batch]
    samples: int
    real_tokens: int
    slots: int
    pictures: int  # tiles and frames through the tower
    visual_tokens: int
    sample_lengths: list[int]  # real samples of all ranks, without padding
    bad: list[BadSample] = field(default_factory=list)  # that failed on this rank, and were masked out
    left_out: list[BadSample] = field(default_factory=list)  # that the plan leaves out; reported by the first rank
    account: Account = field(default_factory=Account)  # of what this rank reports


@dataclass(frozen=True)
class Piece:
    """One sample ready to be laid into a stream: L tokens, E image embeddings, n tiles and frames."""

    input_ids_L: np.ndarray  # int64
    labels_L: np.ndarray  # int64, pre-shifted
    image_slots_E: np.ndarray  # int64, from the start of the sample
    pixels_nCHW: np.ndarray  # float32
    shapes: Sequence[Shape] | None = None  # of its media; None: each of the n is a picture
    positions_L: np.ndarray | None = None  # int64, in the decoder, from 0; None: counted


@dataclass(frozen=True)
class _Raw:
    """A sample that was read and tokenised, but not decoded."""

    tokens: EncodedSample
    requests: list[Request]
    shapes: list[Shape]


@dataclass(frozen=True)
class _Work:
    """A step whose bytes are on their way."""

    plan: StepPlan
    ranks: list[list[Stream]]
    raw: dict[int, Future[_Raw | SampleError]]  # by the sample's number in the plan


class _Stopped(Exception):
    """The consumer has gone."""


class StreamLoader:
    """The steps of a run for one data-parallel rank.

    Args:
        planner: says what the steps are.
        tokenizer: makes ids.
        data: template, picture mode, stream length, threads.
        image_token_id: id written at every image embedding.
        rank: data-parallel rank.
        size: data-parallel size.
        micro_batch_size: streams of a batch.
        batches_multiple: each rank gets a multiple of this number of batches.
        cost: of a sample, for dealing streams to ranks evenly; None: about a 7B model's, pictures not counted.
        start_step: first step to give.
    """

    def __init__(
        self,
        planner: Planner,
        tokenizer: Tokenizer,
        data: DataSettings,
        image_token_id: int,
        *,
        rank: int,
        size: int,
        micro_batch_size: int,
        batches_multiple: int = 1,
        cost: Cost | None = None,
        start_step: int = 0,
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is outside of 0..{size - 1}")
        self.planner = planner
        self._data, self._geometry = data, planner.geometry
        self._reading = Reading.from_settings(tokenizer, data, planner.geometry, image_token_id)
        self._rank, self._size = rank, size
        self._micro_batch_size, self._batches_multiple = micro_batch_size, batches_multiple
        self._cost, self._start_step = cost or Cost(), start_step

    def __iter__(self) -> Iterator[Step]:
        """Steps, made ready ahead by a thread that ends when the iterator is closed."""
        ready: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=self._data.prefetch)
        stop = threading.Event()
        thread = threading.Thread(target=self._produce, args=(ready, stop), name="stream-loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _produce(self, ready: queue.Queue[Step | BaseException | None], stop: threading.Event) -> None:
        def put(item: Step | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.05)
                except queue.Full:
                    continue
            raise _Stopped

        readers = ThreadPoolExecutor(self._data.read_threads, thread_name_prefix="stream-loader-read")
        decoder: Decoder | None = None
        try:
            decoder = Decoder.from_settings(self._data, self._geometry)
            reading: deque[_Work] = deque()
            step, steps = self._start_step, self.planner.steps
            while reading or steps is None or step < steps:
                while len(reading) <= self._data.read_ahead and (steps is None or step < steps):
                    reading.append(self._read_step(step, readers))
                    step += 1
                put(self._build(reading.popleft(), decoder))
            put(None)
        except _Stopped:
            pass
        except BaseException as error:  # whatever it is, it belongs to the consumer
            try:
                put(error)
            except _Stopped:
                pass
        finally:
            readers.shutdown(cancel_futures=True)
            if decoder is not None:
                decoder.close()

    # ---- one step ----

    def _read_step(self, step: int, readers: ThreadPoolExecutor) -> _Work:
        """Deals a step's streams and begins to read this rank's samples."""
        plan = self.planner.step(step)
        costs = [self._cost.of(sample.length, sample.pictures) for sample in plan.samples]
        ranks = deal(plan.streams, costs, self._size, self._micro_batch_size * self._batches_multiple)
        mine = [number for stream in ranks[self._rank] for number in stream]
        reading = replace(self._reading, geometry=plan.geometry)
        return _Work(plan, ranks, {number: readers.submit(self._read, plan.samples[number], reading) for number in mine})

    def _read(self, sample: PlannedSample, reading: Reading) -> _Raw | SampleError:
        """Reads and tokenises a sample."""
        dataset = self.planner.blend.sources[sample.source].dataset
        try:
            record = dataset.read_record(sample.index)
            requests = reading.requests(dataset, sample.index, self.planner.seed, sample.epoch)
            room = int(self.planner.room(reading.geometry, sample.pictures))
            tokens = truncate(reading.encode(dataset, sample.index, record), room)
        except SampleError as error:
            return error
        if len(tokens.input_ids) != sample.length:
            raise DatasetError(
                f"{dataset.path}, {dataset.name(sample.index)} has {len(tokens.input_ids)} tokens where the index says "
                f"{sample.length}; build it anew: `{command_of(dataset.path, 'TOKENIZER', reading.how)} --force`"
            )
        return _Raw(tokens, requests, reading.shapes(dataset, sample.index, self.planner.seed, sample.epoch))

    def _build(self, work: _Work, decoder: Decoder) -> Step:
        """This rank's batches of a step."""
        plan, mine = work.plan, work.ranks[self._rank]
        read = {number: future.result() for number, future in work.raw.items()}
        requests = [request for raw in read.values() if isinstance(raw, _Raw) for request in raw.requests]
        decoded = iter(decoder.decode(requests))
        pieces: dict[int, Piece] = {}
        bad: list[BadSample] = []
        account = Account()
        for number, raw in read.items():
            sample = plan.samples[number]
            pixels = [next(decoded) for _ in raw.requests] if isinstance(raw, _Raw) else []
            pieces[number], reason = self._piece(sample, raw, pixels, plan.geometry)
            account.add(sample.source, sample.epoch, [sample.index])
            if reason is not None:
                bad.append(bad_sample(self.planner.blend, sample, reason, number))
        left_out = plan.left_out if self._rank == 0 else []
        for sample, _ in left_out:
            account.add(sample.source, sample.epoch, [sample.index])
        capacity, side = self._data.sequence_length, self._geometry.image_size
        return Step(
            index=plan.index,
            batches=[
                lay_out(
                    [[pieces[number] for number in stream] for stream in mine[at : at + self._micro_batch_size]], capacity, side
                )
                for at in range(0, len(mine), self._micro_batch_size)
            ],
            samples=len(plan.samples),
            real_tokens=sum(sample.length for sample in plan.samples),
            slots=sum(len(rank) for rank in work.ranks) * capacity,
            pictures=sum(sample.pictures for sample in plan.samples),
            visual_tokens=sum(sample.visual for sample in plan.samples),
            sample_lengths=[sample.length for sample in plan.samples],
            bad=bad,
            left_out=[bad_sample(self.planner.blend, sample, reason) for sample, reason in left_out],
            account=account,
        )

    def _piece(
        self, sample: PlannedSample, raw: _Raw | SampleError, pixels: Sequence[np.ndarray | SampleError], geometry: Geometry
    ) -> tuple[Piece, str | None]:
        """A sample as it goes into its stream, and what is wrong with it, if anything is.

        What cannot be read or decoded keeps its planned place, and teaches nothing.
        """
        side = geometry.image_size
        nothing = np.full(sample.length, IGNORE, dtype=np.int64)
        if isinstance(raw, SampleError):
            ids, none = np.full(sample.length, PAD_ID, dtype=np.int64), np.empty((0, 3, side, side), dtype=np.float32)
            return Piece(ids, nothing, nothing[:0], none), raw.reason
        tokens = raw.tokens
        failed = [result.reason for result in pixels if isinstance(result, SampleError)]
        seen = np.zeros((sample.pictures, 3, side, side), dtype=np.float32)
        if not failed and pixels:
            seen = np.concatenate([result.reshape(-1, 3, side, side) for result in pixels if isinstance(result, np.ndarray)])
        if len(seen) != sample.pictures:
            failed = [f"gives {len(seen)} tiles and frames where the index says {sample.pictures}"]
            seen = np.zeros((sample.pictures, 3, side, side), dtype=np.float32)
        labels = nothing if failed else tokens.labels
        positions = positions_of(sample.length, tokens.image_slots, geometry, raw.shapes)
        return Piece(tokens.input_ids, labels, tokens.image_slots, seen, raw.shapes, positions), failed[0] if failed else None


def lay_out(streams: Sequence[Sequence[Piece]], capacity: int, image_size: int) -> Batch:
    """Lays streams of ``capacity`` tokens end to end, each filled with its samples and a padding tail.

    Args:
        streams: the samples of each stream; they fit.
        capacity: tokens of a stream.
        image_size: side of the square pictures, for a batch without any.
    """
    input_ids = np.full(capacity * len(streams), PAD_ID, dtype=np.int64)
    labels = np.full(capacity * len(streams), IGNORE, dtype=np.int64)
    lengths: list[int] = []
    positions: list[np.ndarray] = []
    image_index: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    pictures: list[np.ndarray] = [np.empty((0, 3, image_size, image_size), dtype=np.float32)]
    shapes: list[Shape] = []
    real_tokens = 0
    for place, stream in enumerate(streams):
        at, end = place * capacity, (place + 1) * capacity
        for piece in stream:
            length = len(piece.input_ids_L)
            input_ids[at : at + length] = piece.input_ids_L
            labels[at : at + length] = piece.labels_L
            image_index.append(piece.image_slots_E + at)
            pictures.append(piece.pixels_nCHW)
            shapes += [SINGLE] * len(piece.pixels_nCHW) if piece.shapes is None else piece.shapes
            lengths.append(length)
            positions.append(np.arange(length) if piece.positions_L is None else piece.positions_L)
            real_tokens += length
            at += length
        if at < end:
            lengths.append(end - at)
            positions.append(np.arange(end - at))
    return Batch(
        input_ids_T=torch.from_numpy(input_ids),
        labels_T=torch.from_numpy(labels),
        position_ids_T=torch.from_numpy(np.concatenate(positions)),
        sample_lengths=lengths,
        image_index_E=torch.from_numpy(np.concatenate(image_index)),
        pixel_values_NCHW=torch.from_numpy(np.concatenate(pictures)),
        loss_tokens=int((labels != IGNORE).sum()),
        real_tokens=real_tokens,
        shapes=shapes,
    )


def truncate(tokens: EncodedSample, length: int) -> EncodedSample:
    """Cuts a sample at its end, as LLaVA does.

    Raises:
        SampleError: a picture would be cut.
    """
    if len(tokens.input_ids) <= length:
        return tokens
    if len(tokens.image_slots) and tokens.image_slots[-1] >= length:
        raise SampleError(
            f"its pictures do not fit: the last ends at token {tokens.image_slots[-1] + 1}, but data.sequence_length is {length}"
        )
    labels = tokens.labels[:length].copy()
    labels[-1] = IGNORE  # what it would have predicted is gone
    return EncodedSample(tokens.input_ids[:length], labels, tokens.image_slots)
