"""Published families of towers and decoders as data: their tensors' names, their config.json, what they compute. No torch.

A new family is one entry in ``TOWERS`` or ``DECODERS``. Settings, conversion and documentation read it from here; the model reads
only what the settings then say (``qkv_bias``, ``class_token``, ...), so that a model of one's own can mix these freely as long as
its family can express them.

Shapes are words that conversion looks up in the dimensions of a model (``conversion.families.dimensions``); ``a+b`` are rows of
``a`` after which come rows of ``b``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple


class Part(NamedTuple):
    """A tensor of the published checkpoint: its name below the module's prefix, and its shape in words.

    ``{i}`` stands for the layer's number, ``{e}`` for the expert's.
    """

    name: str
    shape: str


@dataclass(frozen=True)
class Row:
    """One tensor of ours and the published tensors it is made of.

    ``fusion`` is a name in ``conversion.fusions.FUSIONS``, ``when`` a setting of the module without which the tensor isn't there.
    """

    ours: str
    parts: tuple[Part, ...]
    fusion: str = "same"
    when: str | None = None


def row(ours: str, *parts: tuple[str, str], fusion: str = "same", when: str | None = None) -> Row:
    """A :class:`Row` from plain pairs."""
    return Row(ours, tuple(Part(*part) for part in parts), fusion, when)


@dataclass(frozen=True, kw_only=True)
class Names:
    """One module's tensors.

    Attributes:
        anchor: a published name that every checkpoint holds: it finds the prefix.
        rows: tensors there once.
        layers: tensors of every layer.
        unused: published tensors that are never built.
        extra: patterns of further tensors that a checkpoint may hold and that are never built; they are carried along.
    """

    anchor: str
    rows: tuple[Row, ...] = ()
    layers: tuple[Row, ...] = ()
    unused: tuple[Part, ...] = ()
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family(Names):
    """A published architecture of a tower or decoder.

    Attributes:
        model_type: its name in config.json.
        fixed: settings that follow from the family.
        entries: setting -> entry of config.json that carries its value.
        aliases: entry -> another name that some versions of transformers write it under.
        defaults: what transformers assumes where an entry is left out, as published files do.
        only: entries that must have one of these values.
        constants: entries of the config.json that is written for a model which never had one.
        rope_types: kinds of rotary scaling the family knows.
    """

    model_type: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    entries: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ()


# ---- towers ----


def _both(ours: str, theirs: str, rows: str, columns: str) -> tuple[Row, Row]:
    """Weight and bias of a linear layer."""
    return row(f"{ours}.weight", (f"{theirs}.weight", f"{rows} {columns}")), row(f"{ours}.bias", (f"{theirs}.bias", rows))


def _norm(ours: str, theirs: str) -> tuple[Row, Row]:
    """Weight and bias of a layer norm, which lies with the linear that follows it."""
    return row(f"{ours}_weight", (f"{theirs}.weight", "hidden")), row(f"{ours}_bias", (f"{theirs}.bias", "hidden"))


_BLOCK = "encoder.layers.{i}"  # called so by both

CLIP = Family(
    model_type="clip_vision_model",
    anchor="embeddings.patch_embedding.weight",
    rows=(
        row("patch_embedding.weight", ("embeddings.patch_embedding.weight", "hidden channels patch patch"), fusion="flatten"),
        row("patch_embedding.bias", ("embeddings.patch_embedding.bias", "hidden"), when="patch_bias"),
        row("class_embedding", ("embeddings.class_embedding", "hidden"), when="class_token"),
        row("position_embedding", ("embeddings.position_embedding.weight", "positions hidden")),
        row("pre_layernorm.weight", ("pre_layrnorm.weight", "hidden"), when="pre_norm"),
        row("pre_layernorm.bias", ("pre_layrnorm.bias", "hidden"), when="pre_norm"),
    ),
    layers=(
        *_norm(f"{_BLOCK}.self_attention.linear_qkv.layer_norm", f"{_BLOCK}.layer_norm1"),
        row(
            f"{_BLOCK}.self_attention.linear_qkv.weight",
            *((f"{_BLOCK}.self_attn.{name}_proj.weight", "hidden hidden") for name in "qkv"),
            fusion="qkv",
        ),
        row(
            f"{_BLOCK}.self_attention.linear_qkv.bias",
            *((f"{_BLOCK}.self_attn.{name}_proj.bias", "hidden") for name in "qkv"),
            fusion="qkv",
        ),
        *_both(f"{_BLOCK}.self_attention.linear_proj", f"{_BLOCK}.self_attn.out_proj", "hidden", "hidden"),
        *_norm(f"{_BLOCK}.mlp.linear_fc1.layer_norm", f"{_BLOCK}.layer_norm2"),
        *_both(f"{_BLOCK}.mlp.linear_fc1", f"{_BLOCK}.mlp.fc1", "ffn", "hidden"),
        *_both(f"{_BLOCK}.mlp.linear_fc2", f"{_BLOCK}.mlp.fc2", "hidden", "ffn"),
    ),
    unused=(Part("post_layernorm.weight", "hidden"), Part("post_layernorm.bias", "hidden")),
    extra=(r"embeddings\.position_ids",),
    fixed={"class_token": True, "patch_bias": False, "pre_norm": True, "activation": "quick_gelu"},
    entries={
        "image_size": "image_size",
        "patch_size": "patch_size",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "norm_eps": "layer_norm_eps",
    },
    defaults={
        "image_size": 224,
        "patch_size": 32,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "layer_norm_eps": 1e-5,
    },
    only={"hidden_act": (None, "quick_gelu"), "num_channels": (None, 3)},
    constants={"hidden_act": "quick_gelu", "num_channels": 3},
)

TOWERS: dict[str, Family] = {
    "clip": CLIP,
    "siglip": replace(
        CLIP,
        model_type="siglip_vision_model",
        extra=(*CLIP.extra, r"head\..+"),  # its attention pooling
        fixed={"class_token": False, "patch_bias": True, "pre_norm": False, "activation": "gelu_tanh"},
        defaults={**CLIP.defaults, "patch_size": 16, "layer_norm_eps": 1e-6},
        only={"hidden_act": (None, "gelu_pytorch_tanh"), "num_channels": (None, 3)},
        constants={"hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "vision_use_head": False},
    ),
}


# ---- decoders ----

_OURS, _THEIRS = "decoder.layers.{i}", "layers.{i}"

_DECODER_ROWS = (
    row("embedding.word_embeddings.weight", ("embed_tokens.weight", "vocab hidden"), fusion="vocab"),
    row("decoder.final_layernorm.weight", ("norm.weight", "hidden")),
)
_QKV = (("q", "query"), ("k", "key"), ("v", "key"))
_ATTENTION = (
    row(f"{_OURS}.self_attention.linear_qkv.layer_norm_weight", (f"{_THEIRS}.input_layernorm.weight", "hidden")),
    row(
        f"{_OURS}.self_attention.linear_qkv.weight",
        *((f"{_THEIRS}.self_attn.{name}_proj.weight", f"{rows} hidden") for name, rows in _QKV),
        fusion="qkv",
    ),
    row(
        f"{_OURS}.self_attention.linear_qkv.bias",
        *((f"{_THEIRS}.self_attn.{name}_proj.bias", rows) for name, rows in _QKV),
        fusion="qkv",
        when="qkv_bias",
    ),
    row(f"{_OURS}.self_attention.q_layernorm.weight", (f"{_THEIRS}.self_attn.q_norm.weight", "head"), when="qk_norm"),
    row(f"{_OURS}.self_attention.k_layernorm.weight", (f"{_THEIRS}.self_attn.k_norm.weight", "head"), when="qk_norm"),
    row(f"{_OURS}.self_attention.linear_proj.weight", (f"{_THEIRS}.self_attn.o_proj.weight", "hidden query")),
)
_MLP = (
    row(f"{_OURS}.mlp.linear_fc1.layer_norm_weight", (f"{_THEIRS}.post_attention_layernorm.weight", "hidden")),
    row(
        f"{_OURS}.mlp.linear_fc1.weight",
        (f"{_THEIRS}.mlp.gate_proj.weight", "ffn hidden"),
        (f"{_THEIRS}.mlp.up_proj.weight", "ffn hidden"),
        fusion="stack",
    ),
    row(f"{_OURS}.mlp.linear_fc2.weight", (f"{_THEIRS}.mlp.down_proj.weight", "hidden ffn")),
)

LLAMA = Family(
    model_type="llama",
    anchor="embed_tokens.weight",
    rows=_DECODER_ROWS,
    layers=(*_ATTENTION, *_MLP),
    extra=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq"),
    entries={
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads",
        "kv_channels": "head_dim",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
    },
    defaults={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    only={
        "hidden_act": (None, "silu"),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "sliding_window": (None,),
        "partial_rotary_factor": (None, 1.0),
    },
    constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    rope_types=("linear", "llama3", "yarn"),
)
_PLAIN = {"hidden_act": (None, "silu"), "partial_rotary_factor": (None, 1.0)}
# A window that only some of the layers have cannot be expressed.
_NO_WINDOW = {**_PLAIN, "use_sliding_window": (None, False), "layer_types": (None, "full_attention")}

DECODERS: dict[str, Family] = {
    # Llama 2 and 3, Vicuna, and all that is published under Llama's name.
    "llama": LLAMA,
    "mistral": replace(
        LLAMA,
        model_type="mistral",
        entries={**LLAMA.entries, "sliding_window": "sliding_window"},
        defaults={
            **LLAMA.defaults,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        only=_PLAIN,
        constants={"hidden_act": "silu"},
    ),
    # Qwen2 and Qwen2.5.
    "qwen2": replace(
        LLAMA,
        model_type="qwen2",
        fixed={"qkv_bias": True},
        defaults={
            **LLAMA.defaults,
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
        },
        only=_NO_WINDOW,
        constants={"hidden_act": "silu", "use_sliding_window": False},
    ),
    "qwen3": replace(
        LLAMA,
        model_type="qwen3",
        fixed={"qk_norm": True},
        defaults={
            **LLAMA.defaults,
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
        },
        only={**_NO_WINDOW, "attention_bias": (None, False)},
        constants={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    ),
    # Phi-3 and Phi-4-mini: the same layer with its projections stored as one.
    "phi3": replace(
        LLAMA,
        model_type="phi3",
        layers=(
            *(line for line in _ATTENTION if line.fusion != "qkv"),
            row(
                f"{_OURS}.self_attention.linear_qkv.weight",
                (f"{_THEIRS}.self_attn.qkv_proj.weight", "query+key+key hidden"),
                fusion="qkv",
            ),
            *(line for line in _MLP if line.fusion != "stack"),
            row(f"{_OURS}.mlp.linear_fc1.weight", (f"{_THEIRS}.mlp.gate_up_proj.weight", "ffn+ffn hidden")),
        ),
        entries={**LLAMA.entries, "sliding_window": "sliding_window", "rotary_percent": "partial_rotary_factor"},
        defaults={
            **LLAMA.defaults,
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 4096,
        },
        only={"hidden_act": (None, "silu")},
        constants={"hidden_act": "silu"},
        rope_types=("longrope",),
    ),
}


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A router and its experts in place of the MLP."""
    each = f"{_THEIRS}.{block}.experts.{{e}}"
    return (
        row(f"{_OURS}.mlp.linear_fc1.layer_norm_weight", (f"{_THEIRS}.post_attention_layernorm.weight", "hidden")),
        row(f"{_OURS}.mlp.router.weight", (f"{_THEIRS}.{block}.gate.weight", "experts hidden")),
        row(
            f"{_OURS}.mlp.experts.experts.linear_fc1.weight",
            (f"{each}.{gate}.weight", "ffn hidden"),
            (f"{each}.{up}.weight", "ffn hidden"),
            fusion="experts",
        ),
        row(f"{_OURS}.mlp.experts.experts.linear_fc2.weight", (f"{each}.{down}.weight", "hidden ffn"), fusion="experts"),
    )


