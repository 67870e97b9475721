from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_mcore.data.account import Account
from llava_mcore.data.conversation import IGNORE, encode_conversation
from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.image import open_rgb, preprocess
from llava_mcore.data.index import build_index
from llava_mcore.data.lengths import build_lengths
from llava_mcore.data.loader import Batch, Step, StreamLoader, truncate
from llava_mcore.data.order import Order
from llava_mcore.data.plan import Planner
from llava_mcore.data.shards import ShardDataset, ShardWriter
from llava_mcore.data.sources import open_blend
from llava_mcore.data.tokenizer import Tokenizer
from llava_mcore.geometry import Geometry
from llava_mcore.settings.schema import DataSettings, VisionSettings

IMAGE_ID = 3
VISION = VisionSettings(image_size=28, patch_size=7, hidden_size=32, ffn_hidden_size=32, num_layers=2, num_attention_heads=2)
EACH = VISION.features_per_image
GEOMETRY = Geometry(28, 4)
DATA = DataSettings(sequence_length=384, packing_window=0, decoder="python")

Sample = Callable[[int, int], tuple[str, dict[str, Any], list[tuple[str, bytes]]]]


def plan(dataset: ShardDataset, tokenizer: Tokenizer, data: DataSettings = DATA, **options: Any) -> Planner:
    arguments: dict[str, Any] = {"seed": 1, "global_batch_size": 16, "total_samples": None} | options
    blend = open_blend(replace(data, path=str(dataset.path)), tokenizer, arguments["seed"], arguments["global_batch_size"])
    return Planner(blend, data, GEOMETRY, **arguments)


def make(dataset: ShardDataset, tokenizer: Tokenizer, data: DataSettings = DATA, **options: Any) -> StreamLoader:
    planned = {name: options.pop(name) for name in ("seed", "global_batch_size", "total_samples") if name in options}
    arguments: dict[str, Any] = {"rank": 0, "size": 1, "micro_batch_size": 1} | options
    return StreamLoader(plan(dataset, tokenizer, data, **planned), tokenizer, data, IMAGE_ID, **arguments)


def write(folder: Path, sp_file: Path, samples: list[tuple[str, dict[str, Any], list[tuple[str, bytes]]]]) -> ShardDataset:
    with ShardWriter(folder) as writer:
        for sample in samples:
            writer.write(*sample)
    build_index(folder)
    build_lengths(folder, sp_file, "vicuna_v1")
    return ShardDataset(folder)


def segments(batch: Batch) -> list[dict[str, Any]]:
    """The real samples of a batch, each with its own tokens and pixels."""
    found, at, picture, embedding = [], 0, 0, 0
    for length in batch.sample_lengths:
        ids = batch.input_ids_T[at : at + length]
        assert batch.position_ids_T[at : at + length].tolist() == list(range(length))
        if ids.any():
            embeddings = int((ids == IMAGE_ID).sum())
            pictures = embeddings // EACH
            slots = batch.image_index_E[embedding : embedding + embeddings] - at
            assert slots.tolist() == torch.nonzero(ids == IMAGE_ID).flatten().tolist()
            pixels = batch.pixel_values_NCHW[picture : picture + pictures]
            found.append({"ids": ids, "labels": batch.labels_T[at : at + length], "pixels": pixels})
            picture, embedding = picture + pictures, embedding + embeddings
        else:  # padding
            assert (batch.labels_T[at : at + length] == IGNORE).all()
        at += length
    assert at == len(batch.input_ids_T)
    assert picture == len(batch.pixel_values_NCHW) and embedding == len(batch.image_index_E)
    return found


def identity(sample: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sample["ids"].tolist()), tuple(sample["labels"].tolist()), sample["pixels"].numpy().tobytes()


def streams(step: Step, capacity: int = DATA.sequence_length) -> list[tuple[Any, ...]]:
    """What each stream of a step holds."""
    found = []
    for batch in step.batches:
        at, stream, samples = 0, [], iter(segments(batch))
        for length in batch.sample_lengths:
            if batch.input_ids_T[at : at + length].any():
                stream.append(identity(next(samples)))
            at += length
            if at % capacity == 0:
                found.append(tuple(stream))
                stream = []
        assert not stream
    return found


def equal(left: Step, right: Step) -> bool:
    def plain(step: Step) -> tuple[Any, ...]:
        counts = (
            step.index,
            step.samples,
            step.real_tokens,
            step.slots,
            step.pictures,
            step.sample_lengths,
            step.bad,
            step.left_out,
        )
        tensors = [
            [value.tolist() if isinstance(value, torch.Tensor) else value for value in vars(batch).values()]
            for batch in step.batches
        ]
        return (*counts, tensors)

    return plain(left) == plain(right)


