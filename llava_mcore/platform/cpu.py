"""Megatron-Core over gloo: every replacement that lets its own code run where there is no CUDA, each with its reason.

Written for Megatron-Core 0.16.1. Nothing here is applied where CUDA is present. The numbers do not change: each entry names
another device, stands for a call or a process that has nothing to do on a CPU, or for a CUDA kernel by its definition.
"""

from __future__ import annotations

import functools
import importlib
import queue
import types
from typing import Any

import torch

CPU = torch.device("cpu")

# Modules of Megatron-Core that call torch's factory functions with the literal device "cuda".
MODULES_WITH_CUDA_LITERALS = (
    "pipeline_parallel.schedules",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "distributed.param_and_grad_buffer",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.mapping",
    "dist_checkpointing.strategies.state_dict_saver",
    "tensor_parallel.data",
    "transformer.utils",
    "rerun_state_machine",
    "utils",
)

_applied: list[str] = []


def apply() -> list[str]:
    """Applies all replacements once and returns one line for each."""
    if not _applied:
        for change in (
            _current_device,
            _factories,
            _moves,
            _random_state,
            _type_names,
            _no_compile,
            _write_results,
            _lone_ranks,
            _weight_gradients,
            _gated_gradients,
        ):
            change()
            _applied.append((change.__doc__ or change.__name__).strip())
    return list(_applied)


def _current_device() -> None:
    """torch.cuda.current_device() is the CPU: Megatron-Core passes its result as a device in about 175 places."""
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]


def _factories() -> None:
    """Tensors that Megatron-Core makes with device="cuda" are made on the CPU."""
    # Only its own modules see this torch: others in the process (transformers) compare torch's functions by identity.
    torch_on_cpu = TorchOnCpu("torch")
    for name in MODULES_WITH_CUDA_LITERALS:
        importlib.import_module(f"megatron.core.{name}").torch = torch_on_cpu  # type: ignore[attr-defined]


class TorchOnCpu(types.ModuleType):
    """torch, but its factory functions take device="cuda" for the CPU."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("tensor", "empty", "empty_like", "zeros", "zeros_like", "ones", "ones_like", "full"):
            return found

        @functools.wraps(found)
        def make(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = CPU
            return found(*args, **kwargs)

        return make


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


def _write_results() -> None:
    """Results of a checkpoint write come through a queue of this process, not through a manager of its own."""
    # The manager is, on every rank, a new process that imports everything again (seconds, hundreds of MiB) and outlives a killed
    # run. A write that is waited for needs no more than a queue.
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


def _lone_ranks() -> None:
    """Gathering parameters and reducing gradients over a group of one rank, in place, is nothing to do."""
    # Gloo copies the whole buffer to itself, twice: a tenth of a step where there is no data parallelism.
    from megatron.core.distributed import param_and_grad_buffer as buffers

    def unless_alone(collective: Any) -> Any:
        @functools.wraps(collective)
        def run(output: torch.Tensor, given: torch.Tensor, *, group: Any, **options: Any) -> Any:
            if group.size() == 1 and output.data_ptr() == given.data_ptr():
                return None
            return collective(output, given, group=group, **options)

        return run

    buffers.dist_all_gather_func = unless_alone(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = unless_alone(buffers.dist_reduce_scatter_func)


def _weight_gradients() -> None:
    """Weight gradients are added to the float32 buffer by the matrix product itself, as Apex's kernel does on CUDA."""
    from megatron.core.tensor_parallel import layers

    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)
    layers._grad_accum_fusion_available = True


def _gated_gradients() -> None:
    """The gradient of SwiGLU is put together from torch's own of SiLU: the formula in single operations is fast only compiled."""
    from megatron.core.fusions import fused_bias_swiglu

    fused_bias_swiglu.swiglu_back = swiglu_gradient


def swiglu_gradient(gradient_TF: torch.Tensor, gate_and_up: torch.Tensor) -> torch.Tensor:
    """Gradient of silu(gate) * up, [T, 2F] like its input; T tokens, F width."""
    gate_TF, up_TF = gate_and_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_and_up)
    into_gate_TF, into_up_TF = result.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(gradient_TF * up_TF, gate_TF, grad_input=into_gate_TF)
    torch.mul(gradient_TF, torch.nn.functional.silu(gate_TF), out=into_up_TF)
    return result


def add_weight_gradient(inputs_TI: torch.Tensor, gradients_TO: torch.Tensor, main_grad_OI: torch.Tensor) -> None:
    """Adds gradients^T inputs to a weight's float32 gradient, in place; T tokens, I inputs and O outputs of the layer."""
    if inputs_TI.dtype == torch.float32:
        main_grad_OI.addmm_(gradients_TO.t(), inputs_TI)
    else:  # torch's CPU product gives no float32 for bfloat16
        main_grad_OI.add_(gradients_TO.t().mm(inputs_TI))
