"""Every layout against one process: losses, gradients, gradient norm, and the weights after five optimizer steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import ranks

sys.path.insert(0, str(Path(__file__).parent))

import oracle  # noqa: E402
import ours  # noqa: E402

from llava_mcore.settings.compose import from_dict  # noqa: E402
from llava_mcore.settings.schema import Settings  # noqa: E402

STEPS = 5
# Eight streams with uneven labels and pictures: text only, several pictures, many as a video has, nothing but padding.
STREAMS = [[0, 1, 3], [2, 6], [4, 5], [7], [8], [], [6, 3], [1, 0, 6, 3]]
LENGTH = 112

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2, "sequence": False}),
    "TP2+SP": (2, {"tensor": 2}),
    "TP2+SP encoder split": (2, {"tensor": 2, "encoder": "tensor_parallel"}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 uneven": (2, {"pipeline": 2, "pipeline_split": [1, 3]}),
    "PP2 VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "CP2 ring": (2, {"context": 2, "context_exchange": "ring"}),
    "DP2": (2, {}),
    "DP2 overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "TP2 PP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2 PP2 VPP2": (4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}),
    "TP2 CP2": (4, {"tensor": 2, "context": 2}),
    "TP2 CP2 ring encoder split": (4, {"tensor": 2, "context": 2, "context_exchange": "ring", "encoder": "tensor_parallel"}),
    "TP2 DP2": (4, {"tensor": 2}),
    "PP4": (4, {"pipeline": 4}),
    "PP4 no layer beside the encoder": (4, {"pipeline": 4, "pipeline_split": [0, 1, 2, 1]}),
    "PP2 CP2": (4, {"pipeline": 2, "context": 2}),
    "PP2 VPP2 CP2": (4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2}),
    "PP2 VPP2 uneven DP2": (4, {"pipeline": 2, "virtual_pipeline": 2, "pipeline_split": [0, 2, 1, 1]}),
    "CP4": (4, {"context": 4}),
    "CP4 ring": (4, {"context": 4, "context_exchange": "ring"}),
    "CP2 DP2 overlap": (4, {"context": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "TP2 PP2 CP2": (8, {"tensor": 2, "pipeline": 2, "context": 2}),
    "TP2 PP2 CP2 VPP2 ring": (8, {"tensor": 2, "pipeline": 2, "context": 2, "virtual_pipeline": 2, "context_exchange": "ring"}),
    "TP2 CP2 DP2": (8, {"tensor": 2, "context": 2}),
    "PP2 VPP2 CP2 DP2": (8, {"pipeline": 2, "virtual_pipeline": 2, "context": 2}),
    "TP2 PP2 DP2": (8, {"tensor": 2, "pipeline": 2}),
}

# Float32 sums in another order; five steps of AdamW keep what they differ by. Measured: see the README.
TOLERANCE = 1e-5


def settings(parallel: dict[str, Any], **train: Any) -> Settings:
    """A model with an odd number of queries a group, a vocabulary that needs padding, and a tied head."""
    return from_dict(
        {
            "model": {
                "vision": {
                    "image_size": oracle.IMAGE_SIZE,
                    "patch_size": oracle.PATCH,
                    "hidden_size": 24,
                    "ffn_hidden_size": 36,
                    "num_layers": 3,
                    "num_attention_heads": 2,
                },
                "projector": {"type": "mlp2x_gelu"},
                "language": {
                    "hidden_size": 32,
                    "ffn_hidden_size": 52,
                    "num_layers": 4,
                    "num_attention_heads": 6,
                    "num_query_groups": 2,
                    "kv_channels": 8,
                    "vocab_size": 101,
                    "max_position_embeddings": 256,
                    "tie_word_embeddings": True,
                },
                "image_token_id": oracle.IMAGE_TOKEN,
                "init_std": 0.1,
            },
            "data": {"sequence_length": LENGTH},
            # Softmax does not see a bias of the keys: its gradient is rounding, which Adam's usual epsilon makes full steps of.
            "train": {"lr": 1e-3, "steps": STEPS, "dtype": "float32", "warmup_ratio": 0.2, "adam_eps": 1e-4, **train},
            "parallel": parallel,
        }
    )


def batches() -> list:
    """The streams as micro-batches of one stream each."""
    samples = oracle.make_samples()
    many = torch.cat([torch.full((5 * oracle.PATCHES,), oracle.IMAGE_TOKEN), torch.arange(20, 26)])
    labels = many.roll(-1)
    labels[-1] = -100
    labels[labels == oracle.IMAGE_TOKEN] = -100
    pixels = torch.randn(5, 3, oracle.IMAGE_SIZE, oracle.IMAGE_SIZE, generator=torch.Generator().manual_seed(3))
    return oracle.pack([*samples, oracle.Sample(many, labels, pixels)], STREAMS, LENGTH)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same on one process."""
    (result,) = ranks(1).run(ours.train, settings({}), batches(), STEPS)
    return {**result, "gradients": ours.assemble(result["gradients"]), "weights": ours.assemble(result["weights"])}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_process(alone: dict[str, Any], layout: str) -> None:
    size, parallel = LAYOUTS[layout]
    worst = largest_differences(ranks(size).run(ours.train, settings(parallel), batches(), STEPS), alone)
    print(f"\n{layout} ({size}): " + ", ".join(f"{what} {value:.1e}" for what, value in worst.items()))
    assert max(worst.values()) < TOLERANCE, worst


