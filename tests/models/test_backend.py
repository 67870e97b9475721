"""Which layers and kernels are chosen, what is refused, and that layers with fused norms are the same model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from ranks import ranks

from llava_mcore.models import layers
from llava_mcore.models.attention import PackedAttention, PackedSamples
from llava_mcore.models.backend import (
    FLASH_ATTN,
    FUSED_GRADIENTS,
    TE,
    TORCH_FLASH,
    backend_problems,
    padded_pictures,
    precision_fields,
    problems_here,
    resolve,
)
from llava_mcore.models.config import DTYPES, decoder_config, projector_config, tower_config
from llava_mcore.models.flash import flash_attention, torch_kernel
from llava_mcore.models.initialize import initialize
from llava_mcore.models.layers import TORCH, Norm, layer_spec, parts_of
from llava_mcore.models.llava import build_model
from llava_mcore.parallel import groups as process_groups
from llava_mcore.settings.compose import SettingsError, compose, from_stored, to_dict
from llava_mcore.settings.schema import ParallelSettings, PrecisionSettings, Settings
from llava_mcore.training.checkpoint import model_state, sharding_metadata

EVERYTHING = {TE, TORCH_FLASH, FLASH_ATTN}
HOPPER = (9, 0)


@functools.cache
def composed(*groups: str) -> Settings:
    return compose(["experiment=finetune_llava_7b", "parallel=tp2", *groups])


def settings(*overrides: str) -> Settings:
    groups = [text for text in overrides if "." not in text]
    return from_stored(to_dict(composed(*groups)), [text for text in overrides if "." in text])


def problems(*overrides: str, cuda: bool = True, capability: Any = HOPPER, present: set[str] = EVERYTHING) -> list[str]:
    return backend_problems(settings(*overrides), cuda, capability if cuda else None, present)


# ---- what is chosen ----


@pytest.mark.parametrize(
    ("dtype", "cuda", "present", "backend", "attention"),
    [
        ("bfloat16", True, EVERYTHING, "transformer_engine", "auto"),
        ("bfloat16", True, {FLASH_ATTN}, "torch", "flash"),
        ("bfloat16", True, {TORCH_FLASH}, "torch", "flash"),
        ("bfloat16", True, set(), "torch", "sdpa"),
        ("float32", True, EVERYTHING, "torch", "sdpa"),
        ("bfloat16", False, EVERYTHING, "torch", "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_works(dtype, cuda, present, backend, attention):
    found = resolve(PrecisionSettings(), dtype, cuda, present)
    assert (found.backend, found.attention) == (backend, attention)


def test_what_was_asked_for_is_kept():
    asked = PrecisionSettings(backend="torch", attention="sdpa", gradient_accumulation_fusion=False)
    assert resolve(asked, "bfloat16", True, EVERYTHING) == asked
    asked = PrecisionSettings(backend="transformer_engine", attention="flash", gradient_accumulation_fusion=True)
    assert resolve(asked, "float32", False, set()) == asked


@pytest.mark.parametrize(
    ("backend", "present", "fused"),
    [("transformer_engine", {TE}, True), ("torch", {FUSED_GRADIENTS}, True), ("torch", set(), False)],
)
def test_gradients_are_accumulated_by_the_products_where_that_can_be(backend, present, fused):
    assert resolve(PrecisionSettings(backend=backend), "bfloat16", True, present).gradient_accumulation_fusion is fused


def test_this_machine_runs_the_defaults():
    assert problems_here(compose(["experiment=quickstart"])) == []


# ---- what is refused, and how it says so ----


@pytest.mark.parametrize("preset", ["default", "fp8_hybrid", "fp8_blockwise"])
def test_presets_fit_llava_on_hopper(preset):
    assert problems(f"precision={preset}") == []
    assert problems(f"precision={preset}", "parallel=tp4", "experiment=finetune_llava_13b") == []


REFUSED = {
    "no GPU": (["precision.backend=transformer_engine"], {"cuda": False}, "needs a GPU; set precision.backend=torch"),
    "not installed": (["precision.backend=transformer_engine"], {"present": set()}, "pip install --no-build-isolation"),
    "no Apex": (
        ["precision.backend=torch", "precision.gradient_accumulation_fusion=true"],
        {"present": set()},
        "fused_weight_gradient_mlp_cuda is not there; install NVIDIA's Apex",
    ),
    "float32": (["precision.backend=transformer_engine", "train.dtype=float32"], {}, "needs train.dtype=bfloat16, not float32"),
    "fp8 on torch": (["precision.fp8=hybrid", "precision.backend=torch"], {}, "precision.fp8=hybrid needs Transformer Engine"),
    "fp8, nothing installed": (["precision.fp8=hybrid"], {"present": set()}, "precision.fp8=hybrid needs Transformer Engine"),
    "fp8 in float32": (["precision=fp8_hybrid", "train.dtype=float32"], {}, "precision.fp8=hybrid needs train.dtype=bfloat16"),
    "Ampere": (
        ["precision=fp8_hybrid"],
        {"capability": (8, 0)},
        "needs compute capability 8.9, this GPU has 8.0; set precision.fp8=",
    ),
    "Ada": (
        ["precision=fp8_blockwise"],
        {"capability": (8, 9)},
        "needs compute capability 9.0, this GPU has 8.9; set precision.fp8_r",
    ),
    "mxfp8": (["precision=fp8_blockwise", "precision.fp8_recipe=mxfp8"], {}, "needs compute capability 10.0, this GPU has 9.0"),
    "flash in float32": (["precision.attention=flash", "train.dtype=float32"], {}, "precision.attention=flash needs train.dtype"),
    "flash nowhere": (["precision.attention=flash"], {"present": set()}, "needs torch 2.11 or flash-attn; pip install"),
    "flash with TE": (["precision.attention=flash"], {"present": {TE, TORCH_FLASH}}, "with Transformer Engine needs flash-attn"),
    "flash on a CPU": (["precision.attention=flash"], {"cuda": False}, "precision.attention=flash needs a GPU"),
    "fused on torch": (
        ["precision.attention=fused"],
        {"present": {TORCH_FLASH}},
        "precision.attention=fused is Transformer Engine's",
    ),
    "context": (["precision.attention=flash", "parallel.context=2"], {}, "parallel.context=2) attends by its own exchange"),
    "p2p on torch": (
        ["parallel.context=2", "parallel.context_exchange=p2p", "precision.backend=torch"],
        {},
        "p2p is Transformer Engine's; set precision.backend=transformer_engine, or parallel.context_exchange=ring",
    ),
    "a2a, nothing installed": (
        ["parallel.context=2", "parallel.context_exchange=a2a"],
        {"present": set()},
        "parallel.context_exchange=a2a is Transformer Engine's",
    ),
    "p2p by sdpa": (
        ["parallel.context=2", "parallel.context_exchange=p2p", "precision.attention=sdpa"],
        {},
        "attends by Transformer Engine, not by precision.attention=sdpa; set precision.attention=auto",
    ),
    "p2p of odd heads": (
        ["parallel.context=2", "parallel.context_exchange=p2p", "model.language.kv_channels=100"],
        {},
        "heads of a multiple of 8 and at most 256, these are 100 wide",
    ),
    "p2p on Ampere": (
        ["parallel.context=2", "parallel.context_exchange=p2p"],
        {"present": {TE}, "capability": (8, 0)},
        "parallel.context_exchange=p2p on compute capability 8.0 needs flash-attn; pip install",
    ),
    "p2p by cuDNN on Blackwell's desktops": (
        ["parallel.context=2", "parallel.context_exchange=p2p", "precision.attention=fused"],
        {"capability": (12, 0)},
        "on compute capability 12.0 needs flash-attn",
    ),
    "rows": (
        ["precision=fp8_hybrid", "data.sequence_length=2040"],
        {},
        "one rank (1020) is not a multiple of 16; change data.seq",
    ),
    "rows of sequence parallelism": (
        ["precision=fp8_hybrid", "parallel=tp8", "data.sequence_length=2112"],
        {},
        "(264) is not a mul",
    ),
    "columns": (
        ["precision=fp8_hybrid", "model.language.ffn_hidden_size=11000"],
        {},
        "ffn_hidden_size / parallel.tensor (5500)",
    ),
    "columns of mxfp8": (
        ["precision=fp8_hybrid", "precision.fp8_recipe=mxfp8", "parallel.tensor=8", "model.language.ffn_hidden_size=11136"],
        {"capability": (10, 0)},
        "ffn_hidden_size / parallel.tensor (1392) is not a multiple of 32",
    ),
    "projector": (
        ["precision=fp8_hybrid", "precision.fp8_modules=[projector]", "model.vision.select_feature=cls_patch"],
        {},
        "embeddings of a picture (577) is not a multiple of 16; leave projector out of precision.fp8_modules",
    ),
    "overlap without Transformer Engine": (
        ["parallel.tp_comm_overlap=true", "precision.backend=torch"],
        {},
        "parallel.tp_comm_overlap=true is Transformer Engine's; set precision.backend=transformer_engine",
    ),
    "overlap of blocks": (
        ["parallel.tp_comm_overlap=true", "precision=fp8_blockwise"],
        {},
        "gathers no numbers of precision.fp8_recipe=blockwise; set precision.fp8_recipe=tensorwise",
    ),
    "overlap in parts that do not divide": (
        ["parallel.tp_comm_overlap=true", "data.sequence_length=2044"],
        {},
        "needs the 2044 tokens of a micro-batch on a context-parallel rank to be a multiple of 8",
    ),
    "bf16 layers": (
        ["precision=fp8_hybrid", "precision.fp8_first_last_bf16=33"],
        {},
        "more than the 32 layers of a pipeline stage",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_a_fix(case):
    overrides, machine, words = REFUSED[case]
    assert any(words in problem for problem in problems(*overrides, **machine)), problems(*overrides, **machine)


@pytest.mark.parametrize("attention", ["auto", "flash", "fused"])
@pytest.mark.parametrize("exchange", ["p2p", "a2a"])
def test_transformer_engines_exchange_takes_its_attention(exchange, attention):
    asked = ["parallel.context=2", f"parallel.context_exchange={exchange}", f"precision.attention={attention}"]
    assert problems(*asked) == []
    assert problems(*asked, "parallel.context=1") == []
    if attention != "fused":
        assert problems(*asked, capability=(8, 0)) == []  # as flash-attn is there


def test_all_reasons_come_at_once():
    found = problems("precision=fp8_hybrid", "train.dtype=float32", "data.sequence_length=2040", capability=(8, 0), present=set())
    assert len(found) == 5
    found = problems(
        "parallel.context=2", "parallel.context_exchange=p2p", "precision.attention=sdpa", present={TE}, capability=(8, 0)
    )
    assert len(found) == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["precision=fp8_hybrid", "precision.fp8_recipe=delayed"], "exclude each other; use fp8_recipe=tensorwise"),
        (
            ["precision=fp8_blockwise", "precision.fp8_recipe=mxfp8", "precision.fp8_param_gather=true"],
            "set fp8_param_gather=false",
        ),
        (["precision.fp8_param_gather=true"], "fp8_param_gather needs fp8=hybrid"),
        (["precision.fp8=hybrid", "precision.fp8_modules=[]"], "fp8_modules is empty"),
    ],
)
def test_settings_that_contradict_each_other(override, words):
    with pytest.raises(SettingsError, match=words):
        settings(*override)


# ---- what Megatron-Core is told ----


def test_fp8_fields_reach_the_modules_they_are_for():
    run = settings(
        "precision=fp8_hybrid", "precision.fp8_modules=[language_model,vision_tower]", "precision.fp8_param_gather=true"
    )
    arguments = (run.model, run.parallel, DTYPES["bfloat16"])
    decoder = decoder_config(*arguments, precision=run.precision)
    assert (decoder.fp8, decoder.fp8_recipe, decoder.fp8_param) == ("hybrid", "tensorwise", True)
    assert decoder.first_last_layers_bf16 and decoder.num_layers_at_start_in_bf16 == decoder.num_layers_at_end_in_bf16 == 1
    assert decoder.transformer_impl == "transformer_engine" and decoder.attention_backend == AttnBackend.auto
    tower = tower_config(*arguments, precision=run.precision)
    assert tower.fp8 == "hybrid" and not tower.first_last_layers_bf16
    projector = projector_config(*arguments, run.precision)
    assert projector.fp8 is None and projector.transformer_impl == "transformer_engine"


@pytest.mark.parametrize(
    ("context", "exchange", "told"), [(2, "p2p", "p2p"), (2, "a2a", "a2a"), (2, "ring", None), (1, "p2p", None)]
)
def test_only_transformer_engines_exchange_reaches_megatron(context, exchange, told):
    run = settings(f"parallel.context={context}", f"parallel.context_exchange={exchange}")
    assert decoder_config(run.model, run.parallel, DTYPES["bfloat16"], precision=run.precision).cp_comm_type == told
    assert tower_config(run.model, run.parallel, DTYPES["bfloat16"], precision=run.precision).cp_comm_type is None


def test_delayed_scaling_keeps_a_history():
    fields = precision_fields(PrecisionSettings(fp8="e4m3", fp8_recipe="delayed", backend="transformer_engine"), "language_model")
    assert fields["fp8_amax_history_len"] == 1024 and fields["fp8_amax_compute_algo"] == "max"


def test_without_asking_the_configuration_is_the_portable_one():
    run = settings()
    config = decoder_config(run.model, run.parallel, DTYPES["float32"])
    assert config.transformer_impl == "local" and config.attention_backend == AttnBackend.local and config.fp8 is None
    assert parts_of(config) is TORCH


@pytest.mark.parametrize(
    ("pictures", "rows", "multiple", "expected"), [(3, 577, 16, 16), (17, 577, 16, 32), (3, 576, 16, 3), (1, 24, 16, 2)]
)
def test_blank_pictures_make_up_rows(pictures, rows, multiple, expected):
    assert padded_pictures(pictures, rows, multiple) == expected
    assert expected * rows % multiple == 0


# ---- layers ----


class NormColumn(ColumnParallelLinear):
    """A norm and a column-parallel linear in one, called and named like Transformer Engine's, on torch."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        norm = Norm(config, input_size, config.layernorm_epsilon)
        self.layer_norm_weight, self.layer_norm_bias, self.norm_config = norm.weight, norm.bias, config

    def forward(self, x: torch.Tensor) -> Any:
        shape, eps = x.shape[-1:], self.norm_config.layernorm_epsilon
        if self.layer_norm_bias is not None:
            return super().forward(F.layer_norm(x, shape, self.layer_norm_weight, self.layer_norm_bias, eps))
        return super().forward(F.rms_norm(x, shape, self.layer_norm_weight, eps))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {"weight": 0, "bias": 0}, sharded_offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )


