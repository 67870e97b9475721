"""AdamW with the state layout Megatron-Core's distributed optimizer expects, for machines without a fused Adam.

Transformer Engine's and Apex's FusedAdam keep one ``step`` per parameter group and ``exp_avg``/``exp_avg_sq`` per parameter;
torch's AdamW keeps a ``step`` per parameter, and loading a resharded checkpoint then fails (``KeyError: 'step'``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """Decoupled weight decay Adam (Loshchilov & Hutter, 2019), one ``step`` a group; the arithmetic is torch's own ``adamw``.

    Args:
        params: float32 parameters or groups of them.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        bias_correction, adam_w_mode: must be true; here because Megatron-Core passes them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        **unknown: Any,
    ) -> None:
        if unknown or not (bias_correction and adam_w_mode):
            raise ValueError(f"this Adam has bias correction and decoupled weight decay and takes nothing else, got {unknown}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            # adamw adds one to each step; the groups count instead, so it gets throw-away copies one behind.
            steps = [torch.tensor(float(group["step"] - 1), device=p.device) for p in params]
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                steps,
                fused=True,
                foreach=False,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def install() -> list[str]:
    """Puts :class:`FusedAdam` where Megatron-Core looks for a fused Adam; a second call changes nothing."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    return ["AdamW in FusedAdam's layout, as neither Transformer Engine nor Apex is installed"]
