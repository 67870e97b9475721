"""Every tensor of one model: its name in its family (``settings.families``), its name here, and its shape. No torch.

Shapes are looked up in the dimensions of the model, so that a wrong tensor is named before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from llava_mcore.settings.families import DECODERS, HEAD, LEARNED_TOKENS, PROJECTORS, TOWERS, Names, Row
from llava_mcore.settings.schema import ModelSettings


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message names the file or tensor and the fix."""


# The prefix of each module's published names; what save_pretrained of transformers 5 writes. ``layouts.py`` knows the others.
Naming = Mapping[str, str]
DEFAULT_NAMING: Naming = {
    "vision_tower": "vision_tower.",
    "projector": "multi_modal_projector.",
    "language_model": "language_model.model.",
    "head": "language_model.",
    "learned_tokens": "",
}
# The head lies apart from the decoder in published names, and inside it in ours.
OUR_MODULE = {
    "vision_tower": "vision_tower",
    "projector": "projector",
    "language_model": "language_model",
    "head": "language_model",
    "learned_tokens": "learned_tokens",
}
OUR_PREFIXES = tuple(f"{module}." for module in dict.fromkeys(OUR_MODULE.values()))


@dataclass(frozen=True)
class Tensor:
    """One tensor of ours with its published parts, names and shapes spelt out for one model.

    Attributes:
        pieces: rows of what the parts are made of, one after another; more than there are parts where these are fused.
        groups: key/value heads.
    """

    ours: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    part_shapes: tuple[tuple[int, ...], ...]
    fusion: str
    module: str
    groups: int
    pieces: tuple[int, ...]


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


def families(model: ModelSettings) -> dict[str, Names]:
    """The family of each module of a model.

    Raises:
        ConversionError: for what no published model has.
    """
    for setting, learned in (("slow_every", model.geometry.has_faster), ("time_period", model.geometry.has_time)):
        if learned:
            raise ConversionError(f"model.video.{setting}: no published model has what it learns, so it has no published form")
    if model.projector.type not in PROJECTORS:
        raise ConversionError(
            f"model.projector.type={model.projector.type}: LlavaForConditionalGeneration can only express "
            f"{', '.join(PROJECTORS)} projectors, so this model has no Hugging Face form"
        )
    found: dict[str, Names] = {
        "vision_tower": TOWERS[model.vision.family],
        "projector": PROJECTORS[model.projector.type],
        "language_model": DECODERS[model.language.family],
    }
    if not model.language.tie_word_embeddings:
        found["head"] = HEAD
    if model.geometry.has_newline:
        found["learned_tokens"] = LEARNED_TOKENS
    return found


def dimensions(model: ModelSettings) -> dict[str, dict[str, int]]:
    """What the words of the shapes mean, for each module."""
    vision, language = model.vision, model.language
    decoder = {
        "hidden": language.hidden_size,
        "ffn": language.ffn_hidden_size,
        "query": language.num_attention_heads * language.head_dim,
        "key": language.query_groups * language.head_dim,
        "head": language.head_dim,
        "vocab": language.vocab_size,
        "experts": language.num_experts or 0,
    }
    tower = {
        "hidden": vision.hidden_size,
        "ffn": vision.ffn_hidden_size,
        "channels": 3,
        "patch": vision.patch_size,
        "positions": vision.positions,
    }
    projector = {"hidden": language.hidden_size, "vision": model.feature_size}
    return {"vision_tower": tower, "projector": projector, "language_model": decoder, "head": decoder, "learned_tokens": decoder}


def plan(model: ModelSettings, naming: Naming = DEFAULT_NAMING) -> Plan:
    """Every tensor of a model, ours and the published ones it is made of."""
    sizes = dimensions(model)
    used = {"vision_tower": model.vision.used_layers, "language_model": model.language.num_layers}
    groups = {"vision_tower": model.vision.num_attention_heads, "language_model": model.language.query_groups}
    settings: dict[str, Any] = {"vision_tower": model.vision, "language_model": model.language}
    tensors: list[Tensor] = []
    unused: dict[str, tuple[int, ...]] = {}
    extra: list[str] = []
    for module, family in families(model).items():
        prefix, words = naming[module], sizes[module]
        for i, line in _lines(family, used.get(module, 0)):
            if line.when is not None and not getattr(settings[module], line.when):
                continue
            # The parts of one expert after those of another.
            numbers = range(words["experts"]) if line.fusion == "experts" else range(1)
            parts = [(prefix + part.name.format(i=i, e=e), part.shape) for e in numbers for part in line.parts]
            shapes = tuple(_shape(shape, words) for _, shape in parts)
            tensors.append(
                Tensor(
                    ours=f"{OUR_MODULE[module]}.{line.ours.format(i=i)}",
                    shape=_our_shape(line.fusion, shapes, len(numbers), model.language.padded_vocab_size),
                    names=tuple(name for name, _ in parts),
                    part_shapes=shapes,
                    fusion=line.fusion,
                    module=OUR_MODULE[module],
                    groups=groups.get(module, 1),
                    pieces=tuple(words[word] for _, shape in parts for word in shape.split()[0].split("+")),
                )
            )
        unused.update({prefix + part.name: _shape(part.shape, words) for part in family.unused})
        if module == "vision_tower":
            beyond = range(model.vision.used_layers, model.vision.num_layers)
            left_out = ((i, part) for i in beyond for line in family.layers for part in line.parts)
            unused.update({prefix + part.name.format(i=i): _shape(part.shape, words) for i, part in left_out})
        extra += [re.escape(prefix) + pattern for pattern in family.extra]
    return Plan(tuple(tensors), unused, re.compile("|".join(extra)))


def _lines(family: Names, layers: int) -> Iterator[tuple[int | None, Row]]:
    yield from ((None, line) for line in family.rows)
    yield from ((i, line) for i in range(layers) for line in family.layers)


def _shape(text: str, words: Mapping[str, int]) -> tuple[int, ...]:
    """``a+b c`` in numbers."""
    return tuple(sum(words[word] for word in term.split("+")) for term in text.split())


def _our_shape(fusion: str, shapes: tuple[tuple[int, ...], ...], experts: int, padded_vocab: int) -> tuple[int, ...]:
    first = shapes[0]
    if fusion == "experts":
        return (experts, sum(shape[0] for shape in shapes) // experts, *first[1:])
    if fusion == "flatten":
        return (first[0], prod(first[1:]))
    if fusion == "vocab":
        return (padded_vocab, *first[1:])
    return (sum(shape[0] for shape in shapes), *first[1:])
