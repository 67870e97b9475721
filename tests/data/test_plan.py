"""The plan of a run: made of the index, the same for any number of ranks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_mcore.data.account import Account
from llava_mcore.data.errors import DatasetError
from llava_mcore.data.index import build_index
from llava_mcore.data.lengths import Lengths, build_lengths
from llava_mcore.data.mixture import ByEpochs
from llava_mcore.data.order import Order
from llava_mcore.data.packing import Cost, deal
from llava_mcore.data.plan import Planner, StepPlan
from llava_mcore.data.position import Position
from llava_mcore.data.shards import ShardDataset, ShardWriter
from llava_mcore.data.sources import Blend, Source, open_blend
from llava_mcore.data.tokenizer import Tokenizer
from llava_mcore.geometry import Geometry
from llava_mcore.settings.schema import DataSettings, SourceSettings

DATA = DataSettings(sequence_length=384, packing_window=48)


def planner(dataset: ShardDataset, tokenizer: Tokenizer, data: DataSettings = DATA, **options: Any) -> Planner:
    arguments: dict[str, Any] = {"seed": 1, "global_batch_size": 16, "total_samples": None} | options
    if not (data.mixture or data.mixture_file):
        data = replace(data, path=str(dataset.path))
    return Planner(
        open_blend(data, tokenizer, arguments["seed"], arguments["global_batch_size"]), data, Geometry(28, 4), **arguments
    )


def identities(step: StepPlan) -> list[tuple[int, int, int]]:
    return [(sample.source, sample.epoch, sample.index) for sample in step.samples]


def in_streams(step: StepPlan) -> list[list[tuple[int, int, int]]]:
    return [[identities(step)[number] for number in stream] for stream in step.streams]


@given(st.integers(0, 60), st.integers(1, 40), st.integers(1, 130), st.integers(1, 5), st.integers(0, 5), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_sample_once_whatever_the_window(
    dataset: ShardDataset, tokenizer: Tokenizer, window: int, batch: int, total: int, multiple: int, seed: int, packing: bool
) -> None:
    data = replace(DATA, packing_window=window, streams_multiple=multiple, packing=packing)
    plans = planner(dataset, tokenizer, data, global_batch_size=batch, total_samples=total, seed=seed)
    assert plans.steps == -(-total // batch)
    steps = [plans.step(number) for number in range(plans.steps)]
    seen = Counter(sample for step in steps for sample in identities(step))
    order = Order(dataset.shard_sizes, seed)
    epochs, indices = order.at(np.arange(total))
    assert seen == Counter(zip([0] * total, epochs.tolist(), indices.tolist(), strict=True))
    for step in steps:
        assert sorted(number for stream in step.streams for number in stream) == list(range(len(step.samples)))
        assert all(0 < sum(step.samples[number].length for number in stream) <= 384 for stream in step.streams)
        assert packing or all(len(stream) == 1 for stream in step.streams)
        assert step.streams, "a step without work"
    if plans.window_steps == 1:
        assert [len(step.samples) for step in steps] == [min(batch, total - step.index * batch) for step in steps]
    backwards = [
        planner(dataset, tokenizer, data, global_batch_size=batch, total_samples=total, seed=seed).step(n)
        for n in (len(steps) - 1, 0)
    ]
    assert [in_streams(step) for step in backwards] == [in_streams(steps[-1]), in_streams(steps[0])]


def made_up(lengths: np.ndarray, dataset: ShardDataset) -> Blend:
    """An order over samples of given lengths without media; every sample is told from the index alone, so none need exist."""

    class Index:
        digest, path = "made up", dataset.path
        columns = {"sample_component": np.zeros(len(lengths) + 1, dtype=np.int64), "component_kind": np.zeros(0, dtype=np.uint8)}

    both = np.stack([lengths, np.zeros_like(lengths)], axis=1).astype(np.int32)
    source = Source(Index(), Lengths(both, {}, "made up"), Order([len(lengths) // 100] * 100, 0))  # type: ignore[arg-type]
    return Blend([source], ByEpochs([1]), len(lengths), None)


@pytest.mark.parametrize(("capacity", "limit"), [(4096, 0.02), (8192, 0.003)])
def test_waste_and_balance(dataset: ShardDataset, capacity: int, limit: float) -> None:
    """On a mix of captions, pictures, tiles, video and text as a real run has it (see benchmarks/data.py)."""
    random = np.random.default_rng(0)
    kind = random.choice(5, 20_000, p=[0.45, 0.15, 0.20, 0.12, 0.08])
    lengths = np.choose(
        kind,
        [
            576 + random.lognormal(np.log(220), 0.75, len(kind)),
            576 * random.integers(3, 6, len(kind)) + random.lognormal(np.log(180), 0.75, len(kind)),
            np.maximum(1, random.lognormal(np.log(380), 1.0, len(kind))),
            144 * random.choice([8, 16, 32], len(kind), p=[0.5, 0.3, 0.2]) + 150,
            611,
        ],
    ).astype(np.int64)
    data = DataSettings(sequence_length=capacity)
    plans = Planner(
        made_up(lengths, dataset), data, Geometry(28, 4), seed=1, global_batch_size=512, total_samples=len(lengths) // 4096 * 4096
    )
    assert plans.steps is not None
    steps = [plans.step(number) for number in range(plans.steps)]
    tokens = sum(sample.length for step in steps for sample in step.samples)
    assert 1 - tokens / (capacity * sum(len(step.streams) for step in steps)) < limit
    assert np.mean([len(step.samples) for step in steps]) == 512
    ratios = []
    for step in steps:
        costs = [Cost().of(sample.length, sample.pictures) for sample in step.samples]
        loads = [sum(costs[number] for stream in rank for number in stream) for rank in deal(step.streams, costs, 8, 1)]
        ratios.append(max(loads) * 8 / sum(loads))
    assert np.mean(ratios) < 1.02


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 6, 8, 12]), st.integers(1, 4)), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_global_batches_through_any_resizes(
    dataset: ShardDataset, tokenizer: Tokenizer, parts: list[tuple[int, int]]
) -> None:
    """Kills lose what was not saved; what is trained in the end is every sample of every epoch once, at any sizes."""
    alone = planner(dataset, tokenizer)
    step, account = 0, Account()
    for size, steps in parts:
        plans = planner(dataset, tokenizer)  # a new process
        position = Position(plans, DATA, 1, 16)
        position.check(json.loads(json.dumps(Position(alone, DATA, 1, 16).state_dict(step))))
        for number in range(step, step + steps + 1):  # one more step than is saved
            plan = plans.step(number)
            ranks = deal(plan.streams, [1.0] * len(plan.samples), size, 1)
            dealt = sorted([identities(plan)[n] for n in stream] for rank in ranks for stream in rank if stream)
            assert dealt == sorted(in_streams(alone.step(number)))
            if number == step + steps:
                break
            for rank in ranks:
                own = Account()
                for n in (n for stream in rank for n in stream):
                    own.add(plan.samples[n].source, plan.samples[n].epoch, [plan.samples[n].index])
                account.merge(own)
            for source, epoch in plans.epochs_over(number):
                assert account.close(source, epoch, plans.blend.sources[source].order) is None
        step += steps
        account = Account(json.loads(json.dumps(account.state_dict())))


def test_an_account_sees_what_is_wrong() -> None:
    order = Order([10, 20, 5], 0)
    samples = list(range(35))
    for wrong in (samples[1:], [*samples, 3], [*samples[1:], 5], [35, *samples[1:]], [*samples, 0, 0]):
        account = Account()
        account.add(0, 0, wrong)
        assert account.close(0, 0, order) is not None
    account = Account()
    account.add(0, 0, samples[20:])
    account.add(0, 1, samples[:3])
    account.add(0, 0, samples[:20])
    assert account.close(0, 0, order) is None and list(account.state_dict()) == ["0:1"]


def test_state_is_small_and_refused_where_it_does_not_fit(dataset: ShardDataset, tokenizer: Tokenizer) -> None:
    def position(data: DataSettings = DATA, **options: Any) -> Position:
        plans = planner(dataset, tokenizer, data, **options)
        return Position(plans, data, options.get("seed", 1), options.get("global_batch_size", 16))

    state = position().state_dict(10_000_000)
    assert len(json.dumps(state)) < 350
    position().check(state)
    for data, options, name in [
        (DATA, {"seed": 2}, "train.seed: 1 in the checkpoint, 2 now"),
        (DATA, {"global_batch_size": 8}, "train.global_batch_size"),
        (replace(DATA, shuffle=False), {}, "data.shuffle"),
        (replace(DATA, packing_window=0), {}, "packing_window"),
        (replace(DATA, sequence_length=383), {}, "data.sequence_length"),
        (replace(DATA, video_frames=9), {}, "data.video_frames"),
        (replace(DATA, mixture=[SourceSettings(path=str(dataset.path), sampling_strategy="first:20")]), {}, "mixture"),
        (replace(DATA, template="plain"), {}, "has no text lengths for this tokenizer and template plain"),
    ]:
        with pytest.raises(DatasetError, match=name):
            position(data, **options).check(state)
    with pytest.raises(DatasetError, match="format of the data position"):
        position().check({})


def test_a_quarantine_list_comes_into_force_at_its_place(dataset: ShardDataset, tokenizer: Tokenizer, tmp_path: Path) -> None:
    listed = tmp_path / "list.json"
    samples = [{"dataset": dataset.digest, "shard": dataset.shard(n), "key": dataset.key(n)} for n in (3, 20)]
    listed.write_text(json.dumps({"versions": [{"from_sample": 48, "samples": samples}]}))
    data = replace(DATA, quarantine=str(listed))
    plain, with_list = planner(dataset, tokenizer), planner(dataset, tokenizer, data)
    assert [in_streams(plain.step(n)) for n in range(3)] == [in_streams(with_list.step(n)) for n in range(3)]
    later = [with_list.step(number) for number in range(3, 12)]
    assert not {3, 20} & {sample.index for step in later for sample in step.samples}
    left_out = Counter(sample.index for step in later for sample, reason in step.left_out if "quarantine" in reason)
    assert set(left_out) == {3, 20}
    before = Position(plain, DATA, 1, 16).state_dict(2)
    Position(with_list, data, 1, 16).check(before)  # not in force yet: a run may take it up
    with pytest.raises(DatasetError, match="data.quarantine up to here"):
        Position(with_list, data, 1, 16).check(Position(plain, DATA, 1, 16).state_dict(4))
    listed.write_text("{}")
    with pytest.raises(DatasetError, match="no quarantine list"):
        planner(dataset, tokenizer, data)


# ---- mixtures ----


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, sp_file: Path, sample: Callable[..., Any]) -> ShardDataset:
    folder = tmp_path_factory.mktemp("second")
    with ShardWriter(folder, 4) as writer:
        for number in range(12):
            writer.write(*sample(number, 0))
    build_index(folder)
    build_lengths(folder, sp_file, "vicuna_v1")
    return ShardDataset(folder)


def drawn(plans: Planner, steps: int) -> list[Counter[int]]:
    """Samples of each dataset in each of some steps."""
    return [Counter(sample.source for sample in plans.step(number).samples) for number in range(steps)]


def test_exact_epochs(dataset: ShardDataset, second: ShardDataset, tokenizer: Tokenizer) -> None:
    data = replace(
        DATA,
        packing_window=0,
        mixture=[SourceSettings(path=str(dataset.path)), SourceSettings(path=str(second.path), epochs=2.5)],
    )
    plans = planner(dataset, tokenizer, data)
    assert plans.blend.epoch_samples == 53 + 30
    plans = planner(dataset, tokenizer, data, global_batch_size=83, total_samples=83)
    seen = Counter(identities(plans.step(0)))
    assert all(seen[0, 0, index] == 1 for index in range(53))
    assert all(seen[1, epoch, index] == 1 for epoch in (0, 1) for index in range(12))
    assert sum(seen.values()) == 83 and sum(seen[1, 2, index] for index in range(12)) == 6


def test_weights_and_their_schedule(dataset: ShardDataset, second: ShardDataset, tokenizer: Tokenizer) -> None:
    sources = [SourceSettings(path=str(dataset.path), weight=3), SourceSettings(path=str(second.path), weight={0: 1, 4: 5})]
    plans = planner(dataset, tokenizer, replace(DATA, packing_window=0, mixture=sources))
    assert drawn(plans, 8) == [Counter({0: 12, 1: 4})] * 4 + [Counter({0: 6, 1: 10})] * 4
    with pytest.raises(DatasetError, match="what holds from step 0 on"):
        planner(dataset, tokenizer, replace(DATA, mixture=[sources[0], replace(sources[1], weight={4: 5})]))


def test_a_mixture_file(dataset: ShardDataset, second: ShardDataset, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(f"datasets:\n- path: {dataset.path}\n  sampling_strategy: first:10%\n- path: {second.path}\n")
    plans = planner(dataset, tokenizer, replace(DATA, mixture_file=str(file)))
    assert plans.blend.epoch_samples == 6 + 12
    for text in ("datasets: []", "nothing", "datasets: [{paht: x}]", "{", "datasets: [{path: a, weight: 1}, {path: b}]"):
        file.write_text(text)
        with pytest.raises(DatasetError, match="data.mixture_file=.*no mixture"):
            planner(dataset, tokenizer, replace(DATA, mixture_file=str(file)))
    with pytest.raises(DatasetError, match="data.path is not set"):
        open_blend(DataSettings(), tokenizer, 0, 1)
    with pytest.raises(DatasetError, match="'firts:3' is no sampling strategy"):
        bad = SourceSettings(path=str(dataset.path), sampling_strategy="firts:3")
        planner(dataset, tokenizer, replace(DATA, mixture=[bad]))