def test_batches_hold_the_samples_of_the_order(dataset: ShardDataset, tokenizer: Tokenizer) -> None:
    order = Order(dataset.shard_sizes, 1)
    for step in make(dataset, tokenizer, total_samples=48, micro_batch_size=2):
        expected = []
        for position in range(16 * step.index, 16 * step.index + 16):
            raw = dataset.read(int(order.at(np.array([position]))[1][0]))
            sample = encode_conversation(
                raw.record["conversations"],
                tokenizer,
                "vicuna_v1",
                num_images=len(raw.pictures),
                image_tokens_each=EACH,
                image_token_id=IMAGE_ID,
            )
            pixels = [preprocess(open_rgb(data), "pad", 28, DATA.image_mean, DATA.image_std).tobytes() for data in raw.pictures]
            expected.append((tuple(sample.input_ids.tolist()), tuple(sample.labels.tolist()), b"".join(pixels)))
        found = [identity(sample) for batch in step.batches for sample in segments(batch)]
        assert sorted(found) == sorted(expected)
        assert step.samples == 16 and not step.bad
        assert sorted(step.sample_lengths) == sorted(len(sample[0]) for sample in expected)
        assert step.real_tokens == sum(step.sample_lengths) == sum(batch.real_tokens for batch in step.batches)
        assert step.pictures == sum(len(batch.pixel_values_NCHW) for batch in step.batches)
        assert step.slots == sum(len(batch.input_ids_T) for batch in step.batches)
        for batch in step.batches:
            assert len(batch.input_ids_T) == 2 * DATA.sequence_length
            assert batch.loss_tokens == int((batch.labels_T != IGNORE).sum()) > 0
            for tensor in (batch.input_ids_T, batch.labels_T, batch.position_ids_T, batch.image_index_E):
                assert tensor.dtype == torch.int64
            assert batch.pixel_values_NCHW.dtype == torch.float32


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("packing", [True, False])
def test_same_streams_at_any_number_of_ranks(dataset: ShardDataset, tokenizer: Tokenizer, size: int, packing: bool) -> None:
    data = replace(DATA, packing=packing)
    alone = list(make(dataset, tokenizer, data, total_samples=53))
    ranks = [
        list(make(dataset, tokenizer, data, total_samples=53, rank=rank, size=size, micro_batch_size=2)) for rank in range(size)
    ]
    assert [step.samples for step in alone] == [16, 16, 16, 5]
    for number, step in enumerate(alone):
        together = [stream for rank in ranks for stream in streams(rank[number]) if stream]
        assert sorted(together) == sorted(stream for stream in streams(step) if stream)
        assert len({len(rank[number].batches) for rank in ranks}) == 1
        for rank in ranks:
            for name in ("index", "samples", "real_tokens", "pictures", "sample_lengths"):
                assert getattr(rank[number], name) == getattr(step, name)
            assert rank[number].slots == sum(len(batch.input_ids_T) for other in ranks for batch in other[number].batches)
        if not packing:
            assert all(len(stream) == 1 for stream in together)


