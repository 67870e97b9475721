"""A run that was stopped, or killed, and started again is the run that was not."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import runs
from runs import KeptRuns, Material

from llava_mcore.settings.compose import dump_yaml
from llava_mcore.settings.schema import Settings
from llava_mcore.training import checkpoint_folder
from llava_mcore.training.observe import read_metrics

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("layout", ["1", "TP2", "PP2", "CP2", "DP2+overlap"])
def test_bit_identical_at_the_same_layout(kept: KeptRuns, tmp_path: Path, layout: str) -> None:
    whole = kept.whole(layout)
    assert len(whole.losses) == len(set(whole.losses)) == runs.STEPS
    runs.assert_same(runs.train(layout, kept.stopped(tmp_path / "run", layout)), whole)


@pytest.mark.parametrize("layout", ["TP2", "DP2"])
def test_bit_identical_in_bfloat16(kept: KeptRuns, tmp_path: Path, layout: str) -> None:
    whole = kept.whole(layout, "bfloat16")
    runs.assert_same(runs.train(layout, kept.stopped(tmp_path / "run", layout, "bfloat16")), whole)


@pytest.mark.parametrize(("first", "then"), [("EP2", "TP2"), ("1", "EP2")])
def test_experts_at_another_layout(runs_material: Material, tmp_path: Path, first: str, then: str) -> None:
    """Weights and the optimizer's state of experts go to ranks that hold others of them."""
    model = {"language": {**runs.MODEL["language"], "family": "mixtral", "num_experts": 4}}  # type: ignore[dict-item]
    whole = runs.train("1", runs_material.settings(tmp_path / "whole", model=model))
    head = runs_material.settings(tmp_path / "run", model=model, train={"stop_after": runs.STEPS // 2})
    assert len(runs.train(first, head).losses) == runs.STEPS // 2
    runs.assert_close(runs.train(then, runs_material.settings(tmp_path / "run", model=model)), whole)


@pytest.mark.parametrize(("first", "then"), [("TP2", "PP2"), ("DP2+overlap", "1"), ("1", "TP2xPP2"), ("PP2", "CP2")])
def test_at_another_layout(kept: KeptRuns, tmp_path: Path, first: str, then: str) -> None:
    resumed = runs.train(then, kept.stopped(tmp_path / "run", first))
    assert len(resumed.losses) == runs.STEPS
    runs.assert_close(resumed, kept.whole("1"))


def start(settings: Settings, folder: Path, processes: int = 2) -> subprocess.Popen[bytes]:
    """The command a user types."""
    (folder / "experiment").mkdir(parents=True, exist_ok=True)
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\n" + dump_yaml(settings))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launch, "-m", "llava_mcore.train"]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--config-dir", str(folder), "experiment=mine"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the launcher and all below it: ranks, and the writers of a checkpoint."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for act in ("suspend", "kill"):  # suspended first, so that none sees another die
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):  # a writer of a checkpoint that has just ended by itself
                getattr(member, act)()
    psutil.wait_procs(family)
    process.wait()


def test_killed_during_a_save(kept: KeptRuns, runs_material: Material, tmp_path: Path) -> None:
    whole = kept.whole("DP2")
    settings = runs_material.settings(tmp_path / "killed", train={"save_every": 1, "keep_checkpoints": 3})
    checkpoints = tmp_path / "killed" / checkpoint_folder.CHECKPOINTS

    process = start(settings, tmp_path / "config")
    deadline = time.monotonic() + 120
    try:
        # Past the first checkpoints, and while one is being written.
        while not ((checkpoints / "step_00000002").exists() and list(checkpoints.glob(".step_*.partial"))):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "config" / "log").read_text()[-3000:]
            time.sleep(0.001)
    finally:
        kill(process)
    for path in checkpoints.glob("step_*"):
        checkpoint_folder.require_checkpoint(path)
    saved = checkpoint_folder.read_meta(checkpoint_folder.newest(tmp_path / "killed") or "")["step"]
    assert 2 <= saved < runs.STEPS

    process = start(settings, tmp_path / "config")
    assert process.wait(120) == 0, (tmp_path / "config" / "log").read_text()[-3000:]
    assert f"step_{saved:08d}, step {saved}" in (tmp_path / "config" / "log").read_text()
    metrics = read_metrics(tmp_path / "killed")
    assert [line["loss"] for line in metrics] == whole.losses
    assert [line["grad_norm"] for line in metrics] == whole.grad_norms
    assert not list(checkpoints.glob(".step_*")) and len(list(checkpoints.glob("step_*"))) == 3
