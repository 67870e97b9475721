"""Context-parallel attention against torch's own attention, sample by sample in one process in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import ranks
from torch import Tensor

from llava_mcore.models import context_attention as module
from llava_mcore.parallel.sequence import partition

Case = tuple[list[int], tuple[Tensor, Tensor, Tensor], Tensor]  # sample lengths; q, k, v of the stream; weights of the output

SCHEMES = ["all_gather", "ring"]
SIZES = [2, 3, 4]
# (query heads, key/value heads, width): none shared, shared by odd numbers, one for all; widths that are no multiple of 8 too.
HEADS = [(2, 2, 8), (6, 2, 16), (3, 1, 5)]


def streams(size: int) -> list[list[int]]:
    """Sample lengths, each list summing to a multiple of ``size``: single tokens, every length to 40, fewer tokens than ranks."""
    random = torch.Generator().manual_seed(size)
    mixed = [torch.randint(1, 41, (9,), generator=random).tolist() for _ in range(3)]
    lists = [[1], [1] * 7, [0, 2, 0, 3], [64 * size], [2 * size, 4 * size], list(range(1, 20)), list(range(20, 27)), *mixed]
    lists += [list(range(27, 33)), list(range(33, 38)), [38, 39, 40, 1]]
    return [[*lengths, -sum(lengths) % size] for lengths in lists]


def case(lengths: list[int], heads: tuple[int, int, int], seed: int, dtype: torch.dtype) -> Case:
    random = torch.Generator().manual_seed(seed)
    query_heads, key_heads, width = heads
    query, key, value, weights = (
        torch.randn(sum(lengths), count, width, generator=random).to(dtype)
        for count in (query_heads, key_heads, key_heads, query_heads)
    )
    return lengths, (query, key, value), weights


def cases(size: int, dtype: torch.dtype) -> list[Case]:
    return [case(lengths, HEADS[number % 3], number, dtype) for number, lengths in enumerate(streams(size))]


def plain(given: Case) -> list[Tensor]:
    """Output, and the gradients of q, k and v of its weighted sum, in float64."""
    lengths, tensors, weights = given
    query, key, value = (tensor.double().requires_grad_() for tensor in tensors)
    pieces = [
        F.scaled_dot_product_attention(
            *(piece.transpose(0, 1)[None] for piece in sample), is_causal=True, scale=0.3, enable_gqa=True
        )[0].transpose(0, 1)
        for sample in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        if len(sample[0])
    ]
    out = torch.cat(pieces)
    return [out.detach(), *torch.autograd.grad((out * weights.double()).sum(), (query, key, value))]


def attend(given: list[Case], scheme: str, group: dist.ProcessGroup | None = None) -> list[list[Tensor]]:
    """Of each case this rank's part of the output and of the gradients of q, k and v; runs on the ranks."""
    group = group or dist.group.WORLD
    results = []
    for lengths, tensors, weights in given:
        split = partition(lengths, group.size())
        index = torch.from_numpy(split.index(group.rank()))
        mine = [tensor[index].requires_grad_() for tensor in tensors]
        out = module.context_attention(*mine, split, group, scheme, 0.3)
        results.append([out.detach(), *torch.autograd.grad((out * weights[index]).sum(), mine)])
    return results


def attend_in_pairs(given: list[list[Case]], scheme: str) -> list[list[Tensor]]:
    """``attend`` in the groups of the even and of the odd ranks, each with cases of its own; runs on the ranks."""
    number = dist.get_rank() % 2
    group = [dist.new_group(pair) for pair in ([0, 2], [1, 3])][number]
    try:
        return attend(given[number], scheme, group)
    finally:
        dist.destroy_process_group(group)


def whole(given: list[Case], parts: list[list[list[Tensor]]]) -> list[list[Tensor]]:
    """The ranks' parts put where they belong in the stream."""
    size = len(parts)
    results = []
    for number, (lengths, tensors, _) in enumerate(given):
        split = partition(lengths, size)
        results.append([torch.full_like(tensor, float("nan")) for tensor in (tensors[0], *tensors)])
        for rank in range(size):
            for target, part in zip(results[-1], parts[rank][number], strict=True):
                target[split.index(rank)] = part
    return results


def run(size: int, scheme: str, given: list[Case]) -> list[list[Tensor]]:
    return whole(given, ranks(size).run(attend, given, scheme))


def largest(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> float:
    """Largest difference over the largest absolute value (or one), over all cases and tensors."""
    worst = [
        float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1.0))
        for one_case, other_case in zip(ours, theirs, strict=True)
        for one, other in zip(one_case, other_case, strict=True)
    ]
    assert all(value == value for value in worst)  # no NaN
    return max(worst)


