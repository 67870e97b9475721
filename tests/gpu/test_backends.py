"""On a GPU: every backend gives the same model within bfloat16, keeps samples apart, and trains; FP8 follows bfloat16."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))

import subject  # noqa: E402

from llava_mcore.models.backend import backend_problems, installed, problems_here  # noqa: E402
from llava_mcore.models.flash import flash_attention, package_kernel, torch_kernel  # noqa: E402

REFERENCE = ["precision.backend=torch", "precision.attention=sdpa"]
BACKENDS = {
    "torch, flash": ["precision.backend=torch", "precision.attention=flash"],
    "Transformer Engine": ["precision.backend=transformer_engine"],
    "Transformer Engine, fused": ["precision.backend=transformer_engine", "precision.attention=fused"],
    "Transformer Engine, flash": ["precision.backend=transformer_engine", "precision.attention=flash"],
    "Transformer Engine, sdpa": ["precision.backend=transformer_engine", "precision.attention=sdpa"],
}
EVERYWHERE = "precision.fp8_modules=[language_model,projector,vision_tower]"
FP8 = {
    "tensorwise": ["precision=fp8_hybrid", "precision.fp8_first_last_bf16=0"],
    "tensorwise, bf16 ends": ["precision=fp8_hybrid"],
    "tensorwise, every module": ["precision=fp8_hybrid", EVERYWHERE],
    "delayed": ["precision=fp8_hybrid", "precision.fp8_recipe=delayed", "precision.fp8_first_last_bf16=0"],
    "blockwise": ["precision=fp8_blockwise"],
    "mxfp8": ["precision=fp8_hybrid", "precision.fp8_recipe=mxfp8"],
    "FP8 weights": ["precision=fp8_hybrid", "precision.fp8_param_gather=true"],
}
# bfloat16 has 8 bits: 0.4 % a rounding, over some ten layers. FP8 has 3 or 4.
BF16, FP8_LOSS = 0.03, 0.08


def opened(*overrides: str) -> subject.Subject:
    """The subject on this backend, or a skip with the reasons why it cannot run here."""
    run = subject.settings(*overrides)
    if problems := problems_here(run):
        pytest.skip("; ".join(problems))
    return subject.Subject(run)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-12))


@pytest.fixture(scope="module")
def reference() -> subject.Result:
    """Of torch's layers and attention in float32."""
    built = opened(*REFERENCE, "train.dtype=float32")
    result = built.result()
    built.close()
    return result


@pytest.mark.parametrize("backend", ["torch, sdpa", *BACKENDS])
def test_every_backend_is_the_same_model(backend: str, reference: subject.Result) -> None:
    built = opened(*BACKENDS.get(backend, REFERENCE))
    result = built.result()
    built.close()
    assert relative(result.token_losses_T, reference.token_losses_T) < BF16
    assert result.gradients.keys() == reference.gradients.keys()
    whole = [torch.cat([value.flatten() for _, value in sorted(found.gradients.items())]) for found in (result, reference)]
    assert relative(*whole) < 2 * BF16


@pytest.mark.parametrize("backend", ["torch, sdpa", *BACKENDS])
def test_samples_do_not_see_each_other(backend: str) -> None:
    built = opened(*BACKENDS.get(backend, REFERENCE))
    before = built.token_losses(subject.batch())
    for changed in range(3):
        after = built.token_losses(subject.batch(changed))
        for number, (old, new) in enumerate(zip(before.split(subject.LENGTHS), after.split(subject.LENGTHS), strict=True)):
            assert torch.equal(old, new) == (number != changed), f"sample {changed} changed, sample {number} moved"
    built.close()


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("backend", ["torch, flash", "Transformer Engine"])
def test_recomputed_activations_give_the_same_gradients(backend: str, recompute: str) -> None:
    found = []
    for choice in ("none", recompute):
        built = opened(*BACKENDS[backend], f"train.recompute={choice}")
        found.append(built.result().gradients)
        built.close()
    for name, value in found[0].items():
        assert relative(found[1][name], value) < BF16, name


@pytest.mark.parametrize("case", FP8)
def test_fp8_follows_bfloat16(case: str) -> None:
    losses = []
    for overrides in (["precision.backend=transformer_engine"], FP8[case]):
        built = opened(*overrides, "train.lr=1e-3", "train.warmup_ratio=0", "train.steps=20")
        losses.append(built.train(10))
        built.close()
    assert losses[1][-1] < losses[1][0] - 0.5, losses  # it learns
    for bf16, fp8 in zip(*losses, strict=True):
        assert abs(fp8 - bf16) < FP8_LOSS * bf16, losses
    assert losses[0] != losses[1]  # and is not bfloat16 under another name


@pytest.mark.parametrize("kernel", ["torch", "flash-attn"])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 20), (False, None)])
def test_flash_attention_equals_one_sample_after_the_other(kernel, groups, causal, window, monkeypatch) -> None:
    chosen = {"torch": torch_kernel, "flash-attn": package_kernel}[kernel]()
    if chosen is None:
        pytest.skip(f"{kernel} has no kernel here")
    monkeypatch.setattr("llava_mcore.models.flash.torch_kernel", lambda: chosen)
    torch.manual_seed(2)
    lengths = [37, 1, 90]
    leaves = [torch.randn(sum(lengths), heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, groups, groups)]
    ends = torch.tensor([0, 37, 38, 128], dtype=torch.int32, device="cuda")

    def plain(query, key, value):
        outputs = []
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
            one = (x.transpose(0, 1)[None].float() for x in (q, k, v))
            everything = torch.ones(len(q), len(q), dtype=torch.bool, device="cuda")
            seen = everything.tril() if causal else everything
            seen = seen if window is None else seen.triu(1 - window)
            outputs.append(F.scaled_dot_product_attention(*one, attn_mask=seen, scale=0.2, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outputs)

    found = []
    for attend in (lambda *x: flash_attention(*x, ends, max(lengths), causal, 0.2, window), plain):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        output = attend(*inputs).float()
        output.square().sum().backward()
        found.append([output, *(tensor.grad for tensor in inputs)])
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) < BF16


def test_fp8_is_refused_where_the_device_has_none() -> None:
    capability = torch.cuda.get_device_capability()
    if capability >= (8, 9):
        pytest.skip(f"compute capability {capability} has FP8")
    assert any(
        "compute capability" in text
        for text in backend_problems(subject.settings("precision=fp8_hybrid"), True, capability, installed())
    )
