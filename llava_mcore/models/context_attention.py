"""Causal attention over packed samples whose tokens are split over the ranks of a context-parallel group.

A rank keeps its queries; keys and values come to it, by one of two exchange schemes:

- ``all_gather``: all keys and values at once, while the rank attends to its own (Llama 3, https://arxiv.org/abs/2407.21783,
  section 3.3.2); gradients go back by a reduce-scatter.
- ``ring``: one rank's keys and values at a time, passed on while they are worked on (Liu et al., 2023,
  https://arxiv.org/abs/2310.01889); their gradients travel behind them and come home.

Either way attention is cut into blocks that are causal (a rank's queries against its own keys) or full (against keys of other
ranks that lie before them), and the blocks' results are merged by their log-sum-exp (Dao et al., 2022,
https://arxiv.org/abs/2205.14135). Blocks never cross a sample, so nothing leaks. Sums over blocks and ranks are taken in
float32 at least, in an order that is always the same. With a sliding window, blocks out of its reach are left out, and those on
its edge are worked on by matrix products with a mask.

Shape suffixes: S tokens of one rank, T tokens of the stream, L queries and K keys of a block, N query heads, G key/value heads,
R query heads for each of those, D width of a head, 1 a batch of one, 2 keys and values.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llava_mcore.parallel.sequence import Chunk, Partition


def context_attention(
    query_SND: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    partition: Partition,
    group: dist.ProcessGroup,
    scheme: str,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v, causal within each sample, for the tokens that this rank holds.

    Every rank of the group calls this at the same time. Only a rank's own tensors are kept for the backward pass: keys and
    values of the others are fetched again.

    Args:
        query_SND: this rank's queries, in the order of ``partition.index(group.rank())``.
        key_SGD: its keys; N is a multiple of G.
        value_SGD: its values.
        partition: which rank holds what; the same on all ranks.
        group: the context-parallel group.
        scheme: "all_gather" or "ring".
        scale: of the scores, usually D ** -0.5.
        window: tokens that a token attends to, itself included (None: all before it in its sample).

    Returns:
        [S, N, D] in the dtype of the queries.

    Raises:
        ValueError: the shapes, the partition and the group do not fit, or the scheme is unknown.
    """
    tokens, heads, width = query_SND.shape
    if scheme not in SCHEMES:
        raise ValueError(f"context-parallel exchange {scheme!r} is unknown, use one of {', '.join(SCHEMES)}")
    if group.size() != partition.size or tokens != partition.tokens_per_rank:
        raise ValueError(
            f"{tokens} tokens on each of {group.size()} ranks do not fit a partition of {partition.tokens_per_rank} tokens on "
            f"each of {partition.size}"
        )
    if key_SGD.shape != value_SGD.shape or key_SGD.shape[::2] != (tokens, width) or heads % key_SGD.shape[1]:
        raise ValueError(
            f"keys {tuple(key_SGD.shape)} and values {tuple(value_SGD.shape)} must both be "
            f"[{tokens}, a divisor of {heads}, {width}] for queries {tuple(query_SND.shape)}"
        )
    reach = None if window is None or window >= max(partition.sample_lengths, default=0) else window
    return _ContextAttention.apply(query_SND, key_SGD, value_SGD, partition, group, scheme, scale, reach)