# A few dozen float32 roundings (6e-8 each) a number; measured 8e-7. bfloat16 keeps 8 bits, so that each block's output and
# gradients are off by up to 4e-3 of their size, and a sum has up to four blocks; measured 9e-3. float64 would show a wrong term
# however small it is.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_equals_plain_attention_and_schemes_agree(size: int, dtype: torch.dtype, record_property) -> None:
    given = cases(size, dtype)
    reference = [plain(one) for one in given]
    found = {scheme: run(size, scheme, given) for scheme in SCHEMES}
    for scheme in SCHEMES:
        assert all(tensor.dtype == dtype for tensors in found[scheme] for tensor in tensors)
        difference = largest(found[scheme], reference)
        record_property(scheme, difference)
        assert difference < TOLERANCE[dtype]
    assert largest(found["ring"], found["all_gather"]) < TOLERANCE[dtype]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_that_are_not_the_world(scheme: str) -> None:
    given = [cases(2, torch.float32)[:3], cases(2, torch.float32)[3:6]]
    parts = ranks(4).run(attend_in_pairs, given, scheme)
    for number, pair in enumerate([[0, 2], [1, 3]]):
        found = whole(given[number], [parts[rank] for rank in pair])
        assert largest(found, [plain(one) for one in given[number]]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
def test_samples_do_not_leak(size: int, scheme: str) -> None:
    lengths = [11, 1, 40, 7, 3, 2]
    lengths = [*lengths, -sum(lengths) % size]
    before = case(lengths, (6, 2, 16), 0, torch.float32)
    changed = []
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    for sample in range(6):
        other = case(lengths, (6, 2, 16), 1, torch.float32)
        span = slice(int(starts[sample]), int(starts[sample]) + lengths[sample])
        tensors = tuple(tensor.clone() for tensor in before[1])
        for tensor, new in zip(tensors, other[1], strict=True):
            tensor[span] = 100 * new[span]
        changed.append((lengths, tensors, before[2]))
    first, again, *results = run(size, scheme, [before, before, *changed])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for sample, result in enumerate(results):
        span = slice(int(starts[sample]), int(starts[sample]) + lengths[sample])
        for one, other in zip(first, result, strict=True):
            moved = (one != other).flatten(1).any(1)
            assert moved[span].any() or lengths[sample] == 1  # one token alone: its output is its value, q and k have no say
            moved[span] = False
            assert not moved.any(), f"changing sample {sample} moved tokens {moved.nonzero().flatten().tolist()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "keys", "causal"), [(9, 9, True), (1, 1, True), (5, 12, False), (12, 5, False)])
def test_matrix_products_equal_the_kernels(rows: int, keys: int, causal: bool, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    query, gradient = (torch.randn(1, 6, rows, 8, generator=random).to(dtype) for _ in range(2))
    key, value = (torch.randn(1, 2, keys, 8, generator=random).to(dtype) for _ in range(2))
    out, lse = module.block_forward(query, key, value, causal, 0.3)
    plain_out, plain_lse = module.plain_forward(query, key, value, causal, 0.3)
    # As if there were keys outside of the block, which take half of the weight.
    arguments = gradient, query, key, value, out, lse + 0.7, causal, 0.3
    ours, theirs = [plain_out, *module.plain_backward(*arguments)], [out, *module.block_backward(*arguments)]
    assert plain_out.dtype == dtype and plain_lse.dtype == lse.dtype == torch.float32
    assert largest([[plain_lse]], [[lse]]) < 2e-6
    assert largest([ours], [theirs]) < TOLERANCE[dtype]


def refusals() -> list[str]:
    """What is said of arguments that do not fit; runs on the ranks."""
    split, group = partition([6, 2], 2), dist.group.WORLD
    query, key = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8)
    messages = []
    for arguments in (
        (query, key, key, split, group, "a2a", 1.0),
        (query, key, key, partition([6], 2), group, "ring", 1.0),
        (query, key, key, partition([12], 3), group, "ring", 1.0),
        (query, key[:, :1].expand(4, 3, 8), key[:, :1].expand(4, 3, 8), split, group, "ring", 1.0),
        (query, key, key[:3], split, group, "ring", 1.0),
    ):
        with pytest.raises(ValueError) as error:
            module.context_attention(*arguments)
        messages.append(str(error.value))
    return messages


def test_refusals() -> None:
    for unknown, tokens, size, heads, shapes in ranks(2).run(refusals):
        assert "'a2a' is unknown, use one of all_gather, ring" in unknown
        assert "4 tokens on each of 2 ranks do not fit a partition of 3 tokens on each of 2" in tokens
        assert "partition of 4 tokens on each of 3" in size
        assert "[4, a divisor of 4, 8]" in heads
        assert "values (3, 2, 8)" in shapes
