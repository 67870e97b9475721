"""What a picture costs under each way to make fewer embeddings of it, from the settings alone. No torch.

    python tools/estimate.py tokens --config finetune_llava_7b --image 1344x1008

What a decoder layer keeps of a token for its backward pass, in numbers of the type of the activations, with h width, q and g
query and key/value heads of width d, f width of the MLP (attention keeps no scores, the gate's product is computed again):

    norms and their inputs 4h,  queries, keys and values (q + 2g) d,  attention's output q d,  MLP 3f
    with train.recompute=full the layer's input alone: h

On a CPU, where torch has no RMS norm of its own, the norms keep 4h more.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import ValidationError

from llava_mcore.settings.schema import LanguageSettings, ModelSettings, Pooling, Settings, TokenMerging, TowerMerging
from llava_mcore.training.observe.flops import FlopsCounter

NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
MIB = 2**20


class Chosen(NamedTuple):
    """A way to make fewer embeddings of a picture, or none."""

    token_merging: TokenMerging | None = None
    pooling: Pooling | None = None
    tower: TowerMerging | None = None

    def overrides(self) -> str:
        """The settings that choose it, on top of a model without any."""
        names = ("model.projector.token_merging", "model.projector.pooling", "model.vision.token_merging")
        return " ".join(f"{name}={_changed(value)}" for name, value in zip(names, self, strict=True) if value is not None)


def _changed(section: TokenMerging | Pooling | TowerMerging) -> str:
    """What is not as by default, as it is written in an override."""
    fields = [(field.name, getattr(section, field.name)) for field in dataclasses.fields(section)]
    defaults = type(section).__pydantic_fields__  # type: ignore[union-attr]
    return "{" + ", ".join(f"{name}: {value}" for name, value in fields if value != defaults[name].default) + "}"


def _stride(model: ModelSettings) -> int:
    """The least stride that divides the picture: 2 for 24 patches a side, 3 for 27."""
    side = model.vision.side
    return next((stride for stride in range(2, side + 1) if side % stride == 0), 2)


def _tower_half(model: ModelSettings) -> int:
    """Tokens a layer that leave about half the patches at the end of the tower."""
    return max(1, model.vision.positions // 2 // model.vision.used_layers)


MODES: dict[str, Callable[[ModelSettings], Chosen]] = {
    "every patch": lambda model: Chosen(),
    "merge 25% of the patches": lambda model: Chosen(TokenMerging(ratio=0.25)),
    "merge 50% of the patches": lambda model: Chosen(TokenMerging(ratio=0.5)),
    "merge 75% of the patches": lambda model: Chosen(TokenMerging(ratio=0.75)),
    "merge 50% of each window": lambda model: Chosen(TokenMerging(ratio=0.5, scope="window", window=_stride(model))),
    "average of squares": lambda model: Chosen(pooling=Pooling(kind="average", stride=_stride(model))),
    "largest of squares": lambda model: Chosen(pooling=Pooling(kind="max", stride=_stride(model))),
    "pixel shuffle of squares": lambda model: Chosen(pooling=Pooling(kind="pixel_shuffle", stride=_stride(model))),
    "merge half inside the tower": lambda model: Chosen(tower=TowerMerging(tokens=_tower_half(model))),
}


@dataclass(frozen=True)
class Cost:
    """Of one sample with one picture.

    Attributes:
        name, overrides: of the mode; "as set" and none for the settings as they are.
        tokens: embeddings of the picture.
        tower, decoder: FLOPs of a training step, forward and backward, with the projector in ``tower``.
        activations: bytes that the decoder keeps for the backward pass.
    """

    name: str
    overrides: str
    tokens: int
    tower: int
    decoder: int
    activations: int


def costs(settings: Settings, text: int) -> tuple[list[Cost], list[str]]:
    """The settings as they are and every mode in their place, and why the modes that are left out do not fit.

    Args:
        settings: model, what is frozen, type and recomputation.
        text: tokens of the sample besides the picture.
    """
    found, refused = [_cost("as set", "", settings, text)], []
    for name, of in MODES.items():
        try:
            chosen = of(settings.model)
            model = _with(settings.model, chosen)
        except ValidationError as error:
            reasons = (problem["msg"].removeprefix("Value error, ") for problem in error.errors())
            refused.append(f"{name}: {'; '.join(reasons)}")
            continue
        other = copy.copy(settings)  # the stream need not have room for every mode
        other.model = model
        found.append(_cost(name, chosen.overrides(), other, text))
    return found, refused


def _with(model: ModelSettings, chosen: Chosen) -> ModelSettings:
    projector = dataclasses.replace(model.projector, token_merging=chosen.token_merging, pooling=chosen.pooling)
    return dataclasses.replace(model, vision=dataclasses.replace(model.vision, token_merging=chosen.tower), projector=projector)


def _cost(name: str, overrides: str, settings: Settings, text: int) -> Cost:
    tokens = settings.model.embeddings_per_image
    flops = FlopsCounter(settings).breakdown([tokens + text], 1)
    kept = (tokens + text) * layer_activations(settings.model.language, settings.train.recompute == "full")
    activations = kept * settings.model.language.num_layers * NUMBER_BYTES[settings.train.dtype]
    return Cost(name, overrides, tokens, flops["vision_tower"] + flops["projector"], flops["language_model"], activations)


def layer_activations(language: LanguageSettings, recomputed: bool = False) -> int:
    """Numbers that a decoder layer keeps of one token for its backward pass."""
    if recomputed:
        return language.hidden_size
    queries, groups, width = language.num_attention_heads, language.query_groups, language.head_dim
    experts = 1 if language.num_experts is None else language.experts_per_token
    return 4 * language.hidden_size + (2 * queries + 2 * groups) * width + 3 * experts * language.ffn_hidden_size


def table(found: list[Cost]) -> str:
    """The costs side by side; the last column is against every patch."""
    every = next(cost for cost in found if cost.name == "every patch")
    rows = [["picture", "tokens", "encoder TFLOP", "decoder TFLOP", "decoder MiB", "decoder", "settings"]]
    for cost in found:
        numbers = [f"{cost.tower / 1e12:.4g}", f"{cost.decoder / 1e12:.4g}", f"{cost.activations / MIB:,.1f}"]
        rows.append([cost.name, str(cost.tokens), *numbers, f"{cost.decoder / every.decoder:.0%}", cost.overrides])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells, row[-1]]).rstrip())
    return "\n".join(lines)
