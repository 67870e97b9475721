"""What is seen of a run: the console line, metrics.jsonl, TensorBoard and wandb, with the same numbers under the same names."""

from __future__ import annotations

import dataclasses
import math
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_mcore.settings.schema import (
    DataSettings,
    LanguageSettings,
    ModelSettings,
    ParallelSettings,
    ProjectorSettings,
    Settings,
    TrainSettings,
    VisionSettings,
)
from llava_mcore.training import observe
from llava_mcore.training.observe import Observer, StepRecord, read_metrics
from llava_mcore.training.observe.console import duration


def settings(**train: object) -> Settings:
    sizes = {"hidden_size": 32, "ffn_hidden_size": 64, "num_layers": 2, "num_attention_heads": 2}
    return Settings(
        model=ModelSettings(
            vision=VisionSettings(image_size=28, patch_size=7, **sizes),
            projector=ProjectorSettings(),
            language=LanguageSettings(vocab_size=64, max_position_embeddings=64, **sizes),
            image_token_id=3,
        ),
        data=DataSettings(sequence_length=64),
        train=TrainSettings(**{"lr": 1e-3, "dtype": "float32", "tensorboard": False, **train}),
        parallel=ParallelSettings(),
    )


def record(step: int, steps: int = 10, **changes: object) -> StepRecord:
    base = StepRecord(
        step=step,
        steps=steps,
        loss=1 / (step + 2),
        lr=1e-3,
        grad_norm=0.5,
        tokens=900,
        slots=1000,
        seconds=0.5,
        waited=0.1,
        samples=8,
        pictures=7,
        flops=2_000_000_000_000,
    )
    return dataclasses.replace(base, **changes)


def wandb_records(path: Path) -> list[Any]:
    """The records of a finished run. wandb's own process may still be writing the last of them when ``finish`` returns."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 30
    while True:
        records = [Record.FromString(data) for data in leveldb_log(path)]
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.05)


def leveldb_log(path: Path) -> Iterator[bytes]:
    """The records of a wandb file: LevelDB's log format (blocks of 32 KiB, 7 bytes before each piece), 7 bytes in."""
    content, offset, pieces = path.read_bytes(), 7, b""
    while offset + 7 <= len(content):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, offset)
        offset += 7 + length
        if offset > len(content):  # still being written
            return
        pieces += content[offset - length : offset]
        if kind in (1, 4):  # a whole record, or its last piece
            yield pieces
            pieces = b""


def run(folder: Path, records: list[StepRecord], device: str = "some cpu", **train: object) -> None:
    observer = Observer(settings(**train), is_first=True, world_size=2, device_name=device, run_dir=folder)
    for item in records:
        observer.log(item)
    observer.close()
    observer.close()  # a second close, as from a finally clause, does nothing


def test_console_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [record(1, seconds=60.0), record(2), record(3, seconds=9.0), record(4, seconds=1.0)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("eta ?")  # nothing is known yet but the first step, which is no measure
    assert lines[1] == (
        "step  2/10 | loss 0.2500 | lr 1.00e-03 | norm 0.5 | 1,800 tok/s | pad 10.0% | wait 20.0% | 500 ms | 4 TFLOP/s | "
        "eta 0:00:04"
    )
    assert lines[3].endswith("eta 0:00:06")  # 6 steps at the median of 0.5, 9 and 1 seconds
    assert lines[4].startswith("3 steps in 0:00:10, 257 tok/s")  # 2,700 tokens in 10.5 seconds
    assert len(lines) == 5


def test_console_shows_what_is_unusual(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"projector": 2e-3, "language_model": 1e-3}
    run(tmp_path, [record(1, lr=rates, bad_samples=3, grad_norm=None, loss=math.nan)])
    line = capsys.readouterr().out.splitlines()[0]
    assert "lr projector 2.00e-03 language_model 1.00e-03" in line
    assert "bad 3" in line and "norm" not in line and "loss nan" in line and "mfu" not in line


def test_equal_module_rates_are_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [record(1, lr={"projector": 1e-3, "language_model": 1e-3})])
    assert "lr 1.00e-03 |" in capsys.readouterr().out
    assert read_metrics(tmp_path)[0]["lr/projector"] == 1e-3