class _ContextAttention(torch.autograd.Function):
    """Forward and backward pass over the blocks that an exchange scheme brings."""

    @staticmethod
    def forward(
        ctx: Any,
        query_SND: Tensor,
        key_SGD: Tensor,
        value_SGD: Tensor,
        partition: Partition,
        group: dist.ProcessGroup,
        scheme: str,
        scale: float,
        window: int | None,
    ) -> Tensor:
        query_SND = query_SND.contiguous()
        pair_S2GD = torch.stack((key_SGD, value_SGD), dim=1)
        query_1NSD = _heads_first(query_SND)
        sums_SND = torch.zeros_like(query_SND, dtype=_sum_dtype(query_SND))
        sums_1NSD = _heads_first(sums_SND)
        lse_1NS = torch.full_like(sums_1NSD[..., 0], float("-inf"))
        for pair_K2GD, blocks, source, causal in SCHEMES[scheme](partition, group).visits(pair_S2GD):
            key_1GKD, value_1GKD = _key_value(pair_K2GD)
            for (rows, keys), seen_LK in _in_reach(blocks, partition, group.rank(), source, causal, window, query_SND.device):
                out_1NLD, block_lse_1NL = block_forward(
                    query_1NSD[:, :, rows], key_1GKD[:, :, keys], value_1GKD[:, :, keys], causal, scale, seen_LK
                )
                before_1NL = lse_1NS[:, :, rows]
                # The first block of a row finds -inf, so its weight is one, and it is taken over to the last bit.
                weight_1NL = torch.sigmoid(block_lse_1NL - before_1NL)
                if seen_LK is not None:  # a row that has seen no key yet
                    weight_1NL = weight_1NL.nan_to_num(0.0)
                sums_1NSD[:, :, rows].lerp_(out_1NLD.to(sums_1NSD.dtype), weight_1NL[..., None])
                before_1NL.copy_(torch.logaddexp(before_1NL, block_lse_1NL))
        out_SND = sums_SND.to(query_SND.dtype)
        ctx.save_for_backward(query_SND, pair_S2GD, out_SND, lse_1NS)
        ctx.exchange = partition, group, scheme, scale, window
        return out_SND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SND: Tensor) -> tuple[Tensor | None, ...]:
        query_SND, pair_S2GD, out_SND, lse_1NS = ctx.saved_tensors
        partition, group, scheme, scale, window = ctx.exchange
        dtype = _sum_dtype(query_SND)
        gradient_1NSD, query_1NSD, out_1NSD = map(_heads_first, (gradient_SND.contiguous(), query_SND, out_SND))
        d_query_SND = torch.zeros_like(query_SND, dtype=dtype)
        d_query_1NSD = _heads_first(d_query_SND)
        exchange = SCHEMES[scheme](partition, group)
        for pair_K2GD, blocks, source, causal in exchange.visits(pair_S2GD):
            key_1GKD, value_1GKD = _key_value(pair_K2GD)
            d_pair_K2GD = torch.zeros_like(pair_K2GD, dtype=dtype)
            d_key_1GKD, d_value_1GKD = _key_value(d_pair_K2GD)
            for (rows, keys), seen_LK in _in_reach(blocks, partition, group.rank(), source, causal, window, query_SND.device):
                d_rows_1NLD, d_keys_1GKD, d_values_1GKD = block_backward(
                    gradient_1NSD[:, :, rows],
                    query_1NSD[:, :, rows],
                    key_1GKD[:, :, keys],
                    value_1GKD[:, :, keys],
                    out_1NSD[:, :, rows],
                    lse_1NS[:, :, rows].contiguous(),
                    causal,
                    scale,
                    seen_LK,
                )
                d_query_1NSD[:, :, rows] += d_rows_1NLD
                d_key_1GKD[:, :, keys] += d_keys_1GKD
                d_value_1GKD[:, :, keys] += d_values_1GKD
            exchange.give_back(d_pair_K2GD)
        d_key_SGD, d_value_SGD = exchange.own_gradient().to(pair_S2GD.dtype).unbind(1)
        return d_query_SND.to(query_SND.dtype), d_key_SGD, d_value_SGD, None, None, None, None, None


def _heads_first(tensor_SND: Tensor) -> Tensor:
    """[S, N, D] seen as [1, N, S, D], what attention kernels take."""
    return tensor_SND.transpose(0, 1)[None]


