"""Conversion against ``cp -r`` of the same files on the same disk, and its memory against the limit it promises.

Weights are random bits in the shape of LLaVA-1.5 (20 decoder layers of 7B's 32: 8.6 GiB in bfloat16; --quick: 0.7 GiB). Each
side starts with the source's files dropped from the page cache and nothing waiting to be written, and ends when the result is
synced to disk; what ``cp -r`` took before its sync is in the note. Ours is the command line in a process of its own, its start
included.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402
from _common import Measure, run  # noqa: E402

from llava_mcore.conversion import hf_config, layouts  # noqa: E402
from llava_mcore.conversion.weights import Info, lay_out, put, shard_plan  # noqa: E402
from llava_mcore.settings.schema import LanguageSettings, ModelSettings, ProjectorSettings, VisionSettings  # noqa: E402

TOOL = Path(__file__).resolve().parents[1] / "tools/convert_checkpoint.py"
GIB = 2**30
# A process counts what its parent held when it was forked, so the parent is a small one.
PEAK = """import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)"""


def model_of(quick: bool) -> ModelSettings:
    """The sizes of LLaVA-1.5-7B with fewer decoder layers."""
    return ModelSettings(
        vision=VisionSettings(
            image_size=336, patch_size=14, hidden_size=1024, ffn_hidden_size=4096, num_layers=24, num_attention_heads=16
        ),
        projector=ProjectorSettings(),
        language=LanguageSettings(
            hidden_size=1024 if quick else 4096,
            ffn_hidden_size=2816 if quick else 11008,
            num_layers=2 if quick else 20,
            num_attention_heads=8 if quick else 32,
            vocab_size=32064,
            max_position_embeddings=4096,
        ),
        image_token_id=32000,
    )  # fmt: skip


@cache
def folder(quick: bool) -> Path:
    """A published model of random bits, and nothing else; it is removed when the benchmark ends."""
    path = Path(tempfile.mkdtemp(prefix="conversion_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    source, model = path / "source", model_of(quick)
    source.mkdir()
    plan = layouts.planned(model, layouts.DEFAULT_NAMING)
    infos = {name: Info(shape, torch.bfloat16, "") for name, shape in {**plan.names, **plan.unused}.items()}
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, info in infos.items():
            bits = torch.empty(info.nbytes // 8 + 1, dtype=torch.int64).random_(generator=generator)
            yield name, bits.view(torch.bfloat16)[: info.nbytes // 2].reshape(info.shape)

    put(source, lay_out(source, infos, shard_plan(infos, 2 * GIB)), tensors())
    config = hf_config.set_dtype(hf_config.from_settings(model, bos_id=1, eos_id=2), "bfloat16")
    (source / "config.json").write_text(json.dumps(config))
    return path


def size_of(path: Path) -> int:
    """Bytes of all files below."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def settle(source: Path) -> None:
    """Nothing waits to be written, and the source is not in memory."""
    os.sync()
    for file in source.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(command: list[str], source: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak resident GiB of one command; ``out`` is removed before."""
    shutil.rmtree(out, ignore_errors=True)
    settle(source)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return seconds, float(done.stdout) / 2**20


@cache
def both(quick: bool, command: str, options: tuple[str, ...]) -> tuple[float, float, float, float]:
    """GiB/s of ours, of ``cp -r`` with its sync and without, and our peak in GiB."""
    root = folder(quick)
    checkpoint = root / "checkpoint"
    source, out = (root / "source", checkpoint) if command == "import" else (checkpoint, root / "out")
    if not source.exists():
        timed([sys.executable, str(TOOL), "import", str(root / "source"), str(checkpoint), "--no-verify"], source, checkpoint)
    size = size_of(source) / GIB
    copy = root / "copy"
    unsynced, _ = timed(["cp", "-r", str(source), str(copy)], source, copy)
    started = time.perf_counter()
    os.sync()
    synced = unsynced + time.perf_counter() - started
    shutil.rmtree(copy)
    seconds, peak = timed([sys.executable, str(TOOL), command, str(source), str(out), "--no-logits", *options], source, out)
    shutil.rmtree(root / "out", ignore_errors=True)
    return size / seconds, size / synced, size / unsynced, peak


def throughput(command: str, *options: str) -> Callable[[bool], Measure]:
    """A measure: ours against ``cp -r``."""

    def measure(quick: bool) -> Measure:
        ours, peer, unsynced, peak = both(quick, command, options)
        size = size_of(folder(quick) / "source") / GIB
        what = f"{command} {' '.join(options) or 'verified'}, {size:.2f} GiB"
        note = f"{what}, peak {peak:.2f} GiB; cp -r unsynced {unsynced:.2f} GiB/s"
        return Measure(ours, peer, "GiB/s", 0.5, "higher", note)

    return measure


def memory(command: str) -> Callable[[bool], Measure]:
    """A measure: our peak against 2 GiB and twice the largest tensor."""

    def measure(quick: bool) -> Measure:
        peak = both(quick, command, ())[3]
        plan = layouts.planned(model_of(quick), layouts.DEFAULT_NAMING)
        largest = max(torch.Size(entry.shape).numel() * 2 for entry in plan.tensors)
        note = (
            f"{command}, peak resident memory; the peer is the limit, 2 GiB + 2 x the largest tensor ({largest / 2**20:.0f} MiB)"
        )
        return Measure(peak, 2 + 2 * largest / GIB, "GiB", 1.0, "lower", note)

    return measure


MEASURES: dict[str, Callable[[bool], Measure]] = {
    "import": throughput("import"),
    "import_memory": memory("import"),
    "import_no_verify": throughput("import", "--no-verify"),
    "export": throughput("export"),
    "export_memory": memory("export"),
    "export_no_verify": throughput("export", "--no-verify"),
}

if __name__ == "__main__":
    run("conversion", "Conversion against cp -r on the same disk, and its memory.", MEASURES)
