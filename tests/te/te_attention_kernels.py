"""Attention by its definition, in float32, and what Transformer Engine's ring does with parts of packed samples.

Shape suffixes: T tokens of a stream, Q queries and K keys of a sample, N heads, G key/value heads, D width of a head, S length
and B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from te_types import NVTE_Bias_Type, NVTE_Fused_Attn_Backend, NVTE_Mask_Type, NVTE_QKV_Format, NVTE_QKV_Layout
from torch import Tensor


def get_fused_attn_backend(*_: Any) -> NVTE_Fused_Attn_Backend:
    return NVTE_Fused_Attn_Backend["NVTE_F16_arbitrary_seqlen"]


def _seen(queries: int, keys: int, mask: NVTE_Mask_Type, window: tuple[int, int]) -> Tensor:
    """Which keys a query sees: bool [Q, K]."""
    query, key = torch.arange(queries)[:, None], torch.arange(keys)[None]
    if "BOTTOM_RIGHT" in mask.name:
        query = query + keys - queries
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if "CAUSAL" in mask.name:
        seen &= key <= query
    before, after = window
    if before >= 0:
        seen &= key >= query - before
    if after >= 0:
        seen &= key <= query + after
    return seen


def _weights(query_QND: Tensor, key_KGD: Tensor, seen_QK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scores [N, Q, K], -inf where nothing is seen, and keys [K, N, D], float32."""
    key_KND = key_KGD.float().repeat_interleave(query_QND.shape[1] // key_KGD.shape[1], 1)
    scores = torch.einsum("qnd,knd->nqk", query_QND.float(), key_KND) * scale
    return scores.masked_fill(~seen_QK, float("-inf")), key_KND


def _attend(query_QND: Tensor, key_KGD: Tensor, value_KGD: Tensor, seen_QK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [Q, N, D] and the logarithm of each softmax's sum [N, Q]."""
    scores, _ = _weights(query_QND, key_KGD, seen_QK, scale)
    sums_NQ = scores.logsumexp(-1)
    weights = torch.exp(scores - sums_NQ[..., None]).nan_to_num(0.0)
    value_KND = value_KGD.float().repeat_interleave(query_QND.shape[1] // value_KGD.shape[1], 1)
    return torch.einsum("nqk,knd->qnd", weights, value_KND), sums_NQ


def _attend_back(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, gradient: Tensor, sums_NQ: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values (Dao et al., 2022, appendix B)."""
    scores, key_KND = _weights(query, key, seen, scale)
    group = query.shape[1] // key.shape[1]
    weights = torch.exp(scores - sums_NQ[..., None]).nan_to_num(0.0)
    into_weights = torch.einsum("qnd,knd->nqk", gradient.float(), value.float().repeat_interleave(group, 1))
    row_sums_NQ = (gradient.float() * output.float()).sum(-1).t()
    into_scores = weights * (into_weights - row_sums_NQ[..., None]) * scale

    def by_group(found_KND: Tensor) -> Tensor:
        return found_KND.reshape(len(found_KND), key.shape[1], group, -1).sum(2)

    return (
        torch.einsum("nqk,knd->qnd", into_scores, key_KND),
        by_group(torch.einsum("nqk,qnd->knd", into_scores, query.float())),
        by_group(torch.einsum("nqk,qnd->knd", weights, gradient.float())),
    )


def _samples(
    layout: NVTE_QKV_Layout, query: Tensor, key: Tensor, ends: tuple[Tensor, ...]
) -> Iterator[tuple[int, tuple[Any, ...], tuple[Any, ...]]]:
    """(number, index of its queries, index of its keys) of each sample: of a packed stream [T, N, D], or rows of a batch."""
    if layout.name.startswith("NVTE_T"):
        ends_q, ends_k, padded_q, padded_k = ends
        starts_q, starts_k = (padded_q if padded_q is not None else ends_q), (padded_k if padded_k is not None else ends_k)
        for number, (queries, keys) in enumerate(zip(ends_q.diff().tolist(), ends_k.diff().tolist(), strict=True)):
            at_q, at_k = int(starts_q[number]), int(starts_k[number])
            yield number, (slice(at_q, at_q + queries),), (slice(at_k, at_k + keys),)
    elif layout.name.startswith("NVTE_SB"):
        for number in range(query.shape[1]):
            yield number, (slice(None), number), (slice(None), number)
    else:
        for number in range(query.shape[0]):
            yield number, (number,), (number,)


def fused_attn_fwd(
    max_q: int,
    max_k: int,
    training: bool,
    scale: float,
    dropout: float,
    fast_zero: bool,
    layout: NVTE_QKV_Layout,
    bias_type: NVTE_Bias_Type,
    mask: NVTE_Mask_Type,
    softmax: Any,
    window: tuple[int, int],
    ends_q: Tensor,
    ends_k: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dtype: torch.dtype,
    padded_q: Tensor | None,
    padded_k: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    """cuDNN's: the output, the logarithms of sums ([T, N, 1] of a stream, [B, N, S, 1] of a batch), a random state."""
    assert dropout == 0 and bias_type.name == "NVTE_NO_BIAS"
    output = torch.zeros_like(query)
    packed = layout.name.startswith("NVTE_T")
    sums = torch.zeros(*query.shape[:2], 1) if packed else torch.zeros(len(ends_q) - 1, query.shape[2], max_q, 1)
    for number, own, others in _samples(layout, query, key, (ends_q, ends_k, padded_q, padded_k)):
        queries, keys = query[own], key[others]
        found, sums_NQ = _attend(queries, keys, value[others], _seen(len(queries), len(keys), mask, window), scale)
        output[own] = found.to(output.dtype)
        if packed:
            sums[own] = sums_NQ.t()[..., None]
        else:
            sums[number] = sums_NQ[..., None]
    return [output, sums, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_q: int,
    max_k: int,
    scale: float,
    dropout: float,
    fast_zero: bool,
    layout: NVTE_QKV_Layout,
    bias_type: NVTE_Bias_Type,
    mask: NVTE_Mask_Type,
    softmax: Any,
    window: tuple[int, int],
    deterministic: bool,
    ends_q: Tensor,
    ends_k: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    gradient: Tensor,
    dtype: torch.dtype,
    gradient_type: Any,
    kept: list[Tensor],
    padded_q: Tensor | None,
    padded_k: Tensor | None,
    *rest: Any,
) -> list[Tensor | None]:
    """Gradients of queries, keys and values, and none of what is not there."""
    into = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    packed = layout.name.startswith("NVTE_T")
    for number, own, others in _samples(layout, query, key, (ends_q, ends_k, padded_q, padded_k)):
        queries, keys = query[own], key[others]
        sums_NQ = kept[0][own][..., 0].t() if packed else kept[0][number, ..., 0]
        seen = _seen(len(queries), len(keys), mask, window)
        found = _attend_back(queries, keys, value[others], output[own], gradient[own], sums_NQ, seen, scale)
        for target, where, part in zip(into, (own, others, others), found, strict=True):
            target[where] = part.to(target.dtype)
    return [*into, None, None]


# ---- rotary embedding ----


def fused_rope_forward(
    heads_SBND: Tensor, angles: Tensor, starts: Any, layout: NVTE_QKV_Format, interleaved: bool, ends: Any, size: int, rank: int
) -> Tensor:
    """Turns the first numbers of each head, as many as there are angles [S, 1, 1, R]."""
    assert layout.name == "NVTE_SBHD" and not interleaved and starts is None and size == 1
    turned, rest = _turned_part(heads_SBND, angles)
    one, two = turned.chunk(2, -1)
    angles = angles[: len(heads_SBND)]
    turned = turned * angles.cos() + torch.cat([-two, one], -1) * angles.sin()
    return torch.cat([turned.to(rest.dtype), rest], -1)


def fused_rope_backward(gradient_SBND: Tensor, angles: Tensor, *rest: Any) -> Tensor:
    """Turns back."""
    turned, unturned = _turned_part(gradient_SBND, angles)
    angles = angles[: len(gradient_SBND)]
    one, two = (turned * angles.sin()).chunk(2, -1)
    return torch.cat([(turned * angles.cos() + torch.cat([two, -one], -1)).to(unturned.dtype), unturned], -1)


def _turned_part(heads_SBND: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    return heads_SBND[..., : angles.shape[-1]].float(), heads_SBND[..., angles.shape[-1] :]


# ---- halves of samples, of which a context-parallel rank holds an early and a late chunk ----


def _half(ends: Tensor, half: int) -> Tensor:
    """Rows of the first or second half of every sample."""
    starts, stops = ends[:-1].tolist(), ends[1:].tolist()
    bounds = ((a, (a + b) // 2, b)[half : half + 2] for a, b in zip(starts, stops, strict=True))
    return torch.cat([torch.arange(first, last) for first, last in bounds])


def _of_tokens(sums: Tensor, tokens: int) -> int:
    """The dimension of the tokens: flash-attn keeps [N, T], cuDNN [T, N]."""
    return 0 if sums.shape[0] == tokens else 1


def thd_read_half_tensor(tensor: Tensor, ends: Tensor, half: int) -> Tensor:
    return tensor.index_select(0 if tensor.dim() == 3 else 1, _half(ends, half))


def thd_read_second_half_lse(sums: Tensor, ends: Tensor, packed: bool, length: int) -> Tensor:
    assert packed
    return sums.index_select(_of_tokens(sums, int(ends[-1])), _half(ends, 1)).contiguous()


def thd_second_half_lse_correction(sums: Tensor, step: Tensor, ends: Tensor, packed: bool) -> None:
    assert packed
    dim, rows = _of_tokens(sums, int(ends[-1])), _half(ends, 1)
    before = sums.index_select(dim, rows)
    sums.index_copy_(dim, rows, torch.logaddexp(before, step.reshape(before.shape).to(before.dtype)))


def thd_out_correction(
    output: Tensor, step: Tensor, sums: Tensor, sums_step: Tensor, ends: Tensor, second_half: bool, packed: bool
) -> None:
    """Adds a step's output, weighed by its share of the softmax's sum."""
    rows = _half(ends, 1) if second_half else torch.arange(len(output))
    dim = _of_tokens(sums, len(output))
    whole = sums.index_select(dim, rows)
    share = torch.exp(sums_step.reshape(whole.shape) - whole)
    share_TN = share if dim == 0 else share.t()
    heads = output.reshape(len(output), share_TN.shape[1], -1)
    heads.index_add_(0, rows, (step.reshape(len(rows), *heads.shape[1:]).float() * share_TN[..., None]).to(heads.dtype))
    output.copy_(heads.reshape(output.shape))


def thd_grad_correction(gradient: Tensor, step: Tensor, ends: Tensor, first: str, second: str) -> None:
    """Adds a step's gradient to, or copies it over, the halves of each sample, or leaves one as it is (``none``)."""
    for half, action in enumerate((first, second)):
        rows = _half(ends, half)
        if action != "none":
            part = step[rows] if len(step) == len(gradient) else step
            (gradient.index_add_ if action == "add" else gradient.index_copy_)(0, rows, part)
