"""The whole loop: the same numbers at every layout, and data that is not as it should be."""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import material
import pytest
import runs
from ranks import ranks
from runs import KeptRuns, Material

from llava_mcore.data.index import build_index
from llava_mcore.data.lengths import build_lengths
from llava_mcore.data.shards import ShardWriter
from llava_mcore.models import context_attention
from llava_mcore.settings.schema import Settings
from llava_mcore.training.data_state import QUARANTINE_LOG
from llava_mcore.training.observe import read_metrics
from llava_mcore.training.trainer import Trainer


@pytest.mark.parametrize("layout", ["TP2", "PP2", "CP2", "DP2", "DP2+overlap", "TP2xPP2", "TP2xDP2", "PP2xDP2"])
def test_every_layout_trains_alike(kept: KeptRuns, layout: str) -> None:
    """Losses, gradient norms and final weights; the data-parallel ranks get unequal numbers of pictures, and some none."""
    runs.assert_close(kept.whole(layout), kept.whole("1"))


@pytest.mark.parametrize(("layout", "micro_batch_size"), [("1", 3), ("DP2", 2)])
def test_micro_batches_change_nothing(
    kept: KeptRuns, runs_material: Material, tmp_path: Path, layout: str, micro_batch_size: int
) -> None:
    settings = runs_material.settings(tmp_path / "run", train={"micro_batch_size": micro_batch_size})
    runs.assert_close(runs.train(layout, settings), kept.whole("1"))


def test_packing_changes_nothing(runs_material: Material, tmp_path: Path) -> None:
    """Streams of several samples each, or of one."""
    packed, alone = (
        runs_material.settings(tmp_path / name, data={"packing": packing}, train={"global_batch_size": 9})
        for name, packing in (("packed", True), ("alone", False))
    )
    runs.assert_close(runs.train("1", alone), runs.train("1", packed))
    lines = [read_metrics(tmp_path / name)[0] for name in ("packed", "alone")]
    assert lines[0]["tokens"] == lines[1]["tokens"] and lines[0]["padding"] < lines[1]["padding"] - 0.1
    assert lines[0]["samples"] == lines[1]["samples"] == 9


def fit_by_ring(settings: Settings) -> list[tuple]:
    """On a rank: a run whose samples are padded for Transformer Engine's exchange, with our ring in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(context_attention.SCHEMES, "p2p", context_attention.SCHEMES["ring"])
        patch.setattr("llava_mcore.training.trainer.problems_here", lambda _: [])  # there is no Transformer Engine here
        return runs.fit(settings)


def test_padding_for_transformer_engines_exchange_is_counted(kept: KeptRuns, runs_material: Material, tmp_path: Path) -> None:
    settings = runs_material.settings(tmp_path / "run", parallel={"context": 2, "context_exchange": "p2p"})
    runs.assert_close(runs.result(settings, ranks(2).run(fit_by_ring, settings)), kept.whole("1"))
    slots = [round(line["tokens"] / (1 - line["padding"])) for line in read_metrics(tmp_path / "run")]
    plain = [round(line["tokens"] / (1 - line["padding"])) for line in read_metrics(kept.root / "whole-1-float32")]
    added = [here - there for here, there in zip(slots, plain, strict=True)]
    assert all(tokens > 0 and tokens % 4 == 0 and tokens < 0.1 * there for tokens, there in zip(added, plain, strict=True)), added


# ------------------------------------------------------------------------------------------------------------------ bad data


BROKEN = (4, 9, 16, 23)  # two that only decoding finds, then two that the index does


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Material:
    """28 samples, of which four have a picture that ends too early, is empty, is no picture, or has a JSON without turns."""
    folder = tmp_path_factory.mktemp("broken") / "shards"
    rng = random.Random(3)
    with ShardWriter(folder, samples_per_shard=10) as writer:
        for number in range(28):
            record, pictures = material.sample(number, rng)
            if number in BROKEN[:2]:
                pictures[-1] = ("png", pictures[-1][1][: len(pictures[-1][1]) // 2])
            elif number == BROKEN[2]:
                pictures[0] = ("png", b"this is no picture")
            elif number == BROKEN[3]:
                del record["conversations"]
            writer.write(record["id"], record, pictures)
    build_index(folder)
    build_lengths(folder, tokenizer, "vicuna_v1")
    return Material(folder, tokenizer)


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's quarantine log."""
    return [json.loads(line) for line in (run / QUARANTINE_LOG).read_text().splitlines()]


