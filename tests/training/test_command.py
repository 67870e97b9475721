"""``python -m llava_mcore.train`` as a user meets it: exit codes, and one message where something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import Material

from llava_mcore import train

ROOT = Path(__file__).resolve().parents[2]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says when it leaves with exit code 2."""
    with pytest.raises(SystemExit) as left:
        train.main(arguments)
    assert left.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["parallel.tensor=4"], ["model.language.num_query_groups (2) is not divisible by parallel.tensor=4", "one of 1, 2"]),
        (["parallel.pipeline=3"], ["model.language.num_layers (4) is not divisible by parallel.pipeline=3"]),
        (["train.lrr=1"], ["train.lrr", "train.lr"]),
        (
            ["parallel.tensor=2"],
            ["1 processes cannot hold parallel.tensor=2", "data.path is not set", "data.tokenizer is not set"],
        ),
    ],
)
def test_bad_settings(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["experiment=quickstart", *arguments], capsys)
    for word in words:
        assert word in message, message
    assert "in the settings" in message


def test_two_ranks_say_it_once(runs_material: Material, tmp_path: Path) -> None:
    """A world size that does not fit, under the real launcher: no hang, and one message for both ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llava_mcore.train"]
    overrides = [
        "experiment=quickstart",
        "parallel=tp2_pp2",
        f"data.path={runs_material.shards}",
        f"data.tokenizer={runs_material.tokenizer}",
        f"train.output_dir={tmp_path / 'run'}",
    ]
    kept = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    started = time.monotonic()
    done = subprocess.run([*command, *overrides], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - started < 60
    assert done.returncode != 0
    message = "2 processes cannot hold parallel.tensor=2 x parallel.pipeline=2"
    assert done.stderr.count(message) == 1 and message not in done.stdout
    assert "exitcode  : 2" in done.stderr  # the launcher's report of what the ranks left with
    assert "Traceback" not in done.stderr.split(message)[0]
    assert not (tmp_path / "run").exists()
