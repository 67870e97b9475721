"""Whole runs on pictures of several tiles: layouts, what is logged, weights from a model that had none, and resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
from ranks import RankError, ranks
from runs import Material, Result

from llava_mcore.settings.schema import Settings
from llava_mcore.training.checkpoint_folder import newest
from llava_mcore.training.observe import read_metrics

MODEL = {**runs.MODEL, "anyres": {"max_tiles": 2}}


def of_tiles(material: Material, folder: Path, **changes: Any) -> Settings:
    return material.settings(folder, model=MODEL, train={"steps": 3, **changes})


@pytest.fixture(scope="module")
def one_process(runs_material: Material, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("tiles") / "run"
    return folder, runs.train("1", of_tiles(runs_material, folder))


@pytest.mark.parametrize("layout", ["TP2", "DP2+overlap"])
def test_layouts_train_alike(one_process: tuple[Path, Result], runs_material: Material, tmp_path: Path, layout: str) -> None:
    """With encoder data parallelism, and with ranks whose batches have no picture, so that nothing uses the newline."""
    runs.assert_close(runs.train(layout, of_tiles(runs_material, tmp_path / "run")), one_process[1])


def test_visual_tokens_are_logged_apart(one_process: tuple[Path, Result]) -> None:
    for line in read_metrics(one_process[0]):
        assert line["visual_tokens"] + line["text_tokens"] == line["tokens"]
        assert line["visual_tokens"] > 16 * line["samples"] / 2 and line["text_tokens"] > 0


def test_a_model_of_single_tiles_goes_on_with_several(
    one_process: tuple[Path, Result], runs_material: Material, tmp_path: Path
) -> None:
    """All weights but the newline's come along, which starts as it would from nothing."""
    before = runs.train("1", runs_material.settings(tmp_path / "single", train={"steps": 1}))
    after = runs.train("1", of_tiles(runs_material, tmp_path / "run", init_from=str(tmp_path / "single"), lr=1e-12, steps=1))
    assert after.weights.keys() - before.weights.keys() == {"learned_tokens.newline"}
    assert runs.largest_difference({name: after.weights[name] for name in before.weights}, before.weights) < 1e-6
    start = runs.train("1", of_tiles(runs_material, tmp_path / "start", lr=1e-12, steps=1)).weights["learned_tokens.newline"]
    assert float((after.weights["learned_tokens.newline"] - start).abs().max()) < 1e-6


def test_a_run_resumes_with_its_own_tiles_only(runs_material: Material, tmp_path: Path) -> None:
    settings = of_tiles(runs_material, tmp_path / "run", stop_after=1)
    runs.train("1", settings)
    assert newest(tmp_path / "run") is not None
    other = replace(settings, model=runs_material.settings(tmp_path, model=runs.MODEL).model)
    with pytest.raises(RankError, match="model.anyres"):
        ranks(1).run(runs.fit, other)