@pytest.mark.parametrize("layout", ["TP2", "DP2"])
def test_bad_samples_are_skipped_and_named(broken: Material, tmp_path: Path, layout: str) -> None:
    settings = broken.settings(tmp_path / "run", train={"steps": 4}, data={"max_bad_samples": 2})
    assert len(runs.train(layout, settings).losses) == 4
    lines = logged(tmp_path / "run")
    assert sorted(line["key"] for line in lines) == sorted(f"s{number}" for number in BROKEN)
    for line in lines:
        assert line.keys() == {"step", "dataset", "shard", "key", "offset", "error"} and 1 <= line["step"] <= 4
        with tarfile.open(broken.shards / line["shard"]) as tar:
            assert line["offset"] in [info.offset_data for info in tar if info.name.startswith(line["key"] + ".")]
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["bad_samples"] == 2
    assert [line["bad_samples"] for line in metrics] == sorted(line["bad_samples"] for line in metrics)


def test_the_count_survives_a_resume(broken: Material, tmp_path: Path) -> None:
    settings = broken.settings(tmp_path / "run", train={"steps": 4})
    runs.train("1", runs.changed(settings, train={"stop_after": 3}))
    with (tmp_path / "run" / QUARANTINE_LOG).open("a") as log:  # of steps after the checkpoint, and of a write that was killed
        log.write('{"step": 4, "key": "again"}\n{"step": 4, "da')
    runs.train("1", settings)
    assert read_metrics(tmp_path / "run")[-1]["bad_samples"] == 2
    assert len(logged(tmp_path / "run")) == len(BROKEN)


@pytest.mark.parametrize("layout", ["PP2", "DP2"])
def test_too_many_bad_samples_stop_every_rank(broken: Material, tmp_path: Path, layout: str) -> None:
    settings = broken.settings(tmp_path / "run", train={"steps": 4}, data={"max_bad_samples": 1})
    answers = ranks(2).run(runs.refused, runs.on(layout, settings))
    assert len(set(answers)) == 1
    kind, message = answers[0]
    assert kind == "DataError"
    assert (
        "more than data.max_bad_samples=1; the last: shard-0000" in message and str(tmp_path / "run" / QUARANTINE_LOG) in message
    )


def fit_with_data_that_goes(settings: Settings, path: str, rank: int) -> Any:
    """On a rank: a run whose shard is cut, for one rank alone, after it was opened."""
    trainer = Trainer(settings)
    if trainer.place.rank == rank:
        # Its own copy of the folder, as ranks on several machines have.
        for shard in Path(path).glob("*.tar"):
            with shard.open("r+b") as file:
                file.truncate(512)
    trainer.fit()


def refused_with_data_that_goes(settings: list[Settings], rank: int) -> tuple[str, str]:
    """On a rank: what such a run ends with."""
    import torch.distributed as dist

    own = settings[dist.get_rank()]
    return runs.refused(own, lambda own: fit_with_data_that_goes(own, own.data.path or "", rank))


@pytest.mark.parametrize(("layout", "rank"), [("DP2", 0), ("DP2", 1), ("PP2", 0)])
def test_data_that_goes_on_one_rank_stops_all(shards: Path, tokenizer: Path, tmp_path: Path, layout: str, rank: int) -> None:

    settings = []
    for number in range(2):
        shutil.copytree(shards, tmp_path / f"machine{number}")
        one = Material(tmp_path / f"machine{number}", tokenizer).settings(tmp_path / "run")
        settings.append(runs.on(layout, one))
    answers = ranks(2).run(refused_with_data_that_goes, settings, rank)
    assert len(set(answers)) == 1
    kind, message = answers[0]
    assert kind == "DatasetError" and f"machine{rank}/shard-0" in message and "truncated while in use" in message


def test_a_truncated_shard(shards: Path, tokenizer: Path, tmp_path: Path) -> None:

    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    with (folder / "shard-00001.tar").open("r+b") as file:
        file.truncate(5000)
    settings = Material(folder, tokenizer).settings(tmp_path / "run")
    for kind, message in ranks(2).run(runs.refused, runs.on("DP2", settings)):
        assert kind == "DatasetError" and "shard-00001.tar has 5000 bytes" in message


def test_a_loss_that_is_no_number(runs_material: Material, tmp_path: Path) -> None:
    settings = runs_material.settings(tmp_path / "run", train={"lr": 1e30, "clip_grad": 0, "warmup_ratio": 0})
    answers = ranks(2).run(runs.refused, runs.on("PP2", settings))
    assert len(set(answers)) == 1
    kind, message = answers[0]
    assert kind == "TrainingError" and "the loss of step" in message and "lower train.lr" in message


def test_what_is_missing_is_said_at_once(tokenizer: Path, tmp_path: Path) -> None:
    settings = Material(tmp_path / "nothing", tokenizer).settings(
        tmp_path / "run", train={"init_from": str(tmp_path / "none")}, parallel={"tensor": 2, "pipeline": 2}
    )
    for kind, message in ranks(2).run(runs.refused, settings):
        assert kind == "SettingsError"
        assert "2 processes cannot hold parallel.tensor=2 x parallel.pipeline=2" in message
        assert f"data.path={tmp_path}/nothing: no such file or folder" in message
        assert f"train.init_from={tmp_path}/none: no such folder" in message
