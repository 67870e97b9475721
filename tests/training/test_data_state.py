"""A run that is killed again and again, and goes on with other numbers of processes, trains every sample of an epoch once."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import runs
import test_resume
from runs import Material

from llava_mcore.training import checkpoint_folder
from llava_mcore.training.data_state import QUARANTINE_LOG
from llava_mcore.training.observe import read_metrics

SEED = 20


def saved(run: Path) -> int:
    """Steps of the newest checkpoint."""
    newest = checkpoint_folder.newest(run)
    return 0 if newest is None else checkpoint_folder.read_meta(newest)["step"]


def test_killed_at_random_instants_with_changing_ranks(runs_material: Material, tmp_path: Path) -> None:
    """40 samples in steps of 4, epoch after epoch; the trainer compares each epoch's digest with the dataset's."""
    chance = random.Random(SEED)
    settings = runs_material.settings(
        tmp_path / "run",
        train={"steps": 22, "global_batch_size": 4, "save_every": 1},
        data={"packing_window": 20, "sequence_length": 448},
    )
    log = tmp_path / "config" / "log"
    reached = 0
    for processes in (2, 3):
        process = test_resume.start(settings, tmp_path / "config", processes)
        deadline = time.monotonic() + 120
        try:
            while saved(tmp_path / "run") < reached + 4:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.01)
            time.sleep(chance.random())
        finally:
            test_resume.kill(process)
        reached = saved(tmp_path / "run")
    process = test_resume.start(settings, tmp_path / "config", 1)
    assert process.wait(120) == 0, log.read_text()[-3000:]
    text = log.read_text()
    for epoch in (1, 2):
        assert f"epoch {epoch} of {runs_material.shards}: 40 samples, every one once" in text
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics] == list(range(1, 23))
    assert sum(line["samples"] for line in metrics[:20]) == 80 and len({line["samples"] for line in metrics}) > 1
    assert all(0 <= line["data_wait"] <= 1 for line in metrics)
    state = checkpoint_folder.read_meta(checkpoint_folder.newest(tmp_path / "run") or "")["data_position"]
    assert state["account"].keys() == {"0:2"} and len(json.dumps(state)) < 600
    # The same numbers as one process that nobody disturbed.
    whole = runs.train("1", runs.changed(settings, train={"output_dir": str(tmp_path / "whole"), "save_every": 0}))
    assert [line["loss"] for line in metrics] == runs.pytest.approx(whole.losses, rel=runs.TOLERANCE)


def test_a_lost_sample_stops_the_run(runs_material: Material, tmp_path: Path) -> None:
    """The account is of what was trained on: a loader that drops one sample is found out at the end of the epoch."""
    settings = runs_material.settings(tmp_path / "run", train={"steps": 5, "global_batch_size": 10}, data={"packing_window": 0})
    answers = runs.ranks(1).run(fit_without_one, settings)
    kind, message = answers[0]
    assert kind == "DataError"
    assert f"epoch 1 of {runs_material.shards} does not hold every sample once: 39 samples were seen where" in message
    assert not (tmp_path / "run" / QUARANTINE_LOG).exists()


def fit_without_one(settings: runs.Settings) -> tuple[str, str]:
    """On a rank: a run whose loader loses a sample of the second step."""
    from llava_mcore.training.trainer import Trainer

    def fit(own: runs.Settings) -> None:
        trainer = Trainer(own)
        original = trainer.planner.step

        def lossy(number: int):  # type: ignore[no-untyped-def]
            plan = original(number)
            if number == 1:
                plan.streams[0].pop()
            return plan

        trainer.planner.step = lossy  # type: ignore[method-assign]
        trainer.fit()

    return runs.refused(settings, fit)
