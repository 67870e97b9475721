"""One rank fails in a step: the others stop with its words, whether they notice by themselves or wait for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import Material

ROOT = Path(__file__).resolve().parents[2]

# What goes wrong comes from outside the library: rank 1 cannot do its second step. Without a launcher that would end the others,
# as on another machine.
RUN = """
import os, sys, threading
from llava_mcore import train
from llava_mcore.training.trainer import Trainer

step, others = Trainer.train_step, sys.argv.pop(1)

def broken(self, batches):
    if self.step == 1 and os.environ["RANK"] == "1":
        raise OSError("the second step is too much")
    if self.step == 1 and others == "wait for ever":
        threading.Event().wait()
    return step(self, batches)

Trainer.train_step = broken
sys.exit(train.main())
"""


@pytest.mark.parametrize("others", ["notice a closed connection", "wait for ever"])
def test_one_rank_ends_all_with_its_error(others: str, runs_material: Material, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = runs_material.settings(tmp_path / "run", train={"steps": 4})
    overrides = [
        "experiment=quickstart",
        f"data.path={settings.data.path}",
        f"data.tokenizer={settings.data.tokenizer}",
        f"train.output_dir={tmp_path / 'run'}",
        "train.steps=4",
        "train.global_batch_size=4",
        "parallel.tensor=2",
        "parallel.pipeline=1",
    ]
    started = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, others, *overrides],
            cwd=ROOT,
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        (_, first), (_, second) = [rank.communicate(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert time.monotonic() - started < 100  # half of it is the imports
    assert all(rank.returncode == 1 for rank in ranks), (first, second)
    assert "OSError: the second step is too much" in second
    assert "stopped, as another rank failed: rank 1: OSError: the second step is too much" in first
