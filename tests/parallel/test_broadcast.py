"""One rank reads, all of its replica compute; what goes wrong for one stops all."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import ranks

from llava_mcore.data.errors import DatasetError
from llava_mcore.parallel import groups as process_groups
from llava_mcore.parallel.broadcast import from_first, share_steps
from llava_mcore.platform.copies import ahead
from llava_mcore.settings.schema import ParallelSettings

CPU = torch.device("cpu")


@dataclass
class Batch:
    """What the broadcast knows of a batch."""

    pixel_values_NCHW: torch.Tensor
    name: str


@dataclass
class Step:
    """What it knows of a step."""

    batches: list[Batch]


def steps_of(replica: int, failing: int | None) -> Generator[Step, None, None]:
    """Three steps, two batches each, with other pictures in every one; the second fails in one replica."""
    for number in range(3):
        if number == 1 and replica == failing:
            raise DatasetError(f"replica {replica} has lost its data")
        yield Step(
            [Batch(torch.full((at + number, 3, 2, 2), 100.0 * replica + number), f"{replica}.{number}") for at in range(2)]
        )


def read(parallel: dict[str, Any], failing: int | None, one_ahead: bool = False) -> dict[str, Any]:
    """On a rank: all steps it gets, and how they end."""
    groups = process_groups.build(ParallelSettings(**parallel))
    source = steps_of(groups.dp.rank(), failing) if groups.replica.rank() == 0 else None
    if one_ahead and source is not None:
        source = ahead(source)
    found, error = [], None
    try:
        for step in share_steps(source, groups, CPU):
            found.append([(batch.name, list(batch.pixel_values_NCHW.shape), batch.pixel_values_NCHW) for batch in step.batches])
    except Exception as caught:
        error = type(caught).__name__, str(caught)
    return {"dp": groups.dp.rank(), "first": groups.is_first_stage, "steps": found, "error": error}


# World size, layout, and how many replicas that makes.
LAYOUTS = [
    (2, {"tensor": 2}, 1),
    (2, {"pipeline": 2}, 1),
    (2, {}, 2),
    (2, {"context": 2}, 1),
    (4, {"tensor": 2, "pipeline": 2}, 1),
    (4, {"tensor": 2}, 2),
]


@pytest.mark.parametrize(("size", "parallel", "replicas"), LAYOUTS)
def test_every_rank_gets_its_replicas_steps(size: int, parallel: dict[str, Any], replicas: int) -> None:
    found = ranks(size).run(read, parallel, None)
    assert {rank["dp"] for rank in found} == set(range(replicas))
    for rank in found:
        assert rank["error"] is None and len(rank["steps"]) == 3
        for number, step in enumerate(rank["steps"]):
            for at, (name, shape, pixels) in enumerate(step):
                assert name == f"{rank['dp']}.{number}"
                assert shape == [at + number if rank["first"] else 0, 3, 2, 2]  # pixels go where the tower is
                assert (pixels == 100.0 * rank["dp"] + number).all()


@pytest.mark.parametrize("one_ahead", [False, True])
@pytest.mark.parametrize(("size", "parallel", "replicas"), LAYOUTS)
def test_an_error_of_one_reader_is_every_ranks(size: int, parallel: dict[str, Any], replicas: int, one_ahead: bool) -> None:
    for failing in range(replicas):
        for rank in ranks(size).run(read, parallel, failing, one_ahead):
            assert len(rank["steps"]) == 1
            assert rank["error"] == ("DatasetError", f"replica {failing} has lost its data")


def said_by_first(group: str) -> Any:
    """On a rank: what the first of a group says."""
    groups = process_groups.build(ParallelSettings(pipeline=2))
    return from_first({"rank": dist.get_rank(), "text": "ä"}, getattr(groups, group))


def test_from_first() -> None:
    assert [answer["rank"] for answer in ranks(4).run(said_by_first, "pp")] == [0, 1, 0, 1]
    assert [answer["rank"] for answer in ranks(4).run(said_by_first, "dp")] == [0, 0, 2, 2]