BOTH = ["language_model", "vision_tower"]
RECOMPUTED = {
    "attention": {"recompute": "selective"},
    "parts of both": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"], "recompute_in": BOTH},
    "layers": {"recompute": "full"},
    "layers of both": {"recompute": "full", "recompute_in": BOTH},
}


@pytest.mark.parametrize("kind", RECOMPUTED)
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "context": 2}], ids=["1", "TP2 CP2"])
def test_recompute_changes_nothing(kind: str, parallel: dict[str, Any]) -> None:
    size = settings(parallel).parallel.model_ranks
    plain, again = (
        ranks(size).run(ours.train, settings(parallel, **train), batches()[:4], 1) for train in ({}, RECOMPUTED[kind])
    )
    for one, other in zip(plain, again, strict=True):
        assert one["losses"] == other["losses"]
        for (name, *_, before), (*_, after) in zip(one["gradients"], other["gradients"], strict=True):
            # Recomputed layers of the tower hand the biases of a residual sum their gradients in another order of memory.
            rtol = 1e-6 if kind == "layers of both" and name.startswith("vision_tower") and name.endswith("bias") else 0.0
            assert float((before - after).abs().max()) <= rtol * float(before.abs().max()), name


@pytest.mark.parametrize("freeze", [["vision_tower", "language_model"], ["vision_tower"], ["vision_tower", "projector"]])
@pytest.mark.parametrize("parallel", [{"pipeline": 4}, {"tensor": 2, "context": 2}], ids=["PP4", "TP2 CP2"])
def test_frozen_parts(freeze: list[str], parallel: dict[str, Any]) -> None:
    results = ranks(4).run(ours.train, settings(parallel, freeze=freeze), batches(), 2)
    (reference,) = ranks(1).run(ours.train, settings({}, freeze=freeze), batches(), 2)
    expected = ours.assemble(reference["weights"])
    for name, tensor in ours.assemble([shard for result in results for shard in result["weights"]]).items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-5 * max(1e-3, float(expected[name].abs().max()))), name


@pytest.mark.parametrize(
    "layout", ["TP2+SP", "PP2 VPP2", "CP2", "CP2 ring", "TP2 CP2", "CP4 ring", "PP2 VPP2 CP2", "TP2 PP2 CP2"]
)
def test_no_leak_between_samples(layout: str) -> None:
    """Another text in one sample of a stream moves no bit of its neighbours' losses."""
    size, parallel = LAYOUTS[layout]
    before, after = batches()[:2] * 2, batches()[:2] * 2
    start, end = len(oracle.make_samples()[0].input_ids_L), sum(len(oracle.make_samples()[n].input_ids_L) for n in (0, 1))
    changed = after[0]  # streams 0 and 2 are one object: its middle sample gets other words
    words = (changed.input_ids_T != oracle.IMAGE_TOKEN).nonzero()[:, 0]
    words = words[(words >= start) & (words < end)]
    changed.input_ids_T[words] = (changed.input_ids_T[words] + 13) % 80 + 10
    moved, still = 0, 0
    for first, second in ranks(size).run(ours.token_losses, settings(parallel), [before, after]):
        for (number, own, losses), (_, _, others) in zip(first, second, strict=True):
            inside = (own >= start) & (own < end) if number % 2 == 0 else np.zeros(len(own), dtype=bool)
            same = (losses == others).numpy()
            assert same[~inside].all(), f"{layout}: tokens {own[~inside & ~same]} of stream {number} moved"
            moved += int((~same[inside]).sum())
            still += int((losses.numpy()[~inside] != 0).sum())
    assert moved > 0 and still > 0


def largest_differences(results: list[dict[str, Any]], alone: dict[str, Any]) -> dict[str, float]:
    """What the ranks' training gives against one process's (``alone``), relative to the largest value of each tensor."""
    worst = {"loss": 0.0, "norm": 0.0, "gradients": 0.0, "weights": 0.0}
    for result in results:
        if result["last"]:
            worst["loss"] = max(worst["loss"], difference(result["losses"], alone["losses"]))
        worst["norm"] = max(worst["norm"], difference(result["norms"], alone["norms"]))
    largest = max(float(tensor.abs().max()) for tensor in alone["gradients"].values())
    for what, floor in (("gradients", 1e-3 * largest), ("weights", 1e-3)):
        whole = ours.assemble([shard for result in results for shard in result[what]])
        assert whole.keys() == alone[what].keys()
        for name, tensor in whole.items():
            expected = alone[what][name]
            worst[what] = max(worst[what], float((tensor - expected).abs().max() / expected.abs().max().clamp(min=floor)))
    return worst


def difference(some: list[float], others: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(one - other) / abs(other) for one, other in zip(some, others, strict=True))
