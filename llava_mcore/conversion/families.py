"""Names of tensors as data: what each family calls a weight, what this project calls it, and how the two relate.

A new dense decoder or tower is one entry in ``DECODERS`` or ``TOWERS``, plus its line in ``hf_config.py``. No torch.

Shapes are words looked up in the dimensions of a model, so that a wrong tensor is named before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from llava_mcore.geometry import num_patches
from llava_mcore.settings.schema import ModelSettings


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message names the file or tensor and the fix."""


class Part(NamedTuple):
    """A tensor of the published checkpoint: its name below the module's prefix, and its shape in words."""

    name: str
    shape: str


@dataclass(frozen=True)
class Row:
    """One tensor of ours and the published tensors it is made of.

    ``fusion`` is a name in ``fusions.FUSIONS``. ``{i}`` stands for the layer's number.
    """

    ours: str
    parts: tuple[Part, ...]
    fusion: str = "same"


def row(ours: str, *parts: tuple[str, str], fusion: str = "same") -> Row:
    """A :class:`Row` from plain pairs."""
    return Row(ours, tuple(Part(*part) for part in parts), fusion)


@dataclass(frozen=True)
class Family:
    """One module's rows. ``anchor`` is a published name that every checkpoint of the family holds: it finds the prefix.

    ``unused`` are published tensors that this project never builds, ``buffers`` patterns of tensors that old versions
    saved although they can be computed.
    """

    anchor: str
    rows: tuple[Row, ...]
    layers: tuple[Row, ...] = ()
    unused: tuple[Part, ...] = ()
    buffers: tuple[str, ...] = ()


CLIP_TOWER = Family(
    anchor="embeddings.class_embedding",
    rows=(
        row("patch_embedding.weight", ("embeddings.patch_embedding.weight", "hidden channels patch patch"), fusion="flatten"),
        row("class_embedding", ("embeddings.class_embedding", "hidden")),
        row("position_embedding", ("embeddings.position_embedding.weight", "positions hidden")),
        row("pre_layernorm.weight", ("pre_layrnorm.weight", "hidden")),
        row("pre_layernorm.bias", ("pre_layrnorm.bias", "hidden")),
    ),
    layers=(
        row(
            "encoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight", ("encoder.layers.{i}.layer_norm1.weight", "hidden")
        ),
        row("encoder.layers.{i}.self_attention.linear_qkv.layer_norm_bias", ("encoder.layers.{i}.layer_norm1.bias", "hidden")),
        row(
            "encoder.layers.{i}.self_attention.linear_qkv.weight",
            ("encoder.layers.{i}.self_attn.q_proj.weight", "hidden hidden"),
            ("encoder.layers.{i}.self_attn.k_proj.weight", "hidden hidden"),
            ("encoder.layers.{i}.self_attn.v_proj.weight", "hidden hidden"),
            fusion="qkv",
        ),
        row(
            "encoder.layers.{i}.self_attention.linear_qkv.bias",
            ("encoder.layers.{i}.self_attn.q_proj.bias", "hidden"),
            ("encoder.layers.{i}.self_attn.k_proj.bias", "hidden"),
            ("encoder.layers.{i}.self_attn.v_proj.bias", "hidden"),
            fusion="qkv",
        ),
        row(
            "encoder.layers.{i}.self_attention.linear_proj.weight",
            ("encoder.layers.{i}.self_attn.out_proj.weight", "hidden hidden"),
        ),
        row("encoder.layers.{i}.self_attention.linear_proj.bias", ("encoder.layers.{i}.self_attn.out_proj.bias", "hidden")),
        row("encoder.layers.{i}.mlp.linear_fc1.layer_norm_weight", ("encoder.layers.{i}.layer_norm2.weight", "hidden")),
        row("encoder.layers.{i}.mlp.linear_fc1.layer_norm_bias", ("encoder.layers.{i}.layer_norm2.bias", "hidden")),
        row("encoder.layers.{i}.mlp.linear_fc1.weight", ("encoder.layers.{i}.mlp.fc1.weight", "ffn hidden")),
        row("encoder.layers.{i}.mlp.linear_fc1.bias", ("encoder.layers.{i}.mlp.fc1.bias", "ffn")),
        row("encoder.layers.{i}.mlp.linear_fc2.weight", ("encoder.layers.{i}.mlp.fc2.weight", "hidden ffn")),
        row("encoder.layers.{i}.mlp.linear_fc2.bias", ("encoder.layers.{i}.mlp.fc2.bias", "hidden")),
    ),
    unused=(Part("post_layernorm.weight", "hidden"), Part("post_layernorm.bias", "hidden")),
    buffers=(r"embeddings\.position_ids",),
)

