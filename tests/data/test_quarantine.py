from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_mcore.data.errors import DatasetError
from llava_mcore.data.prepare import quarantine
from llava_mcore.data.quarantine import WINDOW, BadBudget, BadSample, QuarantineList, append_version
from llava_mcore.data.shards import ShardDataset


def bad(*places: int) -> list[BadSample]:
    return [BadSample("data", "a.tar", str(place), 0, "broken", place) for place in places]


def test_total() -> None:
    budget = BadBudget(3, 1.0, 100)
    assert budget.add(10, bad(0, 5)) is None and budget.add(10, bad(2)) is None and budget.add(10, []) is None
    assert budget.add(10, bad(1)) == "4 bad samples are more than data.max_bad_samples=3"


def test_in_a_row_over_steps() -> None:
    budget = BadBudget(100, 1.0, 4)
    assert budget.add(5, bad(0, 1, 3, 4)) is None
    assert budget.add(2, bad(0)) is None  # three in a row, then a good one
    assert budget.add(3, bad(1, 2)) is None
    assert budget.add(2, bad(0, 1)) == "4 bad samples in a row reach data.max_bad_in_a_row=4"
    assert BadBudget(100, 1.0, 4).add(5, bad(4, 2, 1, 3)) == "4 bad samples in a row reach data.max_bad_in_a_row=4"


def test_rate_over_a_sliding_window() -> None:
    budget = BadBudget(10**6, 0.01, 100)
    assert budget.add(500, bad(*range(0, 20, 2))) is None  # too few to tell
    assert budget.add(500, bad(3)) == "11 bad samples among the last 1,000 are more than data.max_bad_rate=0.01"
    budget = BadBudget(10**6, 0.01, 10**6)
    for _ in range(20):
        assert budget.add(WINDOW // 10, []) is None
    assert budget.add(WINDOW // 10, bad(*range(0, 1600, 2))) is None
    assert "among the last 100,000" in (budget.add(WINDOW // 10, bad(*range(0, 1000, 2))) or "")


def test_state_goes_on() -> None:
    whole, budget = BadBudget(1000, 0.5, 50), BadBudget(1000, 0.5, 50)
    for step in range(100):
        answer = whole.add(64, bad(*range(step % 5)))
        budget = BadBudget(1000, 0.5, 50, json.loads(json.dumps(budget.state_dict())))
        assert budget.add(64, bad(*range(step % 5))) == answer
    assert budget.state_dict() == whole.state_dict() and len(json.dumps(budget.state_dict())) < 300


def test_a_log_becomes_a_list(dataset: ShardDataset, tmp_path: Path) -> None:
    log, listed = tmp_path / "log.jsonl", tmp_path / "list.json"
    samples = [BadSample(str(dataset.path), dataset.shard(n), dataset.key(n), 0, "broken") for n in (3, 20, 3)]
    log.write_text("".join(sample.line(7) + "\n" for sample in samples))
    assert quarantine(log, listed, 100) == 2 and quarantine(log, listed, 200) == 0
    loaded = QuarantineList(listed)
    assert loaded.at(99) == set() and loaded.at(100) == {(dataset.digest, dataset.shard(n), dataset.key(n)) for n in (3, 20)}
    assert loaded.digest(0) == QuarantineList(None).digest(10**9) != loaded.digest(100) != loaded.digest(200)
    with pytest.raises(DatasetError, match="a new one cannot come before it"):
        append_version(listed, 150, [])
    log.write_text("no JSON")
    with pytest.raises(DatasetError, match="no quarantine log"):
        quarantine(log, listed, 300)
    for text in ("[]", '{"versions": [{"samples": []}]}', '{"versions": [{"from_sample": 0, "samples": [{}]}]}', "{"):
        listed.write_text(text)
        with pytest.raises(DatasetError, match="no quarantine list"):
            QuarantineList(listed)
    listed.write_text('{"versions": [{"from_sample": 5, "samples": []}, {"from_sample": 4, "samples": []}]}')
    with pytest.raises(DatasetError, match="one after the other"):
        QuarantineList(listed)