FUSED = dataclasses.replace(TORCH, norm_column=NormColumn)


def test_a_fused_norm_takes_the_place_of_both():
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    spec = layer_spec(config, AttnMaskType.causal, FUSED).submodules
    assert spec.input_layernorm is IdentityOp and spec.pre_mlp_layernorm is IdentityOp
    assert spec.self_attention.submodules.linear_qkv is NormColumn and spec.mlp.submodules.linear_fc1 is NormColumn
    assert spec.mlp.submodules.linear_fc2 is RowParallelLinear and spec.sharded_state_dict_keys_map == {}
    plain = layer_spec(config, AttnMaskType.causal).submodules
    assert plain.input_layernorm is Norm and plain.self_attention.submodules.linear_qkv is ColumnParallelLinear


def build_with(parts: Any, parallel: ParallelSettings) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """On a rank: weights by their names in a checkpoint, and the loss of each token."""
    run = compose(["experiment=quickstart"])
    groups = process_groups.build(parallel)
    kept = layers.parts_of
    layers.parts_of = lambda config: parts
    try:
        model = build_model(run.model, parallel, "float32", groups)
    finally:
        layers.parts_of = kept
    initialize(model, 7, sharding_metadata(groups))
    (part,) = model
    ids = torch.arange(48) % 500
    pictures = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    positions = torch.cat([torch.arange(30), torch.arange(18)])
    with torch.no_grad():
        losses = part(ids, positions, [30, 18], pictures, torch.arange(16) + 2, ids.roll(-1))
    state = model_state(model, groups)["part0"]
    return {shard.key: getattr(shard, "data", None) for shard in state.values() if hasattr(shard, "key")}, losses


