"""What a checkpoint refuses, what is kept, and a disk that is full."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from ranks import ranks
from runs import KeptRuns, Material

from llava_mcore.settings.schema import Settings
from llava_mcore.training import checkpoint_folder

WIDER = {"language": {**runs.MODEL["language"], "ffn_hidden_size": 64}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model": WIDER}, "CheckpointError", ["another model", "model.language.ffn_hidden_size: 56 in the checkpoint, 64 here"]),
        ({"train": {"freeze": ["vision_tower"]}}, "CheckpointError", ["train.freeze=[]", "['vision_tower']", "train.init_from="]),
        ({"train": {"dtype": "bfloat16"}}, "CheckpointError", ["train.dtype=float32", "bfloat16"]),
        ({"train": {"seed": 5}}, "DatasetError", ["train.seed: 1234 in the checkpoint, 5 now"]),
        ({"train": {"global_batch_size": 8}}, "DatasetError", ["train.global_batch_size: 7 in the checkpoint, 8 now"]),
    ],
)
def test_another_run_is_refused(kept: KeptRuns, tmp_path: Path, changes: dict[str, Any], kind: str, words: list[str]) -> None:
    settings = runs.changed(kept.stopped(tmp_path / "run", "1"), **changes)
    ((found, message),) = ranks(1).run(runs.refused, settings)
    assert found == kind
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", [checkpoint_folder.META, checkpoint_folder.SETTINGS, "weights/metadata.json"])
def test_an_incomplete_checkpoint_is_refused(kept: KeptRuns, tmp_path: Path, name: str) -> None:
    settings = kept.stopped(tmp_path / "run", "1")
    newest = checkpoint_folder.newest(tmp_path / "run")
    assert newest is not None
    (newest / name).unlink()
    ((found, message),) = ranks(1).run(runs.refused, settings)
    assert found == "CheckpointError" and str(newest) in message and f"it has no {name}" in message


def test_what_a_checkpoint_holds(kept: KeptRuns, tmp_path: Path) -> None:
    settings = kept.stopped(tmp_path / "run", "TP2")
    newest = checkpoint_folder.newest(tmp_path / "run")
    assert newest is not None and newest.name == "step_00000003"
    meta = checkpoint_folder.read_meta(newest)
    assert meta["step"] == 3 and meta["contents"] == ["model", "optimizer"]
    assert meta["layout"]["tensor"] == 2 and meta["layout"]["world_size"] == 2
    assert checkpoint_folder.read_model_settings(newest) == settings.model
    original = (Path(settings.data.tokenizer or "") / "tokenizer.model").read_bytes()
    assert (newest / "tokenizer" / "tokenizer.model").read_bytes() == original


@pytest.mark.parametrize(("keep", "names"), [(2, [4, 5]), (1, [5]), (0, [1, 2, 3, 4, 5])])
def test_old_checkpoints_go(runs_material: Material, tmp_path: Path, keep: int, names: list[int]) -> None:
    change = {"steps": 5, "save_every": 1, "keep_checkpoints": keep, "global_batch_size": 1}
    settings = runs_material.settings(tmp_path / "run", train=change)
    runs.train("1", settings)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "latest",
        *(f"step_{number:08d}" for number in names),
    ]
    newest = checkpoint_folder.newest(tmp_path / "run")
    assert newest is not None and newest.name == "step_00000005"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 8 MiB; a checkpoint of the tests' model takes a little over 1."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def assert_only_the_first_is_left(run: Path) -> None:
    """The checkpoint of step 1 is whole and pointed at, and nothing else lies beside it."""
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    assert checkpoint_folder.newest(run) == run / "checkpoints" / "step_00000001"


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (400_000, ["no room for a checkpoint of", "lower train.keep_checkpoints or set another train.output_dir"]),
        # Enough by count, and too little for what files and folders take beside the numbers.
        (850_000, ["could not be written (rank 0: ", "0.0 MiB are free", "those before it are intact"]),
    ],
)
def test_a_full_disk(runs_material: Material, small_disk: Path, left: int, words: list[str]) -> None:
    settings = runs_material.settings(small_disk / "run", train={"save_every": 1})
    runs.train("DP2", runs.changed(settings, train={"stop_after": 1}))
    with (small_disk / "ballast").open("wb") as ballast:
        ballast.write(bytes(shutil.disk_usage(small_disk).free - left))
    for kind, message in ranks(2).run(runs.refused, runs.on("DP2", settings)):
        assert kind == "CheckpointError"
        for word in words:
            assert word in message, message
    assert_only_the_first_is_left(small_disk / "run")


def fit_with_file_limit(settings: Settings, limit: int) -> None:
    """On a rank: a run in which, from the second checkpoint on, no file can grow beyond ``limit`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        runs.fit(runs.changed(settings, train={"stop_after": 1}))
        runs.process_groups.destroy()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        runs.fit(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused_with_file_limit(settings: Settings, limit: int) -> tuple[str, str]:
    """On a rank: what such a run ends with."""
    return runs.refused(settings, lambda settings: fit_with_file_limit(settings, limit))


def test_a_write_that_fails(kept: KeptRuns, runs_material: Material, tmp_path: Path) -> None:
    """The room was counted and is gone when it is needed: writing itself fails, on every rank."""
    settings = runs_material.settings(tmp_path / "run", train={"save_every": 1})
    answers = ranks(2).run(refused_with_file_limit, runs.on("DP2", settings), 100_000)
    for kind, message in answers:
        assert kind == "CheckpointError" and f"{tmp_path}/run/checkpoints/.step_00000002.partial could not be written" in message
    assert_only_the_first_is_left(tmp_path / "run")
    # With room again the same command goes on where it was.
    runs.assert_same(runs.train("DP2", settings), kept.whole("DP2"))


def test_what_the_first_rank_writes_alone(runs_material: Material, tmp_path: Path) -> None:
    """It fails on that rank alone, and is known on every rank: here a file stands where the checkpoint is to be named."""
    settings = runs_material.settings(tmp_path / "run", train={"save_every": 1})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000001").write_text("in the way")
    answers = ranks(2).run(runs.refused, runs.on("DP2", settings))
    assert len(set(answers)) == 1
    kind, message = answers[0]
    assert kind == "CheckpointError" and "Not a directory" in message and "step_00000001" in message
    assert checkpoint_folder.newest(tmp_path / "run") is None and not list((tmp_path / "run" / "checkpoints").glob(".*"))
