"""What is trained, how fast, and that AdamW, clipping and the schedule are the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from ranks import ranks
from runs import Material

from llava_mcore.conversion.convert import export_hf
from llava_mcore.settings.schema import Settings
from llava_mcore.training import checkpoint_folder
from llava_mcore.training.optimizer import global_parameters, learning_rates
from llava_mcore.training.trainer import Trainer


def start(settings: Settings) -> list[tuple]:
    """On a rank: a run's weights before its first step."""
    trainer = Trainer(settings)
    assert trainer.step == 0
    return runs.weights_of(trainer)


def started(layout: str, settings: Settings) -> dict[str, torch.Tensor]:
    """The same, put together."""
    placed = runs.on(layout, settings)
    parts = ranks(runs.LAYOUTS[layout][0]).run(start, placed)
    return runs.ours.assemble([shard for part in parts for shard in part])


def moved_and_still(settings: Settings, layout: str) -> tuple[set[str], set[str]]:
    """Tensors of the checkpoint that a run changes, and the others."""
    before, after = started(layout, settings), runs.train(layout, settings).weights
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    return moved, set(before) - moved


def footprint(settings: Settings) -> dict[str, Any]:
    """On a rank: what frozen parameters cost, and the sizes of all gradient buffers and moments."""
    trainer = Trainer(settings)
    trainer.fit()
    names = {parameter: name for name, parameter in global_parameters(trainer.model)}
    buffers = [buffer for part in trainer.ddp for buffer in part.buffers]
    inner = [each.optimizer for each in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])]
    return {
        "frozen": [name for parameter, name in names.items() if not parameter.requires_grad],
        "frozen with a gradient": [
            name for p, name in names.items() if not p.requires_grad and (hasattr(p, "main_grad") or p.grad is not None)
        ],
        "trained": sum(parameter.numel() for parameter in names if parameter.requires_grad),
        "in buffers": sum(parameter.numel() for buffer in buffers for parameter in buffer.params),
        "moments": sum(s["exp_avg"].numel() for each in inner if each is not None for s in each.state.values()),
    }


def test_frozen_modules_cost_nothing(runs_material: Material, tmp_path: Path) -> None:
    settings = runs_material.settings(tmp_path / "run", train={"freeze": ["vision_tower", "language_model"], "steps": 2})
    (found,) = ranks(1).run(footprint, settings)
    projector = (24 + 1) * 32 + (32 + 1) * 32
    assert found["trained"] == found["in buffers"] == found["moments"] == projector
    assert found["frozen"] and not found["frozen with a gradient"]
    assert {name.split(".")[0] for name in found["frozen"]} == {"vision_tower", "language_model"}


@pytest.mark.parametrize("layout", ["1", "PP2", "TP2xPP2"])
def test_only_the_projector_moves(runs_material: Material, tmp_path: Path, layout: str) -> None:
    """Under PP2 the last stage has nothing to train, and still takes part."""
    settings = runs_material.settings(tmp_path / "run", train={"freeze": ["vision_tower", "language_model"], "steps": 3})
    moved, _ = moved_and_still(settings, layout)
    assert moved == {f"projector.encoder.linear_fc{n}.{kind}" for n in "12" for kind in ("weight", "bias")}
    if layout != "1":
        alone = runs_material.settings(tmp_path / "alone", train={"freeze": settings.train.freeze, "steps": 3})
        assert runs.read_metrics(tmp_path / "run")[-1]["loss"] == pytest.approx(
            runs.train("1", alone).losses[-1], rel=runs.TOLERANCE
        )


@pytest.mark.parametrize("layout", ["1", "PP2"])
def test_freezing_by_expression(runs_material: Material, tmp_path: Path, layout: str) -> None:
    """Layers go by their numbers in the whole decoder, and a pattern may concern one stage alone."""
    patterns = [r"language_model\.decoder\.layers\.3\.", r"vision_tower\..*bias$"]
    settings = runs_material.settings(tmp_path / "run", train={"freeze": patterns, "steps": 3})
    moved, still = moved_and_still(settings, layout)
    assert {name for name in still if name.startswith("language_model")} == {
        f"language_model.decoder.layers.3.{name}"
        for name in (
            "self_attention.linear_qkv.layer_norm_weight",
            "self_attention.linear_qkv.weight",
            "self_attention.linear_proj.weight",
            "mlp.linear_fc1.layer_norm_weight",
            "mlp.linear_fc1.weight",
            "mlp.linear_fc2.weight",
        )
    }
    assert {name for name in still if name.startswith("vision_tower")} == {
        name for name in moved | still if name.startswith("vision_tower") and name.endswith("bias")
    }


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["vision_tower", r"layers\.4\."], [r"'layers\\.4\\.' matches no parameter", "vision_tower, projector, language_model"]),
        (["vision_towr"], ["'vision_towr' matches no parameter"]),
        (["("], ["'(' is not a regular expression"]),
        (["."], ["leaves nothing to train"]),
    ],
)
def test_bad_patterns(runs_material: Material, tmp_path: Path, patterns: list[str], words: list[str]) -> None:
    settings = runs_material.settings(tmp_path / "run", train={"freeze": patterns})
    for kind, message in ranks(2).run(runs.refused, runs.on("PP2", settings)):
        assert kind == "SettingsError"
        for word in words:
            assert word in message