def both_ways() -> tuple[list[str], list[str], torch.Tensor, torch.Tensor]:
    parallel = ParallelSettings(tensor=2, encoder="tensor_parallel")
    names, losses = build_with(TORCH, parallel)
    process_groups.destroy()
    fused_names, fused_losses = build_with(FUSED, parallel)
    return sorted(names), sorted(fused_names), losses, fused_losses


def test_fused_layers_are_the_same_model_under_the_same_names():
    names, fused_names, losses, fused_losses = ranks(2).run(both_ways)[0]
    assert names == fused_names and any("linear_qkv.layer_norm_weight" in name for name in names)
    assert torch.equal(losses, fused_losses)


# ---- attention ----


def test_boundaries_in_transformer_engines_form():
    thd = PackedSamples(sample_lengths=[3, 5, 1]).as_thd(torch.device("cpu"))
    assert thd.qkv_format == "thd" and thd.cu_seqlens_q.tolist() == thd.cu_seqlens_kv.tolist() == [0, 3, 8, 9]
    assert thd.cu_seqlens_q.dtype == torch.int32 and (thd.max_seqlen_q, thd.max_seqlen_kv) == (5, 5)
    assert thd.cp_group is None  # Transformer Engine would start its own context parallelism


def test_boundaries_are_made_once():
    samples = PackedSamples(sample_lengths=[3, 5])
    assert samples.ends(torch.device("cpu")) is samples.ends(torch.device("cpu"))


