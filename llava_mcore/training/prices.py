"""What a picture or a clip costs a decoder, for every way of making embeddings of it, side by side. No torch is imported."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from llava_mcore.geometry import Anyres, Frames, Geometry, Shape
from llava_mcore.settings.schema import LanguageSettings, Settings
from llava_mcore.settings.visual import AnyresSettings
from llava_mcore.training.observe.flops import FlopsCounter

HEIGHTS = {"480p": (854, 480), "720p": (1280, 720), "1080p": (1920, 1080), "2160p": (3840, 2160)}
RATE = 30.0  # frames a second of a clip whose rate is not said


@dataclasses.dataclass(frozen=True)
class Price:
    """One way of making embeddings, and what it costs.

    Attributes:
        name: the settings that choose it.
        tiles: pictures through the tower.
        tokens: embeddings in the decoder's stream.
        encoder: FLOPs of tower and projector, forward.
        decoder: FLOPs of the decoder, forward, were these tokens a sample.
        memory: bytes of the decoder's activations for them in 16 bits, where nothing is recomputed, without attention scores.
    """

    name: str
    tiles: int
    tokens: int
    encoder: int
    decoder: int
    memory: int


def of_picture(settings: Settings, width: int, height: int) -> list[Price]:
    """The prices of a picture of so many pixels; the first is the one of the settings."""
    geometry = settings.model.geometry
    anyres = geometry.anyres or AnyresSettings().geometry
    rows = [("as set", geometry), ("model.anyres=null", dataclasses.replace(geometry, anyres=None))]
    rows += [(name, dataclasses.replace(geometry, anyres=variant)) for name, variant in _variants(anyres)]
    if geometry.class_token:  # its features are no grid
        rows = rows[:2]
    return [_price(settings, name, variant, variant.picture(width, height, several=False)) for name, variant in rows]


def of_clip(settings: Settings, frames: int) -> list[Price]:
    """The prices of a clip of so many shown frames; the first is the one of the settings."""
    geometry = settings.model.geometry
    ways = [
        ("model.video.pool=none", Frames()),
        ("model.video.pool=average", Frames("average", 2)),
        ("model.video.pool=average model.video.newline=grid", Frames("average", 2, "grid")),
        ("model.video.pool=bilinear model.video.newline=one_token", Frames("bilinear", 2, "one_token")),
        ("model.video.pool=average model.video.newline=grid model.video.slow_every=10", Frames("average", 2, "grid", 10)),
        ("model.video.pool=average model.video.stride=4", Frames("average", 4)),
    ]
    usable = [(name, way) for name, way in ways if not geometry.class_token and geometry.side >= 4 * way.stride]
    rows = [("as set", geometry), *((name, dataclasses.replace(geometry, video=way)) for name, way in usable)]
    return [_price(settings, name, variant, Shape(frames=frames)) for name, variant in rows]


def _variants(anyres: Anyres) -> Iterator[tuple[str, Anyres]]:
    unpad = dataclasses.replace(anyres, merge="unpad", base=True, max_tiles=None)
    yield "model.anyres.merge=unpad", unpad
    yield "model.anyres.merge=unpad model.anyres.base=false", dataclasses.replace(unpad, base=False)
    for most in (2, 4, 9):
        yield f"model.anyres.merge=unpad model.anyres.max_tiles={most}", dataclasses.replace(unpad, max_tiles=most)
    for merge in ("flat", "spatial", "maxpool2x2"):
        yield f"model.anyres.merge={merge}", dataclasses.replace(unpad, merge=merge)  # type: ignore[arg-type]


def _price(settings: Settings, name: str, geometry: Geometry, shape: Shape) -> Price:
    tiles, tokens = geometry.tiles(shape), geometry.embeddings(shape)
    flops = FlopsCounter(settings).forward([tokens], tiles)
    memory = tokens * _activations(settings.model.language)
    return Price(name, tiles, tokens, flops["vision_tower"] + flops["projector"], flops["language_model"], memory)


def _activations(language: LanguageSettings) -> int:
    """Bytes that the layers keep of a token for the backward pass: Korthikanti et al. (2022), section 4, for a gated MLP."""
    queries, keys = language.num_attention_heads * language.head_dim, language.query_groups * language.head_dim
    experts = language.experts_per_token if language.num_experts else 1
    # Both norms' inputs and outputs; queries, keys, values and what attention gives; gate, up and their product.
    values = 4 * language.hidden_size + 2 * queries + 2 * keys + 3 * experts * language.ffn_hidden_size
    return 2 * language.num_layers * values


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
            f"{price.decoder / 1e12:7.3f} TF {price.memory / 2**20:7,.0f} MiB"
        )
    return lines
