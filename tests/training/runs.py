"""Small real training runs: their settings, and what the tests run on the ranks and get back."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))

import ours  # noqa: E402

from llava_mcore.parallel import groups as process_groups  # noqa: E402
from llava_mcore.settings.compose import from_dict, to_dict  # noqa: E402
from llava_mcore.settings.schema import Settings  # noqa: E402
from llava_mcore.training.observe import read_metrics  # noqa: E402
from llava_mcore.training.trainer import Trainer  # noqa: E402

MODEL = {
    "vision": {
        "image_size": 28,
        "patch_size": 7,
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_layers": 3,
        "num_attention_heads": 2,
    },
    "projector": {"type": "mlp2x_gelu"},
    "language": {
        "hidden_size": 32,
        "ffn_hidden_size": 56,
        "num_layers": 4,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 211,
        "max_position_embeddings": 448,
    },
    "image_token_id": 3,
}
STEPS = 6
TRAIN = {
    "steps": STEPS,
    "global_batch_size": 7,  # with one or two ranks some get fewer samples, and fewer pictures, than others
    "dtype": "float32",
    "lr": 1e-3,
    "warmup_ratio": 0.2,
    "weight_decay": 0.1,
    # Softmax does not see a bias of the keys: its gradient is rounding, which Adam with its usual epsilon blows up to full steps.
    "adam_eps": 1e-4,
    "save_every": 0,
    "tensorboard": False,
    "log_every": 1000,
}

# Losses and weights of two layouts: the sums are taken in another order. Measured: below 2e-6 after six steps.
TOLERANCE = 1e-5

# Name to world size and settings.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "DP2": (2, {}),
    "DP2+overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2xDP2": (4, {"tensor": 2}),
    "PP2xDP2": (4, {"pipeline": 2}),
    "EP2": (2, {"expert": 2}),
}


@dataclass(frozen=True)
class Material:
    """What every run of the tests reads."""

    shards: Path
    tokenizer: Path

    def settings(self, output_dir: Path, **changes: dict[str, Any]) -> Settings:
        """Settings of a run; ``changes`` are groups (``train={...}``) laid over the defaults above."""
        values: dict[str, Any] = {
            "model": MODEL,
            "data": {"path": str(self.shards), "tokenizer": str(self.tokenizer), "sequence_length": 448, "packing_window": 0},
            "train": {**TRAIN, "output_dir": str(output_dir)},
            "parallel": {},
        }
        for group, change in changes.items():
            values[group] = {**values[group], **change}
        return from_dict(values)


def changed(settings: Settings, **changes: dict[str, Any]) -> Settings:
    """The settings with single values replaced, checked anew: ``changed(settings, train={"steps": 3})``."""
    values = to_dict(settings)
    for group, change in changes.items():
        values[group] |= change
    return from_dict(values)


def weights_of(trainer: Trainer) -> list[tuple]:
    """This rank's weights as shards of the whole model."""
    return ours.shards(trainer.model, trainer.groups, {parameter: parameter.data for parameter in trainer.model.parameters()})


def fit(settings: Settings) -> list[tuple]:
    """On a rank: a whole run; its final weights as shards."""
    trainer = Trainer(settings)
    trainer.fit()
    return weights_of(trainer)


def fit_all(runs: list[Settings]) -> list[list[tuple]]:
    """On a rank: several runs, one after the other, each in new objects."""
    results = []
    for settings in runs:
        results.append(fit(settings))
        process_groups.destroy()
    return results


def refused(settings: Settings, run: Callable[[Settings], Any] = fit) -> tuple[str, str]:
    """On a rank: the type and the message of what a run ends with."""
    try:
        run(settings)
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError("nothing was refused")


@dataclass(frozen=True)
class Result:
    """A run as one process would have seen it."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, torch.Tensor]


def result(settings: Settings, parts: list[list[tuple]]) -> Result:
    """What a run left in its folder, and its weights from all ranks' shards."""
    metrics = read_metrics(settings.train.output_dir)
    return Result(
        [line["loss"] for line in metrics],
        [line["grad_norm"] for line in metrics],
        ours.assemble([shard for part in parts for shard in part]),
    )


def on(layout: str, settings: Settings) -> Settings:
    """The settings at a layout."""
    return replace(settings, parallel=changed(settings, parallel=LAYOUTS[layout][1]).parallel)


def train(layout: str, *runs: Settings) -> Result:
    """Runs at a layout, one after the other in the same processes; the result of the last."""
    placed = [on(layout, settings) for settings in runs]
    answers = ranks(LAYOUTS[layout][0]).run(fit_all, placed)
    return result(placed[-1], [answer[-1] for answer in answers])


def largest_difference(ours_: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of all tensors: the largest difference over the tensor's largest absolute value."""
    assert ours_.keys() == theirs.keys()
    return max(float((ours_[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


def assert_same(ours_: Result, theirs: Result) -> None:
    """To the last bit."""
    assert ours_.losses == theirs.losses
    assert ours_.grad_norms == theirs.grad_norms
    assert ours_.weights.keys() == theirs.weights.keys()
    for name, tensor in theirs.weights.items():
        assert torch.equal(ours_.weights[name], tensor), name


def assert_close(ours_: Result, theirs: Result) -> None:
    """Equal but for the rounding of another layout."""
    assert ours_.losses == pytest.approx(theirs.losses, rel=TOLERANCE)
    assert ours_.grad_norms == pytest.approx(theirs.grad_norms, rel=TOLERANCE)
    assert largest_difference(ours_.weights, theirs.weights) < TOLERANCE


class KeptRuns:
    """Runs of the default settings, each made when first asked for."""

    def __init__(self, material: Material, root: Path) -> None:
        self.material, self.root = material, root
        self._whole: dict[str, Result] = {}
        self._heads: dict[str, Path] = {}

    def whole(self, layout: str, dtype: str = "float32") -> Result:
        """An uninterrupted run."""
        name = f"whole-{layout}-{dtype}"
        if name not in self._whole:
            self._whole[name] = train(layout, self.material.settings(self.root / name, train={"dtype": dtype}))
        return self._whole[name]

    def stopped(self, target: Path, layout: str, dtype: str = "float32") -> Settings:
        """A run that was stopped half way and lies in ``target``; returns the settings to go on with."""
        name = f"head-{layout}-{dtype}"
        if name not in self._heads:
            head = self.material.settings(self.root / name, train={"dtype": dtype, "stop_after": STEPS // 2})
            assert len(train(layout, head).losses) == STEPS // 2
            self._heads[name] = self.root / name
        shutil.copytree(self._heads[name], target)
        return self.material.settings(target, train={"dtype": dtype})