def test_a_rank_reads_its_own_samples_only(dataset: ShardDataset, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = ShardDataset.read_record
    monkeypatch.setattr(ShardDataset, "read_record", lambda self, index: (read.append(index), original(self, index))[1])
    steps = [list(make(dataset, tokenizer, total_samples=53, global_batch_size=53, rank=rank, size=3)) for rank in range(3)]
    assert sorted(read) == list(range(53))
    assert all(len(rank[0].sample_lengths) == 53 for rank in steps)


def test_bytes_are_read_ahead_of_decoding(dataset: ShardDataset, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    seen: list[list[int]] = []
    original, build = StreamLoader._read_step, StreamLoader._build
    monkeypatch.setattr(StreamLoader, "_read_step", lambda self, step, pool: (read.append(step), original(self, step, pool))[1])
    monkeypatch.setattr(StreamLoader, "_build", lambda self, work, pool: (seen.append([*read]), build(self, work, pool))[1])
    iterator = iter(make(dataset, tokenizer, replace(DATA, read_ahead=3)))
    assert next(iterator).index == 0
    iterator.close()  # type: ignore[attr-defined]
    assert seen[0] == [0, 1, 2, 3]  # the one in the hand of the decoder, and three ahead


@pytest.mark.parametrize("start", [1, 2, 5])
def test_resume_equals_the_uninterrupted_run(dataset: ShardDataset, tokenizer: Tokenizer, start: int) -> None:
    def take(begin: int) -> list[Step]:
        iterator = iter(make(dataset, tokenizer, start_step=begin, rank=1, size=2))
        steps = [next(iterator) for _ in range(8 - begin)]
        iterator.close()  # type: ignore[attr-defined]
        return steps

    whole, resumed = take(0), take(start)
    assert all(equal(left, right) for left, right in zip(whole[start:], resumed, strict=True))
    assert not equal(whole[0], whole[4])  # the second epoch is in another order


def test_every_sample_once_in_an_epoch(dataset: ShardDataset, tokenizer: Tokenizer) -> None:
    first, second = (
        Counter(identity(sample) for batch in step.batches for sample in segments(batch))
        for step in make(dataset, tokenizer, total_samples=106, global_batch_size=53)
    )
    assert first == second and first.total() == 53


def test_without_shuffle_in_the_order_of_the_shards(dataset: ShardDataset, tokenizer: Tokenizer) -> None:
    data = replace(DATA, shuffle=False, packing=False)
    step = next(iter(make(dataset, tokenizer, data, global_batch_size=4)))
    lengths = [
        len(
            encode_conversation(
                dataset.read_record(index)["conversations"],
                tokenizer,
                "vicuna_v1",
                num_images=index % 3,
                image_tokens_each=EACH,
                image_token_id=IMAGE_ID,
            ).input_ids
        )
        for index in range(4)
    ]
    assert step.sample_lengths == lengths


def bad_samples(sample: Sample, picture: Callable[..., bytes]) -> list[tuple[str, dict[str, Any], list[tuple[str, bytes]]]]:
    samples = [sample(number, 1) for number in range(8)]
    samples[1] = ("truncated", samples[1][1], [("png", picture(64, 64)[:-500])])
    samples[2] = ("nothing", {"id": 2}, samples[2][2])
    samples[3] = ("surplus", samples[3][1], samples[3][2] * 2)
    samples[4] = ("lacking", samples[4][1], [])
    samples[5] = ("empty", {"id": 5, "conversations": []}, [])
    turns = [{"from": "human", "value": "<image>" * 30}, {"from": "gpt", "value": "a"}]
    samples[6] = ("crowded", {"id": 6, "conversations": turns}, samples[6][2] * 30)
    return samples


@pytest.mark.parametrize("size", [1, 2, 3])
def test_bad_samples_are_named_once(
    tmp_path: Path, tokenizer: Tokenizer, sp_file: Path, sample: Sample, picture: Callable[..., bytes], size: int
) -> None:
    dataset = write(tmp_path / "shards", sp_file, bad_samples(sample, picture))
    ranks = [list(make(dataset, tokenizer, total_samples=8, global_batch_size=8, rank=rank, size=size)) for rank in range(size)]
    bad = [sample for steps in ranks for step in steps for sample in step.bad]
    left_out = [sample for steps in ranks for step in steps for sample in step.left_out]
    assert [sample.key for sample in bad] == ["truncated"] and "corrupt or truncated" in bad[0].error
    named = {sample.key: sample for sample in left_out}
    assert sorted(sample.key for sample in left_out) == ["crowded", "empty", "lacking", "nothing", "surplus"]
    assert all(str(sample).startswith("shard-00000.tar: ") for sample in [*bad, *left_out])
    for key, reason in [
        ("crowded", "pictures do not fit"),
        ("empty", "empty"),
        ("lacking", "1 `<image>` in the text, but 0 pictures"),
        ("nothing", "no `conversations`"),
        ("surplus", "but 2 pictures"),
    ]:
        assert reason in named[key].error
    counted = Account()
    for steps in ranks:
        counted.merge(steps[0].account)
    assert counted.close(0, 0, Order(dataset.shard_sizes, 1)) is None  # the bad and the left out are accounted for
    for steps in ranks:
        assert steps[0].samples == 3 and steps[0].pictures == 3  # the undecodable one keeps its place
    found = [sample for steps in ranks for batch in steps[0].batches for sample in segments(batch)]
    blank = [sample for sample in found if not sample["pixels"].any()]
    assert len(found) == 3 and len(blank) == 1
    assert (blank[0]["labels"] == IGNORE).all() and (blank[0]["ids"] == IMAGE_ID).sum() == EACH
    others = [sample for sample in found if sample["pixels"].any()]
    assert all((sample["labels"] != IGNORE).any() for sample in others)


@pytest.mark.parametrize("size", [1, 2])
def test_step_without_any_usable_sample(tmp_path: Path, tokenizer: Tokenizer, sp_file: Path, sample: Sample, size: int) -> None:
    dataset = write(tmp_path / "shards", sp_file, [sample(0, 0), *((str(number), {"id": number}, []) for number in range(4))])
    data = replace(DATA, shuffle=False)
    for rank in range(size):
        options = {"rank": rank, "size": size, "micro_batch_size": 2}
        _, step = make(dataset, tokenizer, data, total_samples=2, global_batch_size=1, **options)
        (batch,) = step.batches
        assert step.samples == step.real_tokens == step.pictures == batch.loss_tokens == batch.real_tokens == 0
        assert batch.sample_lengths == [384, 384] and batch.pixel_values_NCHW.shape == (0, 3, 28, 28)
        assert batch.image_index_E.shape == (0,) and not batch.input_ids_T.any() and (batch.labels_T == IGNORE).all()
        assert step.slots == size * 2 * 384 and len(step.left_out) == (1 if rank == 0 else 0)


def test_nothing_usable_at_all(tmp_path: Path, tokenizer: Tokenizer, sp_file: Path) -> None:
    dataset = write(tmp_path / "shards", sp_file, [(str(number), {"id": number}, []) for number in range(4)])
    with pytest.raises(DatasetError, match="no sample of .* can be used .*no `conversations`"):
        plan(dataset, tokenizer)


def test_text_only_batches_have_no_pictures(tmp_path: Path, tokenizer: Tokenizer, sp_file: Path, sample: Sample) -> None:
    dataset = write(tmp_path / "shards", sp_file, [sample(number, 0) for number in range(6)])
    for step in make(dataset, tokenizer, total_samples=6, global_batch_size=6):
        assert step.pictures == 0 and all(len(batch.pixel_values_NCHW) == 0 for batch in step.batches)


def test_long_text_is_cut_at_its_end(tmp_path: Path, tokenizer: Tokenizer, sp_file: Path, sample: Sample) -> None:
    name, record, pictures = sample(0, 1)
    record["conversations"][1]["value"] = "It is a seven. " * 200
    dataset = write(tmp_path / "shards", sp_file, [(name, record, pictures)])
    (step,) = make(dataset, tokenizer, total_samples=1, global_batch_size=1)
    whole = encode_conversation(
        record["conversations"], tokenizer, "vicuna_v1", num_images=1, image_tokens_each=EACH, image_token_id=IMAGE_ID
    )
    batch = step.batches[0]
    assert batch.sample_lengths == [384] and not step.bad
    assert batch.input_ids_T.tolist() == whole.input_ids[:384].tolist()
    assert batch.labels_T.tolist() == [*whole.labels[:383].tolist(), IGNORE]


def test_truncate_at_a_picture(tokenizer: Tokenizer) -> None:
    turns = [{"from": "human", "value": "a <image> b <image> c"}, {"from": "gpt", "value": "d"}]
    tokens = encode_conversation(turns, tokenizer, "vicuna_v1", num_images=2, image_tokens_each=EACH, image_token_id=IMAGE_ID)
    end = int(tokens.image_slots[-1]) + 1
    assert len(truncate(tokens, end).input_ids) == end
    with pytest.raises(SampleError, match=f"ends at token {end}"):
        truncate(tokens, end - 1)
    assert truncate(tokens, len(tokens.input_ids)) is tokens


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("stream-loader")]


def test_closing_leaves_no_thread(dataset: ShardDataset, tokenizer: Tokenizer) -> None:
    iterator = iter(make(dataset, tokenizer))
    next(iterator)
    assert loader_threads()
    iterator.close()  # type: ignore[attr-defined]
    assert not loader_threads()
    for _ in make(dataset, tokenizer):
        break
    gc.collect()
    assert not loader_threads()
    list(make(dataset, tokenizer, total_samples=20))
    assert not loader_threads()


def test_exceptions_surface_in_the_consumer(tmp_path: Path, tokenizer: Tokenizer, sp_file: Path, sample: Sample) -> None:
    dataset = write(tmp_path / "shards", sp_file, [sample(number, 1) for number in range(8)])
    loader = make(dataset, tokenizer, global_batch_size=4)
    (dataset.path / "shard-00000.tar").write_bytes(b"")
    with pytest.raises(DatasetError, match="truncated while in use"):
        next(iter(loader))
    assert not loader_threads()


def test_prefetch_is_bounded(dataset: ShardDataset, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = StreamLoader._build
    monkeypatch.setattr(
        StreamLoader, "_build", lambda self, work, pool: (made.append(work.plan.index), original(self, work, pool))[1]
    )
    iterator = iter(make(dataset, tokenizer, replace(DATA, prefetch=2)))
    assert next(iterator).index == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert made == [0, 1, 2, 3]  # one given, two in the queue, one in the hand
    iterator.close()  # type: ignore[attr-defined]


def test_rank_outside_of_size(dataset: ShardDataset, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="rank 2"):
        make(dataset, tokenizer, rank=2, size=2)