@pytest.mark.skipif(torch_kernel() is None, reason="this torch has no varlen_attn with a scale")
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_torchs_flash_kernel_takes_our_arguments(groups, causal):
    """Shapes and argument names alone: the kernel itself needs a GPU (tests/gpu)."""
    query, key = (torch.empty(9, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, groups))
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    for window in (None, 3) if causal else (None,):
        assert flash_attention(query, key, key, ends, 5, causal, 0.25, window).shape == (9, 4, 16)


def test_packed_samples_go_through_the_flash_kernel_where_it_is_chosen(monkeypatch):
    """The call it makes, computed by plain attention: the same result as one sample after the other."""
    calls = []

    def plain(query_TND, key_TGD, value_TGD, ends_K, longest, causal, scale, window):
        calls.append((ends_K.tolist(), longest, window))
        outputs = []
        for start, end in zip(ends_K[:-1], ends_K[1:], strict=True):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query_TND, key_TGD, value_TGD))
            outputs.append(
                F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)[0].transpose(0, 1)
            )
        return torch.cat(outputs)

    monkeypatch.setattr("llava_mcore.models.attention.flash_attention", plain)
    run = compose(["experiment=quickstart"])
    config = decoder_config(run.model, run.parallel, torch.float32)
    arguments = (1, AttnMaskType.causal, "self")
    one_by_one = PackedAttention(config, *arguments)
    config.attention_backend = AttnBackend.flash
    flash = PackedAttention(config, *arguments)
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(9, 1, heads, 32, generator=generator) for heads in (4, 2, 2))
    inputs = (query, key, value, None)
    expected = one_by_one(*inputs, packed_seq_params=PackedSamples(sample_lengths=[3, 5, 1]))
    torch.testing.assert_close(flash(*inputs, packed_seq_params=PackedSamples(sample_lengths=[3, 5, 1])), expected)
    config.window_size = (2, 0)
    PackedAttention(config, *arguments)(*inputs, packed_seq_params=PackedSamples(sample_lengths=[9]))
    assert calls == [([0, 3, 8, 9], 5, None), ([0, 9], 9, 3)]