LLAMA_DECODER = Family(
    anchor="embed_tokens.weight",
    rows=(
        row("embedding.word_embeddings.weight", ("embed_tokens.weight", "vocab hidden"), fusion="vocab"),
        row("decoder.final_layernorm.weight", ("norm.weight", "hidden")),
    ),
    layers=(
        row("decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight", ("layers.{i}.input_layernorm.weight", "hidden")),
        row(
            "decoder.layers.{i}.self_attention.linear_qkv.weight",
            ("layers.{i}.self_attn.q_proj.weight", "query hidden"),
            ("layers.{i}.self_attn.k_proj.weight", "key hidden"),
            ("layers.{i}.self_attn.v_proj.weight", "key hidden"),
            fusion="qkv",
        ),
        row("decoder.layers.{i}.self_attention.linear_proj.weight", ("layers.{i}.self_attn.o_proj.weight", "hidden query")),
        row("decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight", ("layers.{i}.post_attention_layernorm.weight", "hidden")),
        row(
            "decoder.layers.{i}.mlp.linear_fc1.weight",
            ("layers.{i}.mlp.gate_proj.weight", "ffn hidden"),
            ("layers.{i}.mlp.up_proj.weight", "ffn hidden"),
            fusion="stack",
        ),
        row("decoder.layers.{i}.mlp.linear_fc2.weight", ("layers.{i}.mlp.down_proj.weight", "hidden ffn")),
    ),
    buffers=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq"),
)

HEAD = Family(anchor="lm_head.weight", rows=(row("output_layer.weight", ("lm_head.weight", "vocab hidden"), fusion="vocab"),))

MLP2X_PROJECTOR = Family(
    anchor="linear_1.weight",
    rows=(
        row("encoder.linear_fc1.weight", ("linear_1.weight", "hidden vision")),
        row("encoder.linear_fc1.bias", ("linear_1.bias", "hidden")),
        row("encoder.linear_fc2.weight", ("linear_2.weight", "hidden hidden")),
        row("encoder.linear_fc2.bias", ("linear_2.bias", "hidden")),
    ),
)

TOWERS = {"clip": CLIP_TOWER}
DECODERS = {"llama": LLAMA_DECODER}
# "linear" is absent: LlavaForConditionalGeneration always has two layers with an activation between.
PROJECTORS = {"mlp2x_gelu": MLP2X_PROJECTOR}

# The prefix of each module's published names; what save_pretrained of transformers 5 writes. ``layouts.py`` knows the others.
Naming = Mapping[str, str]
DEFAULT_NAMING: Naming = {
    "vision_tower": "vision_tower.",
    "projector": "multi_modal_projector.",
    "language_model": "language_model.model.",
    "head": "language_model.",
}
# The head lies apart from the decoder in published names, and inside it in ours.
OUR_MODULE = {
    "vision_tower": "vision_tower",
    "projector": "projector",
    "language_model": "language_model",
    "head": "language_model",
}
OUR_PREFIXES = tuple(f"{module}." for module in dict.fromkeys(OUR_MODULE.values()))


@dataclass(frozen=True)
class Tensor:
    """One tensor of ours with its published parts, names and shapes spelt out for one model."""

    ours: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    part_shapes: tuple[tuple[int, ...], ...]
    fusion: str
    module: str
    groups: int


