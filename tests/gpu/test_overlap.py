"""On two GPUs: tensor-parallel communication beside the products changes nothing but rounding."""

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

BF16, FP8 = 0.03, 0.15  # as in test_backends.py; FP8's scales are those of other parts of a tensor


def gradients(overrides: list[str]) -> torch.Tensor:
    """Runs on the ranks."""
    built = subject.Subject(subject.settings(*overrides))
    found = torch.cat([value.flatten().cpu() for _, value in sorted(built.result().gradients.items())])
    built.close()
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [([], BF16), (["precision=fp8_hybrid"], FP8)], ids=["bfloat16", "FP8"])
def test_overlapped_is_plain(precision: list[str], tolerance: float) -> None:
    plain = ["precision.backend=transformer_engine", "parallel.tensor=2", *precision]
    overlapped = [*plain, "parallel.tp_comm_overlap=true"]
    if problems := problems_here(subject.settings(*overlapped)):
        pytest.skip("; ".join(problems))
    for ours, theirs in zip(*(ranks(2).run(gradients, overrides) for overrides in (overlapped, plain)), strict=True):
        assert (ours - theirs).norm() < tolerance * theirs.norm()