def test_learning_rate_of_a_module(runs_material: Material, tmp_path: Path) -> None:
    one = {"steps": 1, "warmup_ratio": 0, "clip_grad": 0}
    plain = runs_material.settings(tmp_path / "plain", train=one)
    other = runs_material.settings(tmp_path / "other", train={**one, "module_lr": {"projector": 4e-3, "vision_tower": 0.0}})
    before = started("1", plain)
    plainly, otherwise = runs.train("1", plain).weights, runs.train("1", other).weights
    for name, start_ in before.items():
        if name.startswith("projector"):
            assert torch.allclose(otherwise[name] - start_, 4 * (plainly[name] - start_), rtol=1e-3, atol=1e-7), name
        else:
            assert torch.equal(otherwise[name], start_ if name.startswith("vision_tower") else plainly[name]), name


def schedule(settings: Settings) -> list[float | dict[str, float]]:
    """On a rank: the learning rate of every step."""
    trainer = Trainer(settings)
    found = []
    for _ in range(trainer.derived.steps):
        found.append(learning_rates(trainer.optimizer, settings.train))
        trainer.scheduler.step(1)
    return found


def test_schedule_is_transformers(runs_material: Material, tmp_path: Path) -> None:
    """LLaVA-1.5's own: 558,128 samples in batches of 256 are 2,181 steps, of which 66 warm up."""
    from transformers import get_cosine_schedule_with_warmup

    settings = runs_material.settings(tmp_path / "run", train={"steps": 2181, "warmup_ratio": 0.03, "lr": 1e-3})
    (ours,) = ranks(1).run(schedule, settings)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    theirs = get_cosine_schedule_with_warmup(optimizer, 66, 2181)
    expected = []
    for _ in range(2181):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert ours == pytest.approx(expected, rel=1e-9, abs=1e-15)


def beside_torch(settings: Settings) -> tuple[float, list[float], list[float]]:
    """On a rank: the trainer beside torch's AdamW and clipping, fed with the same gradients.

    Returns:
        the largest difference of any weight after the last step, and the gradient norms of both.
    """
    trainer = Trainer(settings)
    train, theirs_norms, ours_norms = settings.train, [], []
    parameters = [parameter for _, parameter in global_parameters(trainer.model)]
    names = [name for name, _ in global_parameters(trainer.model)]
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    plain = [name.endswith("bias") or "norm" in name or "class_embedding" in name for name in names]
    theirs = torch.optim.AdamW(
        [
            {"params": [c for c, p in zip(copies, plain, strict=True) if p], "weight_decay": 0.0},
            {"params": [c for c, p in zip(copies, plain, strict=True) if not p], "weight_decay": train.weight_decay},
        ],
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_eps,
    )
    step_ours = trainer.optimizer.step

    def step_both() -> Any:
        for copy, parameter in zip(copies, parameters, strict=True):
            copy.grad = parameter.main_grad.detach().clone()  # type: ignore[attr-defined]
        for group in theirs.param_groups:
            group["lr"] = learning_rates(trainer.optimizer, train)
        theirs_norms.append(float(torch.nn.utils.clip_grad_norm_(copies, train.clip_grad)))
        theirs.step()
        answer = step_ours()
        ours_norms.append(float(answer[1]))
        return answer

    trainer.optimizer.step = step_both  # type: ignore[method-assign]
    trainer.fit()
    difference = max(float((c - p).abs().max()) for c, p in zip(copies, parameters, strict=True))
    return difference, ours_norms, theirs_norms


@pytest.mark.parametrize("clip", [0.5, 1e3])
def test_steps_are_torchs(runs_material: Material, tmp_path: Path, clip: float) -> None:
    """Norms below and above the limit; decay on matrices and embeddings alone."""
    settings = runs_material.settings(tmp_path / "run", train={"clip_grad": clip, "lr": 1e-2, "weight_decay": 1.0})
    ((difference, ours, theirs),) = ranks(1).run(beside_torch, settings)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert (min(ours) > clip) == (clip == 0.5)
    assert difference < 1e-6  # weights move by up to 1e-2 a step


def test_two_phases(runs_material: Material, tmp_path: Path) -> None:
    """The second phase starts from the first one's weights, and from nothing else, at another layout."""
    freeze = ["vision_tower", "language_model"]
    first = runs.train("TP2", runs_material.settings(tmp_path / "first", train={"freeze": freeze, "steps": 3}))
    change = {"freeze": ["vision_tower"], "steps": 2, "init_from": str(tmp_path / "first"), "global_batch_size": 5, "seed": 8}
    second = runs_material.settings(tmp_path / "second", train=change)
    begin = started("PP2", second)
    for name, tensor in first.weights.items():
        assert torch.equal(begin[name], tensor), name
    assert len(runs.train("PP2", second).losses) == 2


def test_from_hugging_face(runs_material: Material, tmp_path: Path) -> None:
    """Weights come from a folder of transformers, and what it holds beside them stays with every checkpoint."""
    first = runs.train("1", runs_material.settings(tmp_path / "first", train={"steps": 2}))
    newest = checkpoint_folder.newest(tmp_path / "first")
    assert newest is not None
    export_hf(newest, tmp_path / "hf", compare_logits=False)
    settings = runs_material.settings(tmp_path / "second", train={"steps": 1, "init_from": str(tmp_path / "hf")})
    begin = started("TP2", settings)
    for name, tensor in first.weights.items():
        assert torch.equal(begin[name], tensor), name
    runs.train("TP2", settings)
    saved = checkpoint_folder.newest(tmp_path / "second")
    assert saved is not None
    assert (saved / "hf" / "config.json").is_file() and (saved / "tokenizer" / "tokenizer.model").is_file()
