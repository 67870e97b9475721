"""Megatron-Core over gloo: every replacement that lets its own code run where there is no CUDA, each with its reason.

Written for Megatron-Core 0.16.1. Nothing here is applied where CUDA is present. The numbers do not change: each entry either
names another device or stands for a call that has nothing to do on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")

# Factory functions that Megatron-Core calls with the literal device "cuda" (schedules, optimizer, gradient clipping, loading).
FACTORIES = (
    "tensor empty empty_like zeros zeros_like ones ones_like full full_like arange rand rand_like randn randn_like linspace"
).split()

_applied: list[str] = []


def apply() -> list[str]:
    """Applies all replacements once and returns one line for each."""
    if not _applied:
        for change in (_current_device, _factories, _moves, _random_state, _type_names, _no_compile):
            change()
            _applied.append((change.__doc__ or change.__name__).strip())
    return list(_applied)


def _current_device() -> None:
    """torch.cuda.current_device() is the CPU: Megatron-Core passes its result as a device in about 175 places."""
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]


def _factories() -> None:
    """Factory calls with device="cuda" make CPU tensors."""

    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> Any:
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        return make

    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _moves() -> None:
    """Moving to CUDA and waiting for it are nothing to do."""

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    torch.Tensor.cuda = stay  # type: ignore[assignment,method-assign]
    torch.nn.Module.cuda = stay  # type: ignore[assignment,method-assign]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]


def _random_state() -> None:
    """The tracker of random states keeps states of the CPU generator."""
    import megatron.core.tensor_parallel.random as random

    def get(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def put(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get  # type: ignore[assignment]
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = put  # type: ignore[assignment]
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment,return-value]
    random._get_cuda_rng_state = get
    random._set_cuda_rng_state = put


def _type_names() -> None:
    """Tensor.type() reports CUDA type names: the optimizers sort parameters by them."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_name  # type: ignore[assignment,method-assign]


def _no_compile() -> None:
    """torch.compile returns its function: small fusions are not worth a C++ compiler run at the start of every process."""
    import torch._dynamo

    torch._dynamo.config.disable = True
