"""Our AdamW against torch's."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from llava_mcore.platform.adam import FusedAdam


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (11,), (1,), (64, 64))]


@pytest.mark.parametrize(("betas", "eps", "decay"), [((0.9, 0.999), 1e-8, 0.1), ((0.8, 0.95), 1e-4, 0.0)])
def test_bit_for_bit(betas: tuple[float, float], eps: float, decay: float) -> None:
    ours, theirs = parameters(), parameters()
    options = {"lr": 1e-2, "betas": betas, "eps": eps}
    optimizers = [
        kind([{"params": group[:2], "weight_decay": decay}, {"params": group[2:], "weight_decay": 0.0}], **options)
        for kind, group in ((FusedAdam, ours), (partial(torch.optim.AdamW, fused=True), theirs))
    ]
    generator = torch.Generator().manual_seed(3)
    for step in range(20):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = other.grad = torch.randn(mine.shape, generator=generator)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            optimizer.step()
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)), step
    assert [group["step"] for group in optimizers[0].param_groups] == [20, 20]
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in optimizers[0].state.values())


def test_what_has_no_gradient_stays() -> None:
    still, moving = parameters()[:2]
    before = still.detach().clone()
    moving.grad = torch.ones_like(moving)
    optimizer = FusedAdam([still, moving], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(still, before) and still not in optimizer.state and moving in optimizer.state


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"adam_w_mode": False}, {"bias_correction": False}])
def test_what_it_cannot_do_is_refused(options: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="decoupled weight decay"):
        FusedAdam(parameters(), **options)
