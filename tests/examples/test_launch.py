"""The example scripts' three ways of being started. What they start is looked at through a stand-in for Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = {"pretrain_llava.sh": "experiment=pretrain_llava_7b", "finetune_llava.sh": "experiment=finetune_llava_7b"}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "PYTHON")


def run(command: list[str | Path], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES} | environment
    return subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A "Python" that writes down each call's arguments and finds 3 GPUs."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\ncase "$1" in -c) echo 3;; esac\n')
    path.chmod(0o755)
    return path


def calls(stand_in: Path) -> list[str]:
    return (stand_in.parent / "calls").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_starts_torchrun(script: str, stand_in: Path, tmp_path: Path) -> None:
    assert run(["bash", EXAMPLES / script, "a=1", "b=x y"], tmp_path, PYTHON=str(stand_in)).returncode == 0
    check, _, launch = calls(stand_in)
    assert check == f"{EXAMPLES}/check_paths.py {SCRIPTS[script]} a=1 b=x y"
    assert launch == f"-m torch.distributed.run --standalone --nproc-per-node 3 -m llava_mcore.train {SCRIPTS[script]} a=1 b=x y"


def test_bash_takes_the_number_of_processes(stand_in: Path, tmp_path: Path) -> None:
    run([EXAMPLES / "pretrain_llava.sh"], tmp_path, PYTHON=str(stand_in), NPROC_PER_NODE="5")
    assert "--nproc-per-node 5" in calls(stand_in)[-1] and len(calls(stand_in)) == 2


def test_several_machines(stand_in: Path, tmp_path: Path) -> None:
    settings = {"PYTHON": str(stand_in), "NPROC_PER_NODE": "8", "NNODES": "4"}
    result = run([EXAMPLES / "pretrain_llava.sh"], tmp_path, **settings)
    assert result.returncode != 0 and "set NODE_RANK" in result.stderr
    result = run([EXAMPLES / "pretrain_llava.sh"], tmp_path, **settings, NODE_RANK="2")
    assert result.returncode != 0 and "set MASTER_ADDR" in result.stderr
    result = run([EXAMPLES / "pretrain_llava.sh"], tmp_path, **settings, NODE_RANK="2", MASTER_ADDR="node0")
    where = "--nnodes 4 --node-rank 2 --master-addr node0 --master-port 29500 --nproc-per-node 8"
    assert result.returncode == 0 and f"torch.distributed.run {where} -m llava_mcore.train" in calls(stand_in)[-1]


def test_a_rank_starts_no_torchrun(stand_in: Path, tmp_path: Path) -> None:
    run([EXAMPLES / "finetune_llava.sh", "a=1"], tmp_path, PYTHON=str(stand_in), RANK="1")
    assert calls(stand_in)[-1] == "-u -m llava_mcore.train experiment=finetune_llava_7b a=1"
    assert len(calls(stand_in)) == 2


def test_nothing_is_started_if_the_check_fails(stand_in: Path, tmp_path: Path) -> None:
    stand_in.write_text(stand_in.read_text() + "exit 2\n")
    assert run([EXAMPLES / "finetune_llava.sh"], tmp_path, PYTHON=str(stand_in)).returncode == 2
    assert len(calls(stand_in)) == 1


def test_python_hands_over_to_bash(stand_in: Path, tmp_path: Path) -> None:
    """As torchrun does it: the file is run with Python, and that Python is the one that goes on."""
    result = run([sys.executable, EXAMPLES / "pretrain_llava.sh", "data.path=nowhere"], tmp_path, PYTHON=str(stand_in))
    assert result.returncode == 2 and "data.path=nowhere" in result.stderr
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("form", [["bash"], [*LAUNCHER, "--nproc-per-node=2"], [*LAUNCHER, "--no-python", "--nproc-per-node=2"]])
def test_missing_paths_are_named_once(form: list[str], tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    result = run([*form, EXAMPLES / "pretrain_llava.sh", "data.path=nowhere", "data.tokenizer=tokenizer"], tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("data.path=nowhere: no such file or folder") == 1
    assert result.stderr.count("train.init_from is not set: give") == 1
    assert "data.tokenizer" not in result.stderr


def test_a_misspelt_setting_is_named_before_anything_starts(tmp_path: Path) -> None:
    result = run(["bash", EXAMPLES / "pretrain_llava.sh", "train.lrr=1"], tmp_path)
    assert result.returncode == 2 and "did you mean train.lr?" in result.stderr


@pytest.mark.skipif(not (ROOT / "llava_mcore/train.py").exists(), reason="the trainer is not there yet")
@pytest.mark.parametrize("form", [["bash"], [*LAUNCHER, "--nproc-per-node=1"], [*LAUNCHER, "--no-python", "--nproc-per-node=1"]])
def test_every_form_reaches_the_trainer(form: list[str], tmp_path: Path) -> None:
    result = run(
        [*form, EXAMPLES / "finetune_llava.sh", "--print-config", "train.lr=3e-4", "experiment=finetune_llava_13b"], tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "lr: 0.0003" in result.stdout and "finetune_llava_13b" in result.stdout


def test_quickstart_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    assert "--fresh" in run(["bash", EXAMPLES / "quickstart.sh", "--help"], tmp_path).stdout
    result = run(["bash", EXAMPLES / "quickstart.sh", "--frsh"], tmp_path)
    assert result.returncode == 2 and "--frsh" in result.stderr


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh"), key=str), ids=lambda path: path.name)
def test_bash_can_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK) != script.name.startswith("launch")
