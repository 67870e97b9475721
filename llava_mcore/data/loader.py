"""The loader: what every data-parallel rank computes on, step by step.

A step is ``global_batch_size`` samples at consecutive positions of the order. Every rank reads their text, packs them and deals
the streams, all as a function of settings and position; then it decodes the pictures of its own streams only. So the samples of a
step, and which of them share a stream, are the same for any number of ranks, and a position is all there is to save.

Shape suffixes: T tokens of a micro-batch, E its image embeddings, N its pictures, C H W a picture.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_mcore.data.conversation import IGNORE, EncodedSample, encode_conversation
from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.image import open_rgb, preprocess
from llava_mcore.data.order import sample_at
from llava_mcore.data.packing import Stream, deal, pack
from llava_mcore.data.shards import ShardDataset
from llava_mcore.data.tokenizer import Tokenizer
from llava_mcore.settings.schema import DataSettings, VisionSettings

STATE_VERSION = 1
PAD_ID = 0


@dataclass
class Batch:
    """One micro-batch: ``micro_batch_size`` streams laid end to end."""

    input_ids_T: Tensor  # int64; image_token_id at every image embedding; 0 in the padding
    labels_T: Tensor  # int64, pre-shifted, -100 where nothing is predicted
    position_ids_T: Tensor  # int64, from 0 in each sample and in each stream's padding tail
    sample_lengths: list[int]  # sums to T; a stream's padding tail is a segment of its own, no sample crosses streams
    image_index_E: Tensor  # int64, where in T each image embedding goes, picture after picture
    pixel_values_NCHW: Tensor  # float32
    loss_tokens: int  # labels that are not -100
    real_tokens: int  # tokens that are not padding

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
    pictures: int
    sample_lengths: list[int]  # real samples of all ranks, without padding
    bad: list[str] = field(default_factory=list)  # samples that this rank reports; over all ranks each one is reported once


@dataclass
class _Planned:
    """A sample of a step, tokenised but not decoded."""

    index: int
    tokens: EncodedSample
    pictures: int


class _Stopped(Exception):
    """The consumer has gone."""


class StreamLoader:
    """Endless (or ``total_samples`` long) sequence of steps for one data-parallel rank.

    Args:
        dataset: where samples come from.
        tokenizer: makes ids.
        data: template, picture mode, stream length, packing, shuffling, threads.
        vision: size of pictures.
        image_token_id: id written at every image embedding.
        embeddings_at: a step, from 0, to the embeddings each of its pictures becomes.
        rank: data-parallel rank.
        size: data-parallel size.
        seed: of the order.
        global_batch_size: samples of a step, over all ranks.
        micro_batch_size: streams of a batch.
        batches_multiple: each rank gets a multiple of this number of batches.
        total_samples: samples of the whole run, from step 0; the last step may be short. None: endless.
        start_step: first step to give.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        tokenizer: Tokenizer,
        data: DataSettings,
        vision: VisionSettings,
        image_token_id: int,
        *,
        embeddings_at: Callable[[int], int],
        rank: int,
        size: int,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        batches_multiple: int = 1,
        total_samples: int | None = None,
        start_step: int = 0,
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is outside of 0..{size - 1}")
        self._dataset, self._tokenizer, self._data, self._vision = dataset, tokenizer, data, vision
        self._image_token_id, self._embeddings_at = image_token_id, embeddings_at
        self._rank, self._size, self._seed = rank, size, seed
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._batches_multiple = batches_multiple
        self._total_samples, self._start_step = total_samples, start_step

    # ---- position ----

    def state_dict(self, step: int) -> dict[str, Any]:
        """The position after ``step`` finished steps, and what it was counted in."""
        return {
            "version": STATE_VERSION,
            "step": step,
            "dataset": self._dataset.digest,
            "num_samples": len(self._dataset),
            "seed": self._seed,
            "shuffle": self._data.shuffle,
            "global_batch_size": self._global_batch_size,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuses a position that was counted in other data or another order.

        Raises:
            DatasetError: names everything that differs.
        """
        now = self.state_dict(0)
        names = {
            "version": "format of the data position",
            "dataset": "index of the shards (digest)",
            "num_samples": "samples in the dataset",
            "seed": "train.seed",
            "shuffle": "data.shuffle",
            "global_batch_size": "train.global_batch_size",
        }
        differing = [
            f"{what}: {state.get(name)!r} in the checkpoint, {now[name]!r} now"
            for name, what in names.items()
            if state.get(name) != now[name]
        ]
        if differing:
            raise DatasetError(
                "the data position of the checkpoint does not fit: "
                + "; ".join(differing)
                + ". Set them back, or start a new run from its weights with train.init_from and another train.output_dir"
            )

    # ---- iteration ----

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

        pool = ThreadPoolExecutor(self._data.decode_threads, thread_name_prefix="stream-loader")
        try:
            step = self._start_step
            while self._total_samples is None or step * self._global_batch_size < self._total_samples:
                put(self._step(step, pool))
                step += 1
            put(None)
        except _Stopped:
            pass
        except BaseException as error:  # whatever it is, it belongs to the consumer
            try:
                put(error)
            except _Stopped:
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    # ---- one step ----

    def _step(self, step: int, pool: Executor) -> Step:
        """Plans a step as every rank does, then builds this rank's batches."""
        samples, bad = self._plan(step, pool)
        lengths = [len(sample.tokens.input_ids) for sample in samples]
        capacity = self._data.sequence_length
        streams = pack(lengths, capacity) if self._data.packing else [[number] for number in range(len(samples))]
        ranks = deal(streams, lengths, self._size, self._micro_batch_size * self._batches_multiple)
        mine = ranks[self._rank]
        decoded, failed = self._decode([samples[number] for stream in mine for number in stream], pool)
        batches = [
            self._batch(mine[first : first + self._micro_batch_size], samples, decoded)
            for first in range(0, len(mine), self._micro_batch_size)
        ]
        return Step(
            index=step,
            batches=batches,
            samples=len(samples),
            real_tokens=sum(lengths),
            slots=sum(len(rank) for rank in ranks) * capacity,
            pictures=sum(sample.pictures for sample in samples),
            sample_lengths=lengths,
            bad=(bad if self._rank == 0 else []) + failed,
        )

    def _plan(self, step: int, pool: Executor) -> tuple[list[_Planned], list[str]]:
        """The usable samples of a step, tokenised, and the names of the others. The same on every rank."""
        first = step * self._global_batch_size
        last = first + self._global_batch_size
        if self._total_samples is not None:
            last = min(last, self._total_samples)
        _, indices = sample_at(np.arange(first, last), len(self._dataset), self._seed, self._data.shuffle)
        planned, bad = [], []
        for sample in pool.map(partial(self._tokenize, each=self._embeddings_at(step)), indices.tolist()):
            if isinstance(sample, _Planned):
                planned.append(sample)
            else:
                bad.append(sample)
        return planned, bad

    def _tokenize(self, index: int, each: int) -> _Planned | str:
        """One sample's tokens, or why there are none."""
        pictures = self._dataset.num_pictures(index)
        try:
            tokens = encode_conversation(
                self._dataset.read_record(index).get("conversations"),
                self._tokenizer,
                self._data.template,
                num_images=pictures,
                image_tokens_each=each,
                image_token_id=self._image_token_id,
            )
            return _Planned(index, truncate(tokens, self._data.sequence_length), pictures)
        except SampleError as error:
            return f"{self._dataset.name(index)}: {error.reason}"

    def _decode(self, samples: Sequence[_Planned], pool: Executor) -> tuple[dict[int, np.ndarray | None], list[str]]:
        """Pixels of every sample that has pictures, None where they cannot be had, and the names of those."""
        # A short last epoch or a tiny dataset may hold a sample twice in one step; it is decoded once.
        wanted = list(dict.fromkeys(sample.index for sample in samples if sample.pictures))
        pixels: dict[int, np.ndarray | None] = {}
        reasons: dict[int, str] = {}
        for index, result in zip(wanted, pool.map(self._pixels, wanted), strict=True):
            pixels[index] = result if isinstance(result, np.ndarray) else None
            if not isinstance(result, np.ndarray):
                reasons[index] = result
        failed = [f"{self._dataset.name(s.index)}: {reasons[s.index]}" for s in samples if s.index in reasons]
        return pixels, failed

    def _pixels(self, index: int) -> np.ndarray | str:
        """One sample's pictures [n, 3, S, S], or why there are none."""
        try:
            return read_pixels(self._dataset, index, self._data, self._vision.image_size)
        except SampleError as error:
            return error.reason

    def _batch(self, streams: Sequence[Stream], samples: Sequence[_Planned], pixels: dict[int, np.ndarray | None]) -> Batch:
        """One micro-batch of planned samples."""
        side = self._vision.image_size

        def piece(sample: _Planned) -> Piece:
            tokens, seen = sample.tokens, pixels.get(sample.index)
            if not sample.pictures:
                seen = np.empty((0, 3, side, side), dtype=np.float32)
            if seen is not None:
                return Piece(tokens.input_ids, tokens.labels, tokens.image_slots, seen)
            # What cannot be decoded keeps its planned place, and teaches nothing.
            blank = np.zeros((sample.pictures, 3, side, side), dtype=np.float32)
            return Piece(tokens.input_ids, np.full_like(tokens.labels, IGNORE), tokens.image_slots, blank)

        return lay_out([[piece(samples[number]) for number in stream] for stream in streams], self._data.sequence_length, side)


@dataclass(frozen=True)
class Piece:
    """One sample ready to be laid into a stream: L tokens, E image embeddings, n pictures."""

    input_ids_L: np.ndarray  # int64
    labels_L: np.ndarray  # int64, pre-shifted
    image_slots_E: np.ndarray  # int64, from the start of the sample
    pixels_nCHW: np.ndarray  # float32


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
    image_index: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    pictures: list[np.ndarray] = [np.empty((0, 3, image_size, image_size), dtype=np.float32)]
    real_tokens = 0
    for place, stream in enumerate(streams):
        at, end = place * capacity, (place + 1) * capacity
        for piece in stream:
            length = len(piece.input_ids_L)
            input_ids[at : at + length] = piece.input_ids_L
            labels[at : at + length] = piece.labels_L
            image_index.append(piece.image_slots_E + at)
            pictures.append(piece.pixels_nCHW)
            lengths.append(length)
            real_tokens += length
            at += length
        if at < end:
            lengths.append(end - at)
    return Batch(
        input_ids_T=torch.from_numpy(input_ids),
        labels_T=torch.from_numpy(labels),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])),
        sample_lengths=lengths,
        image_index_E=torch.from_numpy(np.concatenate(image_index)),
        pixel_values_NCHW=torch.from_numpy(np.concatenate(pictures)),
        loss_tokens=int((labels != IGNORE).sum()),
        real_tokens=real_tokens,
    )


def read_pixels(dataset: ShardDataset, index: int, data: DataSettings, image_size: int) -> np.ndarray:
    """A sample's pictures as the model sees them, float32 [n, 3, image_size, image_size].

    Raises:
        SampleError: one of them cannot be decoded.
    """
    pictures = [
        preprocess(open_rgb(picture), data.image_mode, image_size, data.image_mean, data.image_std)
        for picture in dataset.read_pictures(index)
    ]
    return np.stack(pictures) if pictures else np.empty((0, 3, image_size, image_size), dtype=np.float32)


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