@dataclass(frozen=True)
class Plan:
    """All tensors of a model. ``unused`` maps published names that are not built to their shapes."""

    tensors: tuple[Tensor, ...]
    unused: dict[str, tuple[int, ...]]
    buffers: re.Pattern[str]

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Published names of what is built, with shapes."""
        return {name: shape for tensor in self.tensors for name, shape in zip(tensor.names, tensor.part_shapes, strict=True)}


def families(model: ModelSettings) -> dict[str, Family]:
    """The family of each module of a model.

    Raises:
        ConversionError: for a projector that transformers' LLaVA has no class for.
    """
    if model.projector.type not in PROJECTORS:
        raise ConversionError(
            f"model.projector.type={model.projector.type}: LlavaForConditionalGeneration can only express "
            f"{', '.join(PROJECTORS)} projectors, so this model has no Hugging Face form"
        )
    found = {
        "vision_tower": TOWERS[model.vision.family],
        "projector": PROJECTORS[model.projector.type],
        "language_model": DECODERS[model.language.family],
    }
    if not model.language.tie_word_embeddings:
        found["head"] = HEAD
    return found


def dimensions(model: ModelSettings) -> dict[str, dict[str, int]]:
    """What the words of the shapes mean, for each module."""
    vision, language = model.vision, model.language
    decoder = {
        "hidden": language.hidden_size,
        "ffn": language.ffn_hidden_size,
        "query": language.num_attention_heads * language.head_dim,
        "key": language.query_groups * language.head_dim,
        "vocab": language.vocab_size,
    }
    tower = {
        "hidden": vision.hidden_size,
        "ffn": vision.ffn_hidden_size,
        "channels": 3,
        "patch": vision.patch_size,
        "positions": num_patches(vision.image_size, vision.patch_size) + 1,
    }
    projector = {"hidden": language.hidden_size, "vision": vision.hidden_size}
    return {"vision_tower": tower, "projector": projector, "language_model": decoder, "head": decoder}


def plan(model: ModelSettings, naming: Naming = DEFAULT_NAMING) -> Plan:
    """Every tensor of a model, ours and the published ones it is made of."""
    sizes = dimensions(model)
    used = {"vision_tower": model.vision.used_layers, "language_model": model.language.num_layers}
    groups = {"vision_tower": model.vision.num_attention_heads, "language_model": model.language.query_groups}
    tensors: list[Tensor] = []
    unused: dict[str, tuple[int, ...]] = {}
    buffers: list[str] = []
    for module, family in families(model).items():
        prefix = naming[module]

        def spelt(part: Part, i: int | None, prefix: str = prefix, module: str = module) -> tuple[str, tuple[int, ...]]:
            return prefix + part.name.format(i=i), tuple(sizes[module][word] for word in part.shape.split())

        for i, line in _lines(family, used.get(module, 0)):
            names, shapes = zip(*(spelt(part, i) for part in line.parts), strict=True)
            ours = f"{OUR_MODULE[module]}.{line.ours.format(i=i)}"
            shape = _our_shape(line.fusion, shapes, model.language.padded_vocab_size)
            tensors.append(Tensor(ours, shape, names, shapes, line.fusion, OUR_MODULE[module], groups.get(module, 1)))
        unused.update(spelt(part, None) for part in family.unused)
        if module == "vision_tower":
            beyond = range(model.vision.used_layers, model.vision.num_layers)
            unused.update(spelt(part, i) for i in beyond for line in family.layers for part in line.parts)
        buffers += [re.escape(prefix) + pattern for pattern in family.buffers]
    return Plan(tuple(tensors), unused, re.compile("|".join(buffers)))


def _lines(family: Family, layers: int) -> Iterator[tuple[int | None, Row]]:
    yield from ((None, line) for line in family.rows)
    yield from ((i, line) for i in range(layers) for line in family.layers)


def _our_shape(fusion: str, shapes: tuple[tuple[int, ...], ...], padded_vocab: int) -> tuple[int, ...]:
    first = shapes[0]
    if fusion == "flatten":
        width = 1
        for size in first[1:]:
            width *= size
        return (first[0], width)
    if fusion == "vocab":
        return (padded_vocab, *first[1:])
    return (sum(shape[0] for shape in shapes), *first[1:])
