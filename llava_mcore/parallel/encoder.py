"""Encoder data parallelism: every rank of the first stage holds the whole encoder and encodes its share of the pictures.

The pictures of a micro-batch are dealt over the tensor x context ranks by cost, each rank encodes its own, and the embeddings
are gathered. Backward, a rank gets the gradient of its own embeddings, summed over the context-parallel ranks (each used some of
them; the tensor-parallel ranks all hold the same gradient already). The weights' gradients are then sums over different
pictures: over context ranks the data-parallel reduction adds them up, over tensor ranks :func:`reduce_gradients` does.

Shape suffixes: E embeddings of all pictures, e those of this rank, H width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llava_mcore.platform.copies import upload


@lru_cache(maxsize=64)
def deal(costs: tuple[float, ...], size: int) -> tuple[tuple[int, ...], ...]:
    """Deals items over ``size`` ranks: the dearest first, each to the rank that has the least (LPT; Graham, 1969).

    Args:
        costs: of each item, in any unit.
        size: number of ranks.

    Returns:
        the items of each rank, ascending. The longest rank has at most 4/3 of the best possible load.
    """
    loads = [(0.0, rank) for rank in range(size)]
    dealt: list[list[int]] = [[] for _ in range(size)]
    for item in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        load, rank = min(loads)
        loads[rank] = (load + costs[item], rank)
        dealt[rank].append(item)
    return tuple(tuple(sorted(items)) for items in dealt)


def imbalance(costs: Sequence[float], size: int) -> float:
    """Longest load over mean load of a deal; 1 is even. 1 as well where there is nothing to deal."""
    loads = [sum(costs[item] for item in items) for items in deal(tuple(costs), size)]
    return max(loads) * size / sum(loads) if sum(loads) else 1.0


def _everyones(own_e: Tensor, counts: tuple[int, ...], order_E: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows [E, ...] of all ranks, of each ``counts``, in another order."""
    longest = max(counts)
    if longest == 0:
        return own_e[:0]
    padded_e = own_e.new_zeros(longest, *own_e.shape[1:])
    padded_e[: own_e.shape[0]] = own_e
    everyone = [torch.empty_like(padded_e) for _ in counts]
    dist.all_gather(everyone, padded_e, group=group)
    return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])[order_E]


class _Gather(torch.autograd.Function):
    """Embeddings of all ranks in the order of the pictures; the gradient of this rank's own on the way back."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, own_eH: Tensor, counts: tuple[int, ...], order_E: Tensor, group: dist.ProcessGroup, cp: dist.ProcessGroup
    ) -> Tensor:
        ctx.counts, ctx.rank, ctx.cp = counts, group.rank(), cp
        ctx.save_for_backward(order_E)
        return _everyones(own_eH, counts, order_E, group)

    @staticmethod
    def backward(ctx, grad_EH: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (order_E,) = ctx.saved_tensors
        if not len(order_E):
            return grad_EH, None, None, None, None
        grad_EH = grad_EH.contiguous()
        if ctx.cp.size() > 1:
            dist.all_reduce(grad_EH, group=ctx.cp)
        by_rank_EH = torch.empty_like(grad_EH)
        by_rank_EH[order_E] = grad_EH
        start = sum(ctx.counts[: ctx.rank])
        return by_rank_EH[start : start + ctx.counts[ctx.rank]], None, None, None, None


def gather_embeddings(
    own_eH: Tensor,
    dealt: Sequence[Sequence[int]],
    embeddings_each: Sequence[int],
    group: dist.ProcessGroup,
    cp: dist.ProcessGroup,
) -> Tensor:
    """Embeddings [E, H] of all pictures, picture after picture, from those [e, H] that each rank has encoded.

    Args:
        own_eH: of this rank's pictures, in the order of ``dealt[rank]``.
        dealt: the pictures of each rank of ``group``.
        embeddings_each: embeddings of each picture.
        group: the ranks that share the pictures.
        cp: its context-parallel part, over which gradients are summed.
    """
    counts, order_E = _arrival(dealt, embeddings_each)
    return _Gather.apply(own_eH, counts, upload(order_E, own_eH.device), group, cp)


def gather_numbers(
    own_e: Tensor, dealt: Sequence[Sequence[int]], embeddings_each: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """A whole number for each embedding, int64 [E] from [e]; the arguments are those of :func:`gather_embeddings`."""
    counts, order_E = _arrival(dealt, embeddings_each)
    return _everyones(own_e, counts, upload(order_E, own_e.device), group)


def _arrival(dealt: Sequence[Sequence[int]], embeddings_each: Sequence[int]) -> tuple[tuple[int, ...], Tensor]:
    """Embeddings of each rank, and where those of picture after picture are among those of rank after rank, [E]."""
    counts = tuple(sum(embeddings_each[picture] for picture in pictures) for pictures in dealt)
    start_of, at = {}, 0
    for picture in (picture for pictures in dealt for picture in pictures):
        start_of[picture] = at
        at += embeddings_each[picture]
    order = [torch.arange(start_of[picture], start_of[picture] + each) for picture, each in enumerate(embeddings_each)]
    return counts, torch.cat(order)


def reduce_gradients(parameters: Iterable[nn.Parameter], tp: dist.ProcessGroup) -> None:
    """Sums the gradients of an encoder whose pictures were dealt over the tensor-parallel ranks; after the data-parallel sum."""
    gradients = [parameter.main_grad for parameter in parameters if parameter.requires_grad]  # type: ignore[attr-defined]
    if tp.size() > 1 and gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=tp)
        for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))