DECODERS["mixtral"] = replace(
    DECODERS["mistral"],
    model_type="mixtral",
    layers=(*_ATTENTION, *_experts("block_sparse_moe", "w1", "w3", "w2")),
    fixed={"normalize_expert_weights": True},
    entries={
        **DECODERS["mistral"].entries,
        "num_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
    },
    defaults={
        **DECODERS["mistral"].defaults,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
    },
    only={**_PLAIN, "router_jitter_noise": (None, 0.0)},
)
DECODERS["qwen3_moe"] = replace(
    DECODERS["qwen3"],
    model_type="qwen3_moe",
    layers=(*_ATTENTION, *_experts("mlp", "gate_proj", "up_proj", "down_proj")),
    entries={
        **DECODERS["qwen3"].entries,
        "ffn_hidden_size": "moe_intermediate_size",
        "num_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "normalize_expert_weights": "norm_topk_prob",
    },
    aliases={"num_experts": "num_local_experts"},
    defaults={
        **DECODERS["qwen3"].defaults,
        "hidden_size": 2048,
        "intermediate_size": 6144,  # of layers without experts
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "head_dim": None,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    # Every layer has experts.
    only={**DECODERS["qwen3"].only, "decoder_sparse_step": (None, 1), "mlp_only_layers": (None,)},
)


# ---- what joins and follows them ----

HEAD = Names(anchor="lm_head.weight", rows=(row("output_layer.weight", ("lm_head.weight", "vocab hidden"), fusion="vocab"),))

# What is learned between rows of tiles, or frames, and is of no module.
LEARNED_TOKENS = Names(anchor="image_newline", rows=(row("newline", ("image_newline", "hidden")),))

# "linear" is absent: LlavaForConditionalGeneration always has two layers with an activation between.
PROJECTORS = {
    "mlp2x_gelu": Names(
        anchor="linear_1.weight",
        rows=(
            *_both("encoder.linear_fc1", "linear_1", "hidden", "vision"),
            *_both("encoder.linear_fc2", "linear_2", "hidden", "hidden"),
        ),
    )
}


def contradictions(family: Family, name: str, values: Mapping[str, Any], optional: Mapping[str, Any]) -> list[str]:
    """What of ``values`` the family cannot express, each with the fix.

    Args:
        family: the published family.
        name: its name in the settings.
        values: the module's settings.
        optional: settings that not every family has -> the value that leaves them out.
    """
    problems = []
    for setting, without in optional.items():
        value = values[setting]
        if setting in family.entries:
            continue
        wanted = family.fixed.get(setting, without)
        if value != wanted:
            problems.append(
                f"{setting}={_shown(value)}: family {name} has {_shown(wanted)}; leave it out, or choose a family that has it"
            )
    return problems


def _shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
