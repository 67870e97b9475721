"""tools/convert_checkpoint.py as it is called."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import psutil
import pytest
import yaml
from conversion_material import assert_same, import_hf, make_model, rewrite, tensors

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
    text = capsys.readouterr().out
    assert text.count("yes, bit for bit") == 4 and "logits: match on one picture and 12 tokens" in text
    assert main(["import", source, checkpoint]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["import", source, checkpoint, "--overwrite", "--no-verify"]) == 0
    assert "not compared" in capsys.readouterr().out
    assert main(["export", checkpoint, back, "--dry-run"]) == 0 and not Path(back).exists()
    assert main(["export", checkpoint, back, "--dtype", "bfloat16"]) == 0
    assert "logits: match on one picture" in capsys.readouterr().out
    assert main(["export", checkpoint, back, "--overwrite", "--processes", "2", "--no-logits"]) == 0
    assert_same(tensors(Path(back)), tensors(saved["groups2"]))
    capsys.readouterr()
    assert main(["inspect", checkpoint]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["language"]["vocab_size"] == 101
    assert main(["inspect", checkpoint, "--checksums"]) == 0
    ours = yaml.safe_load(capsys.readouterr().out)["checksums"]
    for name, tensor in tensors(saved["groups2"]).items():
        assert int(ours[name], 16) == zlib.crc32(tensor.numpy().tobytes()), name
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


@pytest.mark.parametrize("victim", ["first", "worker"])
def test_kill(tmp_path: Path, victim: str) -> None:
    """kill -9 while files are being written: nothing under the final name, no process left, and a second run starts clean."""
    source, out = tmp_path / "source", tmp_path / "out/checkpoint"
    make_model(hidden=960, layers=6).save_pretrained(source)
    command = [sys.executable, str(TOOL), "import", str(source), str(out), "--processes", "2", "--no-logits"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    written = out.parent / ".checkpoint.partial/weights"
    while not list(written.glob("*.distcp")):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.001)
    workers = psutil.Process(first.pid).children(recursive=True)
    (first if victim == "first" else workers[0]).kill()
    _, says = first.communicate(timeout=60)
    assert not psutil.wait_procs(workers, timeout=60)[1], "a worker outlived the first process"
    assert first.returncode and not out.exists()
    if victim == "worker":
        assert "ended early (exit code -9)" in says and "Traceback" not in says and list(out.parent.iterdir()) == []
    import_hf(source, out, processes=2)
    assert [path.name for path in out.parent.iterdir()] == ["checkpoint"]
    assert sorted(path.name for path in (out / "weights").glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]


# A process counts what its parent held when it was forked, so the parent is a small one.
PEAK = """import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(done.returncode)"""


def test_peak_memory_does_not_follow_size(tmp_path: Path) -> None:
    """250 MiB in tensors of up to 10 MiB: the process grows by some of the largest, not by all of them."""
    peaks = []
    for layers in (1, 24):
        source = tmp_path / f"source{layers}"
        make_model(hidden=960, layers=layers).save_pretrained(source)
        command = [sys.executable, str(TOOL), "import", str(source), str(tmp_path / f"out{layers}"), "--no-logits"]
        done = subprocess.run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout))
    size = sum(file.stat().st_size for file in (tmp_path / "source24").glob("*.safetensors")) / 2**20
    assert size > 240 and peaks[1] - peaks[0] < 60, (size, peaks)
