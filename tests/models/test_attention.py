"""Packed attention against a dense mask, written independently: values, gradients, and that no sample sees another."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from llava_mcore.models.attention import PackedAttention, PackedSamples

LENGTHS = [5, 1, 12, 7, 2]
WIDTH = 6


def configured(dropout: float = 0.0, scale: float | None = None, window: int | None = None) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=4 * WIDTH,
        num_attention_heads=4,
        attention_dropout=dropout,
        softmax_scale=scale,
        attention_backend=AttnBackend.local,
        window_size=(window - 1, 0) if window else None,
    )


def attention(causal: bool = True, scale: float | None = None) -> PackedAttention:
    return PackedAttention(configured(scale=scale), 1, AttnMaskType.causal if causal else AttnMaskType.no_mask, "self")


def inputs(heads: int, groups: int, rows: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one stream."""
    generator = torch.Generator().manual_seed(heads * 10 + groups)
    shapes = ((sum(LENGTHS), rows, count, WIDTH) for count in (heads, groups, groups))
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)
    return query, key, value


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax over all pairs that the mask [S, S] allows, head by head, as the formula has it."""
    each = query.shape[2] // key.shape[2]
    heads = []
    for head in range(query.shape[2]):
        scores = query[:, 0, head] @ key[:, 0, head // each].T * scale
        heads.append(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value[:, 0, head // each])
    return torch.cat(heads, dim=-1)[:, None]


def same_sample(causal: bool) -> Tensor:
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = sample[:, None] == sample[None]
    return mask.tril() if causal else mask


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_a_dense_mask(heads: int, groups: int, causal: bool, scale: float | None) -> None:
    tensors = inputs(heads, groups)
    ours = attention(causal, scale)(*tensors, None, packed_seq_params=PackedSamples(sample_lengths=LENGTHS))
    theirs = dense(*tensors, same_sample(causal), WIDTH**-0.5 if scale is None else scale)
    assert ours.shape == (sum(LENGTHS), 1, heads * WIDTH)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0), dtype=ours.dtype)
    for mine, other in zip(
        torch.autograd.grad((ours * weights).sum(), tensors), torch.autograd.grad((theirs * weights).sum(), tensors), strict=True
    ):
        assert torch.allclose(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 130, 400])
def test_a_sliding_window_equals_a_dense_mask(window: int) -> None:
    """Samples shorter than the window, longer, and longer than what is worked on at once."""
    lengths = [300, 2, 129, 128]
    generator = torch.Generator().manual_seed(window)
    shapes = ((sum(lengths), 1, heads, WIDTH) for heads in (4, 2, 2))
    tensors = tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    core = PackedAttention(configured(window=window), 1, AttnMaskType.causal, "self")
    ours = core(*tensors, None, packed_seq_params=PackedSamples(sample_lengths=lengths))
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    seen = (sample[:, None] == sample[None]) & (place[:, None] >= place[None]) & (place[:, None] - place[None] < window)
    theirs = dense(*tensors, seen, WIDTH**-0.5)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours.square().sum(), tensors), torch.autograd.grad(theirs.square().sum(), tensors), strict=True
    ):
        assert torch.allclose(mine, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_no_sample_sees_another(dtype: torch.dtype, changed: int) -> None:
    """Not by one bit, forward or backward."""
    begin = sum(LENGTHS[:changed])
    window = slice(begin, begin + LENGTHS[changed])
    others = torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[window] = False
    found = []
    for noise in (0.0, 3.0):
        tensors = [tensor.detach().clone() for tensor in inputs(6, 2, dtype=dtype)]
        for tensor in tensors:
            tensor[window] += noise
            tensor.requires_grad_()
        output = attention()(*tensors, None, packed_seq_params=PackedSamples(sample_lengths=LENGTHS))
        found.append([output[others], *(grad[others] for grad in torch.autograd.grad(output.square().sum(), tensors))])
        moved = output[window].detach()
        found[-1].append(moved)
    for before, after in zip(found[0][:-1], found[1][:-1], strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(found[0][-1], found[1][-1])


def test_a_samples_loss_gives_no_other_sample_a_gradient() -> None:
    tensors = inputs(4, 2)
    output = attention()(*tensors, None, packed_seq_params=PackedSamples(sample_lengths=LENGTHS))
    own = slice(LENGTHS[0] + LENGTHS[1], sum(LENGTHS[:3]))
    for grad in torch.autograd.grad(output[own].sum(), tensors):
        assert not grad[: own.start].any() and not grad[own.stop :].any()
    value_grad = torch.autograd.grad(
        attention()(*tensors, None, packed_seq_params=PackedSamples(sample_lengths=LENGTHS))[own].sum(), tensors[2]
    )
    assert value_grad[0][own].any()


def test_rows_without_packing() -> None:
    """The tower's pictures: each row attends fully within itself."""
    query, key, value = inputs(4, 4, rows=3)
    output = attention(causal=False)(query, key, value, None)
    everything = torch.ones(len(query), len(query), dtype=torch.bool)
    for row in range(3):
        one = dense(query[:, row : row + 1], key[:, row : row + 1], value[:, row : row + 1], everything, WIDTH**-0.5)
        assert torch.allclose(output[:, row : row + 1], one, rtol=0, atol=1e-12)


def test_what_it_cannot_do_is_refused() -> None:
    tensors = inputs(2, 2)
    with pytest.raises(ValueError, match="dense masks"):
        attention()(*tensors, torch.ones(1, 1, 27, 27, dtype=torch.bool))
    with pytest.raises(ValueError, match="dropout"):
        PackedAttention(configured(dropout=0.1), 1, AttnMaskType.causal, "self")
    with pytest.raises(ValueError, match="causal or no_mask"):
        PackedAttention(configured(), 1, AttnMaskType.arbitrary, "self")
