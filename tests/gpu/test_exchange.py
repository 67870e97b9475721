"""On two GPUs: context-parallel ranks give what one gives, by our exchange or Transformer Engine's, and keep samples apart."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ranks import ranks

sys.path.insert(0, str(Path(__file__).parent))

import subject  # noqa: E402

from llava_mcore.models.backend import problems_here  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: NCCL has room for one rank on each")

TORCH, TE = ["precision.backend=torch"], ["precision.backend=transformer_engine"]
EXCHANGES = {
    "all_gather": [*TORCH, "parallel.context_exchange=all_gather"],
    "ring": [*TORCH, "parallel.context_exchange=ring"],
    "ring beside Transformer Engine's layers": [*TE, "parallel.context_exchange=ring"],
    "p2p": [*TE, "parallel.context_exchange=p2p"],
    "p2p, fused": [*TE, "parallel.context_exchange=p2p", "precision.attention=fused"],
    "p2p, flash": [*TE, "parallel.context_exchange=p2p", "precision.attention=flash"],
    "p2p, recomputed": [*TE, "parallel.context_exchange=p2p", "train.recompute=selective"],
    "a2a": [*TE, "parallel.context_exchange=a2a"],
    "a2a, fused": [*TE, "parallel.context_exchange=a2a", "precision.attention=fused"],
    "a2a, flash": [*TE, "parallel.context_exchange=a2a", "precision.attention=flash"],
    "a2a, a sliding window": [
        *TE,
        "parallel.context_exchange=a2a",
        "model.language.family=mistral",
        "model.language.sliding_window=64",
    ],
}
BF16 = 0.03  # as in test_backends.py

# On a rank: the tokens it holds, their losses in the batch and in those where one sample was changed, and all gradients.
Found = tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]


def compute(overrides: list[str]) -> Found:
    """Runs on the ranks."""
    built = subject.Subject(subject.settings(*overrides))
    losses = [built.token_losses(subject.batch(changed)).cpu() for changed in (None, 0, 1, 2)]
    gradients = {name: value.cpu() for name, value in built.result().gradients.items()}
    found = built.own_tokens(), losses, gradients
    built.close()
    return found


def whole(found: list[Found]) -> list[torch.Tensor]:
    """The losses of all tokens, in the order of the stream, of each batch."""
    tokens = sum(subject.LENGTHS)
    streams = [torch.full((tokens + 1,), torch.nan) for _ in found[0][1]]  # the last takes the padding
    for own, losses, _ in found:
        for stream, part in zip(streams, losses, strict=True):
            stream[own] = part
    return [stream[:tokens] for stream in streams]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; no token is missing."""
    assert not ours.isnan().any()
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-12))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_two_ranks_are_one(exchange: str) -> None:
    overrides = EXCHANGES[exchange]
    two = [*overrides, "parallel.context=2"]
    if problems := problems_here(subject.settings(*two)):
        pytest.skip("; ".join(problems))
    window = [text for text in overrides if text.startswith("model.")]
    alone = ranks(1).run(compute, [*TORCH, "precision.attention=sdpa", "train.dtype=float32", *window])
    found = ranks(2).run(compute, two)
    losses, reference = whole(found), whole(alone)
    assert relative(losses[0], reference[0]) < BF16
    theirs = alone[0][2]
    for _, _, gradients in found:
        assert gradients.keys() == theirs.keys()
        assert (
            relative(*(torch.cat([value.flatten() for _, value in sorted(each.items())]) for each in (gradients, theirs)))
            < 2 * BF16
        )
    for changed in range(3):
        pairs = zip(losses[0].split(subject.LENGTHS), losses[1 + changed].split(subject.LENGTHS), strict=True)
        for number, (before, after) in enumerate(pairs):
            assert torch.equal(before, after) == (number != changed), f"sample {changed} changed, sample {number} moved"