def _key_value(pair_K2GD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a pair, each seen as [1, G, K, D]."""
    return _heads_first(pair_K2GD[:, 0]), _heads_first(pair_K2GD[:, 1])


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """What sums over blocks are taken in: float32 for half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


# ---- which queries meet which keys ----


class Block(NamedTuple):
    """Queries and keys of one sample that are worked on together."""

    rows: slice  # of the rank's queries
    keys: slice  # of the keys at hand


class _Held(NamedTuple):
    """What a rank holds of one sample."""

    begin: int  # where it lies among the rank's tokens
    end: int
    chunks: tuple[Chunk, ...]


@functools.lru_cache(maxsize=256)
def _held(partition: Partition, rank: int) -> dict[int, _Held]:
    """What a rank holds, by sample."""
    found: dict[int, _Held] = {}
    end = 0
    for chunk in partition.chunks[rank]:
        begin, _, chunks = found.get(chunk.sample, _Held(end, end, ()))
        end += chunk.length
        found[chunk.sample] = _Held(begin, end, (*chunks, chunk))
    return found


@functools.lru_cache(maxsize=256)
def _own_blocks(partition: Partition, rank: int) -> list[Block]:
    """A rank's queries against its own keys: as both lie in the same order, causal over all that it holds of a sample."""
    spans = [slice(held.begin, held.end) for held in _held(partition, rank).values()]
    return [Block(span, span) for span in spans]


@functools.lru_cache(maxsize=256)
def _stream_blocks(partition: Partition, rank: int) -> list[Block]:
    """A rank's queries against the keys of the others, in the order of the stream.

    The keys between two of its chunks are seen by all of its queries that come after them.
    """
    blocks = []
    for sample, (row, end, chunks) in _held(partition, rank).items():
        offset, seen = partition.sample_starts[sample], 0
        for chunk in chunks:
            if chunk.start > seen:
                blocks.append(Block(slice(row, end), slice(offset + seen, offset + chunk.start)))
            row += chunk.length
            seen = chunk.start + chunk.length
    return blocks


@functools.lru_cache(maxsize=1024)
def _rank_blocks(partition: Partition, rank: int, source: int) -> list[Block]:
    """A rank's queries against the keys of another one, in the order in which that one holds them.

    Each of the queries' chunks sees a front part of them. Zig-zag makes this one block a sample: both chunks see the first
    chunk of an earlier rank, and the second chunk sees both of a later rank.
    """
    blocks: list[Block] = []
    theirs = _held(partition, source)
    for sample, (row, _, chunks) in _held(partition, rank).items():
        if sample not in theirs:
            continue
        first = theirs[sample].begin
        for chunk in chunks:
            visible = sum(other.length for other in theirs[sample].chunks if other.start < chunk.start)
            keys = slice(first, first + visible)
            if visible and blocks and blocks[-1].keys == keys:
                blocks[-1] = Block(slice(blocks[-1].rows.start, row + chunk.length), keys)
            elif visible:
                blocks.append(Block(slice(row, row + chunk.length), keys))
            row += chunk.length
    return blocks


def _in_reach(
    blocks: list[Block],
    partition: Partition,
    rank: int,
    source: int | None,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Iterator[tuple[Block, Tensor | None]]:
    """The blocks in which some query sees some key through the window, each with which sees which [L, K].

    That is None where no mask is needed: the block is full, or causal, and the window takes nothing away from it.

    Args:
        source: the rank whose keys these are, in its order; None for those of the stream.
    """
    if window is None:
        yield from ((block, None) for block in blocks)
        return
    queries_S = partition.index(rank)
    keys_K = np.arange(sum(partition.sample_lengths)) if source is None else partition.index(source)
    for block in blocks:
        distance_LK = queries_S[block.rows, None] - keys_K[None, block.keys]
        seen_LK = distance_LK < window
        if seen_LK.all():
            yield block, None
        elif seen_LK.any():
            yield block, torch.from_numpy(seen_LK & (distance_LK >= 0) if causal else seen_LK).to(device)


# ---- exchange schemes ----

# Keys and values [K, 2, G, D]; blocks that use them; the rank they are of (None: the stream's); whether the blocks are causal.
Visit = tuple[Tensor, list[Block], int | None, bool]


class _AllGather:
    """Visits a rank's own keys and values while those of the stream arrive, then the stream's."""

    def __init__(self, partition: Partition, group: dist.ProcessGroup) -> None:
        self.partition, self.group = partition, group
        self.gradients: list[Tensor] = []

    def visits(self, pair_S2GD: Tensor) -> Iterator[Visit]:
        """What this rank's queries attend to."""
        rank_order_T2GD = pair_S2GD.new_empty(pair_S2GD.shape[0] * self.group.size(), *pair_S2GD.shape[1:])
        arrival = dist.all_gather_into_tensor(rank_order_T2GD, pair_S2GD, group=self.group, async_op=True)
        yield pair_S2GD, _own_blocks(self.partition, self.group.rank()), self.group.rank(), True
        arrival.wait()
        to_stream_T, _ = _orders(self.partition, pair_S2GD.device)
        yield rank_order_T2GD.index_select(0, to_stream_T), _stream_blocks(self.partition, self.group.rank()), None, False

    def give_back(self, gradient_K2GD: Tensor) -> None:
        """Takes the gradient of the keys and values of the visit that ends."""
        self.gradients.append(gradient_K2GD)

    def own_gradient(self) -> Tensor:
        """The gradient of this rank's keys and values over the queries of all ranks: [S, 2, G, D]."""
        own_S2GD, stream_T2GD = self.gradients
        _, to_ranks_T = _orders(self.partition, stream_T2GD.device)
        others_S2GD = torch.empty_like(own_S2GD)
        dist.reduce_scatter_tensor(others_S2GD, stream_T2GD.index_select(0, to_ranks_T), group=self.group)
        return own_S2GD + others_S2GD


@functools.lru_cache(maxsize=64)
def _orders(partition: Partition, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices [T] that put tokens from rank after rank into the order of the stream, and back; kept, to copy them once."""
    to_ranks = np.concatenate([partition.index(rank) for rank in range(partition.size)])
    return torch.from_numpy(np.argsort(to_ranks)).to(device), torch.from_numpy(to_ranks).to(device)


class _Ring:
    """Visits a rank's own keys and values, then those of the rank before it, and so on around the ring."""

    def __init__(self, partition: Partition, group: dist.ProcessGroup) -> None:
        self.partition, self.group = partition, group
        self.travelling: _Shift | None = None

    def visits(self, pair_S2GD: Tensor) -> Iterator[Visit]:
        """What this rank's queries attend to; the next keys and values arrive meanwhile."""
        rank, size = self.group.rank(), self.group.size()
        shift = _Shift(pair_S2GD, self.group, tag=0) if size > 1 else None
        yield pair_S2GD, _own_blocks(self.partition, rank), rank, True
        for step in range(1, size):
            assert shift is not None
            pair_S2GD = shift.wait()
            if step + 1 < size:
                shift = _Shift(pair_S2GD, self.group, tag=0)
            source = (rank - step) % size
            yield pair_S2GD, _rank_blocks(self.partition, rank, source), source, False

    def give_back(self, gradient_S2GD: Tensor) -> None:
        """Adds what the ranks before this one found for the same keys and values, and sends the sum after them."""
        if self.travelling:
            gradient_S2GD += self.travelling.wait()
        self.travelling = _Shift(gradient_S2GD, self.group, tag=1)

    def own_gradient(self) -> Tensor:
        """The gradient of this rank's keys and values over the queries of all ranks: [S, 2, G, D]."""
        assert self.travelling is not None
        return self.travelling.wait()


class _Shift:
    """A tensor on its way to the next rank of the ring, and the previous rank's on its way here."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup, tag: int) -> None:
        rank, size = group.rank(), group.size()
        self.sent, self.received = tensor, torch.empty_like(tensor) if size > 1 else tensor
        operations = [
            dist.P2POp(dist.isend, self.sent, group=group, group_peer=(rank + 1) % size, tag=tag),
            dist.P2POp(dist.irecv, self.received, group=group, group_peer=(rank - 1) % size, tag=tag),
        ]
        self.works = dist.batch_isend_irecv(operations) if size > 1 else []

    def wait(self) -> Tensor:
        """The previous rank's tensor, once it is here and this rank's has gone."""
        for work in self.works:
            work.wait()
        return self.received


SCHEMES: dict[str, type[_AllGather] | type[_Ring]] = {"all_gather": _AllGather, "ring": _Ring}


# ---- one block ----


def block_forward(
    query_1NLD: Tensor, key_1GKD: Tensor, value_1GKD: Tensor, causal: bool, scale: float, seen_LK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of a block, and the log-sum-exp of its scores.

    Torch's flash attention on the CPU and, in half precision, on CUDA; matrix products elsewhere and where ``seen_LK`` says which
    query sees which key.

    Returns:
        output [1, N, L, D] and log-sum-exp [1, N, L], this in float32 at least.
    """
    if seen_LK is not None:
        return plain_forward(query_1NLD, key_1GKD, value_1GKD, causal, scale, seen_LK)
    if query_1NLD.is_cpu:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_1NLD, key_1GKD, value_1GKD, 0.0, causal, scale=scale
        )
    if _has_cuda_flash(query_1NLD):
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query_1NLD, key_1GKD, value_1GKD, 0.0, causal, False, scale=scale
        )[:2]
    return plain_forward(query_1NLD, key_1GKD, value_1GKD, causal, scale)


def block_backward(
    gradient_1NLD: Tensor,
    query_1NLD: Tensor,
    key_1GKD: Tensor,
    value_1GKD: Tensor,
    out_1NLD: Tensor,
    lse_1NL: Tensor,
    causal: bool,
    scale: float,
    seen_LK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A block's part of the gradients of its queries, keys and values.

    Args:
        out_1NLD: output over all keys, not only those of the block.
        lse_1NL: log-sum-exp over all keys, contiguous: CUDA kernels index it without its strides.
    """
    arguments = gradient_1NLD, query_1NLD, key_1GKD, value_1GKD, out_1NLD, lse_1NL
    if seen_LK is not None:
        return plain_backward(*arguments, causal, scale, seen_LK)
    if query_1NLD.is_cpu:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*arguments, 0.0, causal, scale=scale)
    if _has_cuda_flash(query_1NLD):
        no_random_state = torch.empty(2, dtype=torch.uint64, device=query_1NLD.device)
        longest = query_1NLD.shape[2], key_1GKD.shape[2]
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *arguments, None, None, *longest, 0.0, causal, no_random_state, no_random_state, scale=scale
        )
    return plain_backward(*arguments, causal, scale)


def _has_cuda_flash(query_1NLD: Tensor) -> bool:
    """Whether torch's flash attention on CUDA takes these queries."""
    width = query_1NLD.shape[-1]
    return query_1NLD.is_cuda and query_1NLD.dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256


def plain_forward(
    query_1NLD: Tensor, key_1GKD: Tensor, value_1GKD: Tensor, causal: bool, scale: float, seen_LK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``block_forward`` by matrix products, which holds the block's scores. A query that sees no key gets zeros and -inf."""
    scores_1GRLK = _scores(query_1NLD, key_1GKD, causal, scale, seen_LK)
    lse_1GRL = scores_1GRLK.logsumexp(-1)
    weights_1GRLK = (scores_1GRLK - lse_1GRL.masked_fill(lse_1GRL == float("-inf"), 0.0)[..., None]).exp()
    out_1GRLD = weights_1GRLK @ value_1GKD[:, :, None].to(weights_1GRLK.dtype)
    return out_1GRLD.flatten(1, 2).to(query_1NLD.dtype), lse_1GRL.flatten(1, 2)


def plain_backward(
    gradient_1NLD: Tensor,
    query_1NLD: Tensor,
    key_1GKD: Tensor,
    value_1GKD: Tensor,
    out_1NLD: Tensor,
    lse_1NL: Tensor,
    causal: bool,
    scale: float,
    seen_LK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``block_backward`` by matrix products, which holds the block's scores."""
    heads, dtype = key_1GKD.shape[1], _sum_dtype(query_1NLD)
    gradient_1GRLD, query_1GRLD, out_1GRLD = (
        tensor.unflatten(1, (heads, -1)).to(dtype) for tensor in (gradient_1NLD, query_1NLD, out_1NLD)
    )
    weights_1GRLK = (_scores(query_1NLD, key_1GKD, causal, scale, seen_LK) - lse_1NL.unflatten(1, (heads, -1))[..., None]).exp()
    d_weights_1GRLK = gradient_1GRLD @ value_1GKD[:, :, None].to(dtype).mT
    inner_1GRL1 = (gradient_1GRLD * out_1GRLD).sum(-1, keepdim=True)
    d_scores_1GRLK = weights_1GRLK * (d_weights_1GRLK - inner_1GRL1) * scale
    d_query_1GRLD = d_scores_1GRLK @ key_1GKD[:, :, None].to(dtype)
    d_key_1GKD = (d_scores_1GRLK.mT @ query_1GRLD).sum(2)
    d_value_1GKD = (weights_1GRLK.mT @ gradient_1GRLD).sum(2)
    return d_query_1GRLD.flatten(1, 2), d_key_1GKD, d_value_1GKD


def _scores(query_1NLD: Tensor, key_1GKD: Tensor, causal: bool, scale: float, seen_LK: Tensor | None) -> Tensor:
    """Scaled scores [1, G, R, L, K], -inf where a query does not see the key."""
    dtype = _sum_dtype(query_1NLD)
    query_1GRLD = query_1NLD.unflatten(1, (key_1GKD.shape[1], -1)).to(dtype)
    scores_1GRLK = query_1GRLD @ key_1GKD[:, :, None].to(dtype).mT * scale
    if seen_LK is None and causal:
        seen_LK = torch.ones(scores_1GRLK.shape[-2:], dtype=torch.bool, device=scores_1GRLK.device).tril()
    return scores_1GRLK if seen_LK is None else scores_1GRLK.masked_fill_(~seen_LK, float("-inf"))
