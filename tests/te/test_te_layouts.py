"""The layers of Transformer Engine against torch's on one process, in float32: losses, gradients, norm, weights after five steps.

Real but for the kernels; see te_on_cpu.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import ranks

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "models")]

import ours  # noqa: E402
from te_on_cpu import HOPPER, needs_te  # noqa: E402
from test_experts import experts  # noqa: E402
from test_layouts import RECOMPUTED, STEPS, TOLERANCE, batches, largest_differences, settings  # noqa: E402

from llava_mcore.settings.model import RopeScaling  # noqa: E402
from llava_mcore.settings.schema import PrecisionSettings, Settings  # noqa: E402

pytestmark = needs_te

Layout = tuple[int, dict[str, Any]]
LAYOUTS: dict[str, Layout] = {
    "1": (1, {}),
    "TP2": (2, {"tensor": 2, "sequence": False}),
    "TP2+SP": (2, {"tensor": 2}),
    "TP2+SP encoder split": (2, {"tensor": 2, "encoder": "tensor_parallel"}),
    "TP2+SP communication overlapped": (2, {"tensor": 2, "tp_comm_overlap": True}),
    "PP2 VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "DP2 overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "CP2": (2, {"context": 2}),
    "CP2 p2p": (2, {"context": 2, "context_exchange": "p2p"}),
    "CP2 a2a": (2, {"context": 2, "context_exchange": "a2a"}),
    "CP4 p2p": (4, {"context": 4, "context_exchange": "p2p"}),
    "TP2 CP2 p2p": (4, {"tensor": 2, "context": 2, "context_exchange": "p2p"}),
    "TP2 CP2 communication overlapped": (4, {"tensor": 2, "context": 2, "tp_comm_overlap": True}),
    "TP2 PP2 VPP2": (4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}),
    "TP2 PP2 communication overlapped": (4, {"tensor": 2, "pipeline": 2, "tp_comm_overlap": True}),
    "PP2 VPP2 CP2 p2p": (4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2, "context_exchange": "p2p"}),
    "PP2 VPP2 CP2 a2a": (4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2, "context_exchange": "a2a"}),
}
EXPERTS: dict[str, Layout] = {
    "1": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "CP2 EP2": (2, {"context": 2, "expert": 2}),
    "TP2 EP2": (4, {"tensor": 2, "expert": 2}),
    "PP2 EP2": (4, {"pipeline": 2, "expert": 2}),
}


def by_te(run: Settings) -> Settings:
    """The run with Transformer Engine's layers."""
    return replace(run, precision=PrecisionSettings(backend="transformer_engine"))


def train(run: Settings, *arguments: Any) -> dict[str, Any]:
    """``ours.train`` on a rank."""
    import te_on_cpu

    from llava_mcore.models import transformer_engine

    te_on_cpu.forget()
    if run.parallel.tp_comm_overlap:
        transformer_engine.reserve_user_buffers(run)
    with te_on_cpu.attention_in_float32():
        return ours.train(run, *arguments)


def one_process(run: Settings, steps: int = STEPS) -> dict[str, Any]:
    """What torch's layers give on one process."""
    (result,) = ranks(1).run(ours.train, run, batches(), steps)
    return {**result, "gradients": ours.assemble(result["gradients"]), "weights": ours.assemble(result["weights"])}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return one_process(settings({}))


@pytest.fixture(scope="module")
def alone_with_experts() -> dict[str, Any]:
    return one_process(experts({}), experts({}).train.steps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_torchs_layers_on_one_process(alone: dict[str, Any], layout: str) -> None:
    size, parallel = LAYOUTS[layout]
    worst = largest_differences(ranks(size, HOPPER).run(train, by_te(settings(parallel)), batches(), STEPS), alone)
    print(f"\n{layout} ({size}): " + ", ".join(f"{what} {value:.1e}" for what, value in worst.items()))
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("layout", EXPERTS)
def test_experts(alone_with_experts: dict[str, Any], layout: str) -> None:
    size, parallel = EXPERTS[layout]
    run = by_te(experts(parallel))
    worst = largest_differences(ranks(size, HOPPER).run(train, run, batches(), run.train.steps), alone_with_experts)
    # Norms are summed in another order too, and Adam makes the most of it in experts that few tokens came to.
    assert worst.pop("weights") < 2 * TOLERANCE and max(worst.values()) < TOLERANCE, worst


FAMILIES: dict[str, dict[str, Any]] = {
    "q/k/v biases": {"family": "qwen2", "qkv_bias": True},
    "q/k norm": {"family": "qwen3", "qk_norm": True},
    "a sliding window": {"family": "mistral", "sliding_window": 5},
    "half of a head turned": {"family": "phi3", "rotary_percent": 0.5},
    "yarn": {
        "family": "qwen2",
        "qkv_bias": True,
        "rope_scaling": RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=64),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_decoder(family: str) -> None:
    base = settings({})
    run = replace(base, model=replace(base.model, language=replace(base.model.language, **FAMILIES[family])))
    worst = largest_differences(ranks(1, HOPPER).run(train, by_te(run), batches(), 1), one_process(run, 1))
    assert max(worst["loss"], worst["norm"], worst["gradients"]) < TOLERANCE, worst


@pytest.mark.parametrize("kind", RECOMPUTED)
def test_recompute_changes_nothing(kind: str) -> None:
    (plain,), (again,) = (
        ranks(1, HOPPER).run(train, by_te(settings({}, **how)), batches()[:4], 2) for how in ({}, RECOMPUTED[kind])
    )
    assert (plain["losses"], plain["norms"]) == (again["losses"], again["norms"])
