"""``LlavaModel.from_pretrained``: a checkpoint or a published model, at any layout, answers as transformers does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ranks import ranks

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))

import oracle  # noqa: E402

import llava_mcore  # noqa: E402
from llava_mcore.settings.compose import SettingsError  # noqa: E402


def answers(paths: list[Path], parallel: dict[str, int], batch) -> list[list[torch.Tensor]]:
    """Logits [T, V] of the last stage, once from each path."""
    from llava_mcore.models.llava import ModelParts
    from llava_mcore.training.engine import forward_logits

    found, groups = [], None
    for path in paths:
        model = llava_mcore.LlavaModel.from_pretrained(path, parallel=parallel, groups=groups)
        groups = model.groups
        assert not model.training
        rows = [range(len(batch.input_ids_T))]
        found.append(forward_logits(ModelParts([model]), [batch], rows, groups, torch.device("cpu")))
    return found


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_equals_transformers(tmp_path: Path, parallel: dict[str, int]) -> None:
    hf = oracle.make_model(tmp_path / "hf", tied=False, select="default")
    llava_mcore.import_hf(hf, tmp_path / "checkpoint", compare_logits=False)
    samples = oracle.make_samples(oracle.PATCHES)
    theirs = oracle.run_transformers(hf, samples)["logits"][0]
    (batch,) = oracle.pack(samples, [[0]])
    for number, result in enumerate(ranks(2).run(answers, [hf, tmp_path / "checkpoint"], parallel, batch)):
        for logits in result:
            if number == 1 or "tensor" in parallel:
                assert (logits[0][: len(theirs)] - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_layout_that_does_not_fit(tmp_path: Path) -> None:
    hf = oracle.make_model(tmp_path / "hf", tied=False, select="default")
    with pytest.raises(SettingsError, match="tensor"):
        llava_mcore.LlavaModel.from_pretrained(hf, parallel={"tensor": 2})
    with pytest.raises(AttributeError, match="no attribute 'Llava'"):
        _ = llava_mcore.Llava
