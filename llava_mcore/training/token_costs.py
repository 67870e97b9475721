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
from typing import Literal

from pydantic import ValidationError

from llava_mcore.settings.schema import LanguageSettings, ModelSettings, Pooling, Settings, TokenMerging, TowerMerging
from llava_mcore.training.observe.flops import FlopsCounter

NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
MIB = 2**20


@dataclass(frozen=True)
class Mode:
    """A way to make fewer embeddings of a picture.

    Attributes:
        name: for the table.
        overrides: the settings that choose it, on top of a model without any.
        of: the settings of projector and tower, given a model.
    """

    name: str
    overrides: str
    of: Callable[[ModelSettings], Chosen]


@dataclass(frozen=True)
class Chosen:
    """One of them, or none."""

    merging: TokenMerging | None = None
    pooling: Pooling | None = None
    tower: TowerMerging | None = None


def _merging(ratio: float) -> Mode:
    return Mode(
        f"merge {ratio:.0%} of the patches",
        f"model.projector.token_merging={{ratio: {ratio}}}",
        lambda model: Chosen(merging=TokenMerging(ratio=ratio)),
    )


def _pooling(kind: Literal["average", "max", "pixel_shuffle"]) -> Mode:
    return Mode(
        f"{kind.replace('_', ' ')} of squares",
        f"model.projector.pooling={{kind: {kind}, stride: {{stride}}}}",
        lambda model: Chosen(pooling=Pooling(kind=kind, stride=_stride(model))),
    )


def _stride(model: ModelSettings) -> int:
    """The least stride that divides the picture: 2 for 24 patches a side, 3 for 27."""
    side = model.vision.side
    return next((stride for stride in range(2, side + 1) if side % stride == 0), 2)


def _tower_half(model: ModelSettings) -> int:
    """Tokens a layer that leave about half the patches at the end of the tower."""
    return max(1, model.vision.positions // 2 // model.vision.used_layers)


MODES = (
    Mode("every patch", "", lambda model: Chosen()),
    *(_merging(ratio) for ratio in (0.25, 0.5, 0.75)),
    *(_pooling(kind) for kind in ("average", "max", "pixel_shuffle")),
    Mode(
        "merge half inside the tower",
        "model.vision.token_merging={{tokens: {tokens}}}",
        lambda model: Chosen(tower=TowerMerging(tokens=_tower_half(model))),
    ),
)


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
    for mode in MODES:
        try:
            model = _with_mode(settings.model, mode)
        except ValidationError as error:
            refused.append(
                f"{mode.name}: {'; '.join(problem['msg'].removeprefix('Value error, ') for problem in error.errors())}"
            )
            continue
        other = copy.copy(settings)  # the stream need not have room for every mode
        other.model = model
        filled = mode.overrides.replace("{stride}", str(_stride(model))).replace("{tokens}", str(_tower_half(model)))
        found.append(_cost(mode.name, filled.replace("{{", "{").replace("}}", "}"), other, text))
    return found, refused


def _with_mode(model: ModelSettings, mode: Mode) -> ModelSettings:
    chosen = mode.of(model)
    projector = dataclasses.replace(model.projector, token_merging=chosen.merging, pooling=chosen.pooling)
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
