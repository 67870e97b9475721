"""Who is in which group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import ranks

from llava_mcore.parallel import groups as process_groups
from llava_mcore.settings.schema import ParallelSettings


def members(parallel: dict[str, Any]) -> dict[str, Any]:
    """On a rank: the global ranks of each of its groups."""
    groups = process_groups.build(ParallelSettings(**parallel), seed=3)
    found: dict[str, Any] = {
        name: dist.get_process_group_ranks(getattr(groups, name)) for name in ("tp", "cp", "pp", "dp", "replica", "encoders")
    }
    found |= {"first": groups.is_first_stage, "last": groups.is_last_stage, "end": groups.last_stage_rank}
    found["drawn"] = float(torch.rand(()))
    process_groups.destroy()
    again = process_groups.build(ParallelSettings())  # another layout in the same processes
    found["again"] = dist.get_process_group_ranks(again.dp)
    return found


@pytest.mark.parametrize(
    ("parallel", "tp", "cp", "pp", "dp"),
    [
        ({}, [[0], [1], [2], [3]], [[0], [1], [2], [3]], [[0], [1], [2], [3]], [[0, 1, 2, 3]] * 4),
        ({"tensor": 2}, [[0, 1], [0, 1], [2, 3], [2, 3]], [[0], [1], [2], [3]], [[0], [1], [2], [3]], [[0, 2], [1, 3]] * 2),
        (
            {"tensor": 2, "pipeline": 2},
            [[0, 1], [0, 1], [2, 3], [2, 3]],
            [[0], [1], [2], [3]],
            [[0, 2], [1, 3]] * 2,
            [[0], [1], [2], [3]],
        ),
        (
            {"context": 2, "pipeline": 2},
            [[0], [1], [2], [3]],
            [[0, 1], [0, 1], [2, 3], [2, 3]],
            [[0, 2], [1, 3]] * 2,
            [[0], [1], [2], [3]],
        ),
    ],
)
def test_members(parallel: dict[str, Any], tp: list, cp: list, pp: list, dp: list) -> None:
    found = ranks(4).run(members, parallel)
    for name, expected in (("tp", tp), ("cp", cp), ("pp", pp), ("dp", dp)):
        assert [rank[name] for rank in found] == expected, name
    for number, rank in enumerate(found):
        assert rank["first"] == (rank["pp"][0] == number) and rank["last"] == (rank["pp"][-1] == number)
        assert rank["end"] == rank["pp"][-1] and rank["again"] == [0, 1, 2, 3]
        # All that work on one stream together: neither in another replica nor left out.
        assert number in rank["replica"] and not set(rank["replica"]) & (set(rank["dp"]) - {number})
        assert len(rank["replica"]) * len(rank["dp"]) == 4
        assert rank["encoders"] == sorted(set(rank["tp"]) | set(rank["cp"]))
    assert len({rank["drawn"] for rank in found}) == 1