def test_log_every_thins_the_console_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [record(step) for step in range(1, 11)], log_every=4)
    shown = [line.split("|")[0].strip() for line in capsys.readouterr().out.splitlines()[:-1]]
    assert shown == ["step  4/10", "step  8/10", "step 10/10"]
    assert len(read_metrics(tmp_path)) == 10


def test_mfu_where_the_peak_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "peak_flops", lambda name, dtype: 10e12 if name == "a device" else None)
    run(tmp_path / "known", [record(1)], device="a device")
    run(tmp_path / "unknown", [record(1)], device="another")
    assert read_metrics(tmp_path / "known")[0]["mfu"] == pytest.approx(0.2)  # 4 TFLOP/s of twice 10
    assert "mfu" not in read_metrics(tmp_path / "unknown")[0]


def test_metrics_are_exact(tmp_path: Path) -> None:
    run(tmp_path, [record(1, loss=0.1 + 0.2), record(2, loss=math.inf, grad_norm=math.nan)])
    first, second = read_metrics(tmp_path)
    assert first["loss"] == 0.1 + 0.2 and first["step"] == 1
    assert second["loss"] == math.inf and math.isnan(second["grad_norm"])


def test_resume_leaves_one_curve(tmp_path: Path) -> None:
    run(tmp_path, [record(step) for step in range(1, 8)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the kill came while a line was written
    run(tmp_path, [record(step, loss=float(step)) for step in range(5, 11)])
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["loss"] for line in lines] == [1 / 3, 1 / 4, 1 / 5, 1 / 6, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    run(tmp_path, [record(1)])  # a fresh start in the same folder
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_making_an_observer_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path, [record(1), record(2)])
    run(tmp_path, [])  # a process that ended before its first step
    assert len(read_metrics(tmp_path)) == 2


def test_other_ranks_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observer = Observer(
        settings(tensorboard=True, wandb="offline"), is_first=False, world_size=2, device_name="", run_dir=tmp_path / "run"
    )
    observer.log(record(1))
    observer.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_nothing_heavy_is_imported_unless_asked_for() -> None:
    code = "import sys, llava_mcore.training.observe; print([m for m in ('torch', 'wandb', 'tensorboard') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, [record(step) for step in range(1, 6)], tensorboard=True)
    run(tmp_path, [record(step, loss=float(step)) for step in range(4, 8)], tensorboard=True)  # resumed at step 4
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = read_metrics(tmp_path)
    for name in lines[0].keys() - {"step"}:
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [line["step"] for line in lines]
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in lines], rel=1e-6)


def test_wandb_offline_has_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, [record(1), record(2)], wandb="offline", lr=3e-3)
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    rows, config = [], {}
    for entry in wandb_records(path):
        if entry.WhichOneof("record_type") == "history":
            rows.append({item.key or item.nested_key[0]: float(item.value_json) for item in entry.history.item})
        if entry.WhichOneof("record_type") == "run":
            config |= {item.key: item.value_json for item in entry.run.config.update}
    lines = read_metrics(tmp_path)
    assert [row["_step"] for row in rows] == [1, 2]
    for row, line in zip(rows, lines, strict=True):
        assert {name: row[name] for name in line.keys() - {"step"}} == {name: line[name] for name in line.keys() - {"step"}}
    assert '"lr":0.003' in config["train"].replace(" ", "")

    run_id = (tmp_path / "wandb_id").read_text()
    run(tmp_path, [record(3)], wandb="offline")
    assert (tmp_path / "wandb_id").read_text() == run_id  # resumed, not a second run
    # wandb names a folder by second and run, and adds "-1" to the second of one second.
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id.strip()}*"))) == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (90061, "1d 1:01:01"), (200000, "2d 7:33:20")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
