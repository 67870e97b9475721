"""Flash attention over packed samples: one kernel launch a layer, however many samples a stream holds. CUDA, 16-bit types.

FlashAttention-2 (Dao, 2023), from torch itself (``torch.nn.attention.varlen``) or from the package flash-attn.

Shape suffixes: T tokens of a stream, N query heads, G key/value heads, D width of a head, K samples.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, tuple[int, int], float | None], Tensor]


@functools.cache
def torch_kernel() -> Kernel | None:
    """Torch's own, or None where this torch has none with a scale and a causal window (2.10 and earlier)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    accepted = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= accepted.keys():
        return None

    def attend(
        query_TND: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        ends_K: Tensor,
        longest: int,
        sides: tuple[int, int],
        scale: float | None,
    ) -> Tensor:
        options: dict[str, Any] = {"scale": scale, "window_size": sides}
        if query_TND.shape[1] != key_TGD.shape[1]:
            if "enable_gqa" in accepted:
                options["enable_gqa"] = True
            else:
                times = query_TND.shape[1] // key_TGD.shape[1]
                key_TGD, value_TGD = key_TGD.repeat_interleave(times, 1), value_TGD.repeat_interleave(times, 1)
        return cast(Tensor, varlen_attn(query_TND, key_TGD, value_TGD, ends_K, ends_K, longest, longest, **options))

    return attend


@functools.cache
def package_kernel() -> Kernel | None:
    """That of the package flash-attn, or None where it is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_varlen_func

    def attend(
        query_TND: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        ends_K: Tensor,
        longest: int,
        sides: tuple[int, int],
        scale: float | None,
    ) -> Tensor:
        return flash_attn_varlen_func(
            query_TND,
            key_TGD,
            value_TGD,
            ends_K,
            ends_K,
            longest,
            longest,
            softmax_scale=scale,
            causal=sides[1] == 0,
            window_size=sides,
        )

    return attend


def flash_attention(
    query_TND: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    ends_K: Tensor,
    longest: int,
    causal: bool,
    scale: float | None,
    window: int | None = None,
) -> Tensor:
    """softmax(q k^T scale) v within each sample: [T, N, D], bfloat16 or float16 on CUDA.

    Args:
        query_TND: queries; N is a multiple of G.
        key_TGD: keys.
        value_TGD: values.
        ends_K: where samples begin and end, [K + 1], int32, on the device.
        longest: tokens of the longest sample.
        causal: whether a token sees only itself and what is before it in its sample.
        scale: None is 1 / sqrt(D).
        window: tokens that a token of a causal sample sees, itself included (None: all before it).

    Raises:
        RuntimeError: neither torch nor flash-attn has a kernel (``models.backend.backend_problems`` says so at the start).
    """
    kernel = torch_kernel() or package_kernel()
    if kernel is None:
        raise RuntimeError("no flash attention here; use torch >= 2.11, install flash-attn, or set precision.attention=sdpa")
    before = -1 if window is None else window - 1
    return kernel(query_TND, key_TGD, value_TGD, ends_K, longest, (before, 0) if causal else (-1, -1), scale)
