"""tools/convert_checkpoint.py as it is called."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conversion_material import assert_same, rewrite, tensors

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/convert_checkpoint.py"


@pytest.fixture(scope="module")
def main():
    """The tool's main, in this process."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_all_commands(main, saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, checkpoint, back = str(saved["groups2"]), str(tmp_path / "checkpoint"), str(tmp_path / "back")
    assert main(["import", source, checkpoint, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "language_model.decoder.layers.0.mlp.linear_fc1.weight" in text and "nothing is missing" in text
    assert list(tmp_path.iterdir()) == []
    assert main(["import", source, checkpoint]) == 0
    assert capsys.readouterr().out.count("yes, bit for bit") == 4
    assert main(["import", source, checkpoint]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["import", source, checkpoint, "--overwrite", "--no-verify"]) == 0
    assert "not compared" in capsys.readouterr().out
    assert main(["export", checkpoint, back, "--dry-run"]) == 0 and not Path(back).exists()
    assert main(["export", checkpoint, back, "--dtype", "bfloat16"]) == 0
    assert main(["export", checkpoint, back, "--overwrite"]) == 0
    assert_same(tensors(Path(back)), tensors(saved["groups2"]))
    capsys.readouterr()
    assert main(["inspect", checkpoint]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["language"]["vocab_size"] == 101
    assert main(["verify", checkpoint, source]) == 0
    rewrite(Path(back), lambda content: {k: v + (1 if k.endswith("linear_2.bias") else 0) for k, v in content.items()})
    capsys.readouterr()
    assert main(["verify", checkpoint, back]) == 1
    assert "multi_modal_projector.linear_2.bias: 48 of 48 values differ" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 1
    assert "neither a published model" in capsys.readouterr().err


def call(*arguments: str, limit: str = "") -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own, from another folder."""
    command = f"{limit} exec {sys.executable} {TOOL} " + " ".join(arguments)
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd="/", timeout=120, env=os.environ)


def test_help_needs_no_torch() -> None:
    probe = f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
    probe += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "import" in done.stdout, done.stderr


def test_own_process_and_full_disk(saved: dict[str, Path], tmp_path: Path) -> None:
    """Files may not grow beyond 60 KiB, as on a full disk: an error, on time, and nothing left; then it goes well."""
    source, out = str(saved["groups2"]), tmp_path / "out/checkpoint"
    done = call("import", source, str(out), limit="ulimit -f 60;")
    assert done.returncode == 1 and "cannot be written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and list(out.parent.iterdir()) == []
    done = call("import", source, str(out))
    assert done.returncode == 0 and "yes, bit for bit" in done.stdout, done.stderr
