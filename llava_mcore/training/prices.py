"""What a picture or a clip costs a training step, for every way of making embeddings of it, side by side. No torch is imported.

What a decoder layer keeps of a token for its backward pass, in numbers of the type of the activations, with h width, q and g
query and key/value heads of width d, f width of the MLP (attention keeps no scores, the gate's product is computed again):

    norms and their inputs 4h,  queries, keys and values (q + 2g) d,  attention's output q d,  MLP 3f
    with train.recompute=full the layer's input alone: h

On a CPU, where torch has no RMS norm of its own, the norms keep 4h more.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from llava_mcore.geometry import Shape
from llava_mcore.settings.schema import LanguageSettings, ModelSettings, Pooling, Settings, TokenMerging, TowerMerging
from llava_mcore.settings.visual import AnyresSettings, VideoSettings
from llava_mcore.training.observe.flops import FlopsCounter

HEIGHTS = {"480p": (854, 480), "720p": (1280, 720), "1080p": (1920, 1080), "2160p": (3840, 2160)}
RATE = 30.0  # frames a second of a clip whose rate is not said
NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Way:
    """How embeddings are made: the sections of the model that decide it."""

    anyres: AnyresSettings | None = None
    video: VideoSettings = dataclasses.field(default_factory=VideoSettings)
    token_merging: TokenMerging | None = None
    pooling: Pooling | None = None
    tower: TowerMerging | None = None

    @classmethod
    def of(cls, model: ModelSettings) -> Way:
        """The one of a model."""
        projector = model.projector
        return cls(model.anyres, model.video, projector.token_merging, projector.pooling, model.vision.token_merging)

    def put_into(self, model: ModelSettings) -> ModelSettings:
        """The model with this one in place of its own.

        Raises:
            ValidationError: it does not fit the model.
        """
        projector = dataclasses.replace(model.projector, token_merging=self.token_merging, pooling=self.pooling)
        vision = dataclasses.replace(model.vision, token_merging=self.tower)
        return dataclasses.replace(model, vision=vision, projector=projector, anyres=self.anyres, video=self.video)

    def overrides(self, other: Way) -> str:
        """The settings that choose it where ``other`` is set."""
        parts = [
            *_fields("model.anyres", "merge", self.anyres, other.anyres),
            *_fields("model.video", "pool", self.video, other.video),
        ]
        names = {"token_merging": "projector.token_merging", "pooling": "projector.pooling", "tower": "vision.token_merging"}
        for name, path in names.items():
            section = getattr(self, name)
            if section != getattr(other, name):
                parts.append(f"model.{path}={'null' if section is None else _whole(section)}")
        return " ".join(parts)


def _fields(path: str, first: str, section: Any, other: Any) -> list[str]:
    """Overrides of single fields, the ``first`` always among them."""
    if section is None or section == other:
        return [] if section == other else [f"{path}=null"]
    other = type(section)() if other is None else other
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return [f"{path}.{name}={_text(value)}" for name, value in values.items() if name == first or value != getattr(other, name)]


def _whole(section: TokenMerging | Pooling | TowerMerging) -> str:
    """What is not as by default, as it is written in an override."""
    fields = [(field.name, getattr(section, field.name)) for field in dataclasses.fields(section)]
    defaults = type(section).__pydantic_fields__  # type: ignore[union-attr]
    return "{" + ", ".join(f"{name}: {_text(value)}" for name, value in fields if value != defaults[name].default) + "}"


def _text(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


@dataclasses.dataclass(frozen=True)
class Price:
    """One way of making embeddings, and what a sample with one such picture or clip costs.

    Attributes:
        name: the settings that choose it; "as set" for those there are.
        tiles: pictures through the tower.
        tokens: embeddings in the decoder's stream.
        encoder: FLOPs of tower and projector in a training step, forward and backward.
        decoder: FLOPs of the decoder in it.
        memory: bytes that the decoder keeps for the backward pass.
    """

    name: str
    tiles: int
    tokens: int
    encoder: int
    decoder: int
    memory: int


def of_picture(settings: Settings, width: int, height: int, text: int) -> tuple[list[Price], list[str]]:
    """The prices of a picture of so many pixels, the first the one of the settings, and why other ways do not fit.

    Args:
        settings: model, what is frozen, type and recomputation.
        width, height: of the picture.
        text: tokens of the sample besides it.
    """
    ways = [*_anyres(settings.model), *_reductions(settings.model)]
    return _prices(settings, ways, lambda model: model.geometry.picture(width, height, several=False), text)


def of_clip(settings: Settings, frames: int, text: int) -> tuple[list[Price], list[str]]:
    """The same of a clip of so many shown frames."""
    ways = [
        Way(settings.model.anyres, video)
        for video in (
            VideoSettings(),
            VideoSettings(pool="average"),
            VideoSettings(pool="average", newline="grid"),
            VideoSettings(pool="bilinear", newline="one_token"),
            VideoSettings(pool="average", newline="grid", slow_every=10),
            VideoSettings(pool="average", stride=4),
        )
    ]
    return _prices(settings, [*ways, *_reductions(settings.model)], lambda model: Shape(frames=frames), text)


def _anyres(model: ModelSettings) -> Iterator[Way]:
    """Pictures of several tiles; clips stay as they are set, but for merging."""
    anyres = model.anyres or AnyresSettings()
    unpad = dataclasses.replace(anyres, merge="unpad", base=True, max_tiles=None)
    yield Way(None, model.video)
    yield Way(unpad, model.video)
    yield Way(dataclasses.replace(unpad, base=False), model.video)
    for most in (2, 4, 9):
        yield Way(dataclasses.replace(unpad, max_tiles=most), model.video)
    for merge in ("flat", "spatial", "maxpool2x2"):
        yield Way(dataclasses.replace(unpad, merge=merge), model.video)
    yield Way(dataclasses.replace(unpad, merge="flat"), token_merging=TokenMerging(ratio=0.5))


def _reductions(model: ModelSettings) -> Iterator[Way]:
    """Every tile's patches merged or pooled."""
    side, vision = model.vision.side, model.vision
    # The least that divides the picture: 2 for 24 patches a side, 3 for 27.
    stride = next((stride for stride in range(2, side + 1) if side % stride == 0), 2)
    for ratio in (0.25, 0.5, 0.75):
        yield Way(token_merging=TokenMerging(ratio=ratio))
    yield Way(token_merging=TokenMerging(ratio=0.5, scope="window", window=stride))
    for kind in ("average", "max", "pixel_shuffle"):
        yield Way(pooling=Pooling(kind=kind, stride=stride))
    # About half the patches are left at the end of the tower.
    yield Way(tower=TowerMerging(tokens=max(1, vision.positions // 2 // vision.used_layers)))


def _prices(
    settings: Settings, ways: list[Way], shape_in: Callable[[ModelSettings], Shape], text: int
) -> tuple[list[Price], list[str]]:
    set_now = Way.of(settings.model)
    found, refused = [_price("as set", settings, shape_in(settings.model), text)], []
    for way in (way for way in ways if way != set_now):
        name = way.overrides(set_now)
        try:
            model = way.put_into(settings.model)
        except ValidationError as error:
            reasons = (problem["msg"].removeprefix("Value error, ") for problem in error.errors())
            refused.append(f"{name}: {'; '.join(reasons)}")
            continue
        other = copy.copy(settings)  # the stream need not have room for every way
        other.model = model
        found.append(_price(name, other, shape_in(model), text))
    return found, refused


def _price(name: str, settings: Settings, shape: Shape, text: int) -> Price:
    geometry, language = settings.model.geometry, settings.model.language
    tiles, tokens = geometry.tiles(shape), geometry.embeddings(shape)
    flops = FlopsCounter(settings).breakdown([tokens + text], tiles)
    kept = (tokens + text) * layer_activations(language, settings.train.recompute == "full")
    memory = kept * language.num_layers * NUMBER_BYTES[settings.train.dtype]
    return Price(name, tiles, tokens, flops["vision_tower"] + flops["projector"], flops["language_model"], memory)


def layer_activations(language: LanguageSettings, recomputed: bool = False) -> int:
    """Numbers that a decoder layer keeps of one token for its backward pass."""
    if recomputed:
        return language.hidden_size
    queries, groups, width = language.num_attention_heads, language.query_groups, language.head_dim
    experts = 1 if language.num_experts is None else language.experts_per_token
    return 4 * language.hidden_size + (2 * queries + 2 * groups) * width + 3 * experts * language.ffn_hidden_size


def parse_picture(text: str) -> tuple[int, int]:
    """``1344x1008`` as width and height.

    Raises:
        ValueError: it is no size.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ValueError(f"{text!r} is no size of a picture; write WIDTHxHEIGHT in pixels, as 1344x1008")
    return int(found[1]), int(found[2])


def parse_clip(text: str) -> tuple[float, float]:
    """``720p:30s``, ``1280x720:30s`` or ``720p:30s@25`` as seconds and frames a second. Frames are one tile, whatever their size.

    Raises:
        ValueError: it is no clip.
    """
    found = re.fullmatch(r"([^:]+):(\d+(?:\.\d+)?)s(?:@(\d+(?:\.\d+)?))?", text)
    if found is None or float(found[2]) <= 0 or (found[1] not in HEIGHTS and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", found[1])):
        raise ValueError(f"{text!r} is no clip; write SIZE:SECONDSs, as 720p:30s or 1280x720:12.5s@25 (25 frames a second)")
    return float(found[2]), float(found[3] or RATE)


def table(prices: list[Price], text: int) -> list[str]:
    """Lines of a table; ``text`` tokens of text are the sample's other part."""
    width = max(len(price.name) for price in prices)
    lines = [f"{'':{width}}  {'tiles':>5} {'tokens':>7} {'of stream':>9} {'encoder':>10} {'decoder':>10} {'activations':>11}"]
    for price in prices:
        share = price.tokens / (price.tokens + text)
        lines.append(
            f"{price.name:{width}}  {price.tiles:5,} {price.tokens:7,} {share:9.1%} {price.encoder / 1e12:7.3f} TF "
            f"{price.decoder / 1e12:7.3f} TF {price.memory / MIB:7,.0f} MiB"
        )
    return lines
