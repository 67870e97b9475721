"""Transformer Engine's kernels by their definitions, on a CPU: what its Python finds as ``transformer_engine_torch``.

Names, orders of arguments and results are those its own Python uses (``pytorch/cpp_extensions``, ``pytorch/module``,
``pytorch/optimizers`` of 2.11.0). Products and sums are taken in float32. A kernel that no test needs raises when it is called.

Shape suffixes: T rows (tokens), I inputs and O outputs of a linear.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from te_attention_kernels import *  # noqa: F403
from te_fp8_kernels import *  # noqa: F403
from te_fp8_kernels import values
from te_types import *  # noqa: F403
from te_types import TORCH, CommOverlapType, DType
from torch import Tensor


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"the kernel {name} is not defined in tests/te/te_kernels.py")

    return missing


def get_cublasLt_version() -> int:  # noqa: N802 (its name)
    return 130000


def get_cudnn_version() -> int:
    return 91500


def get_num_cublas_streams() -> int:
    return 4


def get_stream_priority_range(device: Any = None) -> tuple[int, int]:
    return 0, -1


def device_supports_multicast(device: Any = None) -> bool:
    return True


def ubuf_built_with_mpi() -> bool:
    return False


# ---- norms ----


def _finished(result: Tensor, out: Any, quantizer: Any, dtype: DType) -> Any:
    result = result.to(TORCH[dtype])
    if quantizer is not None:
        return quantizer(result) if out is None else quantizer.update_quantized(result, out)
    return result if out is None else out.copy_(result)


def layernorm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Any, quantizer: Any, dtype: DType, margin: int, centred: bool
) -> tuple[Any, Tensor, Tensor]:
    mean = x.float().mean(-1)
    rstd = (x.float().var(-1, unbiased=False) + eps).rsqrt()
    result = (x.float() - mean[..., None]) * rstd[..., None] * (weight.float() + centred) + bias.float()
    return _finished(result, out, quantizer, dtype), mean, rstd


def layernorm_bwd(
    gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, margin: int, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    normalised = (x.float() - mean[..., None]) * rstd[..., None]
    into = gradient.float() * (weight.float() + centred)
    dx = (into - into.mean(-1, keepdim=True) - normalised * (into * normalised).mean(-1, keepdim=True)) * rstd[..., None]
    of_weight, of_bias = (gradient.float() * normalised).sum(0), gradient.float().sum(0)
    return dx.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype)


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: DType, margin: int, centred: bool
) -> tuple[Any, None, Tensor]:
    rstd = (x.float().square().mean(-1) + eps).rsqrt()
    return _finished(x.float() * rstd[..., None] * (weight.float() + centred), out, quantizer, dtype), None, rstd


def rmsnorm_bwd(gradient: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, margin: int, centred: bool) -> tuple[Tensor, Tensor]:
    normalised = x.float() * rstd[..., None]
    into = gradient.float() * (weight.float() + centred)
    dx = (into - normalised * (into * normalised).mean(-1, keepdim=True)) * rstd[..., None]
    return dx.to(x.dtype), (gradient.float() * normalised).sum(0).to(weight.dtype)


# ---- products, and what ranks exchange meanwhile ----


class CommOverlapHelper:
    def __init__(self, world: Any, neighbours: Any = None) -> None:
        self.group = neighbours or world


class CommOverlap:
    """A buffer [T, I] of which each rank of a group fills its part. Here nothing overlaps: the exchange comes before the product
    or after it."""

    def __init__(
        self, shape: list[int], dtype: torch.dtype, helper: CommOverlapHelper, ranks: int, kind: Any = None, **how: Any
    ) -> None:
        self.buffer, self.group = torch.zeros(shape, dtype=dtype), helper.group
        assert self.group.size() == ranks and len(self.buffer) % (ranks * how.get("num_splits", 1)) == 0

    def _part(self, of: Tensor) -> Tensor:
        return of.chunk(self.group.size())[self.group.rank()]

    def is_fp8_ubuf(self) -> bool:
        return self.buffer.dtype == torch.uint8

    def copy_into_buffer(self, tensor: Tensor, local_chunk: bool = False) -> None:
        into = self._part(self.buffer) if local_chunk else self.buffer
        assert (tensor.numel(), tensor.dtype) == (into.numel(), into.dtype)
        into.copy_(tensor.reshape(into.shape))

    def get_buffer(self, local_chunk: bool = False, shape: Any = None) -> Tensor:
        found = self._part(self.buffer) if local_chunk else self.buffer
        return found if shape is None else found.view(shape)

    def get_communication_stream(self) -> tuple[Any, Any]:
        return contextlib.nullcontext(), contextlib.nullcontext()

    def gather(self) -> None:
        torch.distributed.all_gather_into_tensor(self.buffer, self._part(self.buffer).clone(), group=self.group)

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        whole = whole.clone()
        torch.distributed.all_reduce(whole, group=self.group)
        return self._part(whole)


class CommOverlapP2P(CommOverlap):
    pass


def bulk_overlap_ag_with_external_gemm(overlap: CommOverlap, send: Any, receive: Any) -> None:
    overlap.gather()


def generic_gemm(
    a: Any,
    a_transposed: bool,
    b: Any,
    b_transposed: bool,
    out: Tensor | None,
    quantizer: Any,
    dtype: DType | None,
    bias: Tensor | None,
    bias_dtype: DType,
    gelu: bool,
    gelu_in: Any,
    is_backward: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    *,
    comm_overlap: CommOverlap | None = None,
    comm_type: CommOverlapType | None = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, Tensor | None, None, Tensor | None]:
    """b a, or with either transposed (cuBLAS counts in columns, so a comes second): inputs TI and weights OI ("TN") make TO."""
    assert not gelu
    scatters = comm_overlap is not None and comm_type == CommOverlapType["RS"]
    if comm_overlap is not None and not scatters:
        comm_overlap.gather()
    left, right = values(b, columns=b_transposed), values(a, columns=not a_transposed)
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    product = (left.t() if b_transposed else left) @ (right.t() if a_transposed else right) * alpha
    bias_gradient = None
    if bias is not None and is_backward:
        bias_gradient = left.sum(0).to(TORCH[bias_dtype])
    elif bias is not None and bias.numel():
        product = product + bias.float()
    if scatters and not bulk_overlap:
        extra_output.copy_(comm_overlap.reduce_scatter(product).reshape(extra_output.shape))
        return product, bias_gradient, None, extra_output
    if scatters:  # what is in the buffer, beside a product that has nothing to do with it
        part = comm_overlap.reduce_scatter(comm_overlap.buffer)
        into = comm_overlap.get_buffer(local_chunk=True) if extra_output is None else extra_output
        into.copy_(part.reshape(into.shape))
    if out is not None:
        product = product.reshape(out.shape).to(out.dtype)
        return (out.add_(product) if accumulate else out.copy_(product)), bias_gradient, None, extra_output
    shape = product.shape if b_transposed else (*b.size()[:-1], product.shape[-1])
    product = product.reshape(shape).to(a.dtype if dtype is None else TORCH[dtype])
    return (product if quantizer is None else quantizer(product)), bias_gradient, None, extra_output


# ---- optimizer ----


def multi_tensor_l2norm(chunk: int, flag: Tensor, lists: list[list[Tensor]], per_tensor: bool = False) -> tuple[Tensor, Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]]) if lists[0] else torch.zeros(0)
    return norms.norm().reshape(1), norms


def multi_tensor_scale(chunk: int, flag: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)


def multi_tensor_adam(
    chunk: int,
    flag: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    decay: float,
) -> None:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""
    assert mode == bias_correction == 1
    for gradient, parameter, mean, square in zip(*lists, strict=True):
        gradient = gradient.float()
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        direction = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps)
        parameter.sub_(lr * (direction + decay * parameter))
