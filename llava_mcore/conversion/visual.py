"""Pictures of several tiles and clips in config.json: which of transformers' classes makes them so, and with which entries.

No torch. The classes fix most of it in code (modeling_llava_next.py, modeling_llava_next_video.py, modeling_llava_onevision.py).
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from llava_mcore.conversion.families import ConversionError
from llava_mcore.settings.schema import ModelSettings
from llava_mcore.settings.visual import AnyresSettings, VideoSettings

Config = dict[str, Any]

# Where a config of a class says nothing of its tiles, in pixels: rows of tiles, then columns.
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
ONEVISION_VIDEO = VideoSettings(pool="bilinear", stride=2, newline="one_token")
MERGES = {"flat": "flat", "spatial": "spatial", "spatial_unpad": "unpad", "spatial_maxpool2x2": "maxpool2x2"}


def of_class(config: Config, kind: str, where: Any) -> Config:
    """``anyres`` and ``video`` of the model settings, from the config.json of one of transformers' classes.

    Raises:
        ConversionError: naming the entry that cannot be expressed.
    """
    if kind == "llava":
        return {}
    onevision = kind == "llava_onevision"
    size = (config.get("vision_config") or {}).get("image_size", 384 if onevision else 336)
    pinpoints = config.get("image_grid_pinpoints")
    pinpoints = (ONEVISION_PINPOINTS if onevision else NEXT_PINPOINTS) if pinpoints is None else pinpoints
    anyres: Config = {"grids": _grids(pinpoints, size, where)}
    video: Config = {}
    if onevision:
        aspect = str(config.get("vision_aspect_ratio", "anyres_max_9"))
        limit = aspect.removeprefix("anyres_max_")
        if not limit.isdecimal() or limit == aspect or int(limit) < 1:
            raise ConversionError(f"{where}: vision_aspect_ratio={aspect!r} (known: 'anyres_max_9' and other numbers)")
        anyres |= {"max_tiles": int(limit), "several": "single"}
        video = asdict(ONEVISION_VIDEO)
    if kind == "llava_next_video":
        mode = config.get("spatial_pool_mode", "average")
        if mode not in ("average", "max"):
            raise ConversionError(f"{where}: spatial_pool_mode={mode!r} (known: 'average', 'max')")
        video = {"pool": mode, "stride": config.get("spatial_pool_stride", 2), "pool_at": "before_projector"}
    return {"anyres": anyres, "video": video}


def of_original(config: Config, size: int, where: Any) -> Config:
    """The same from LLaVA's own config.json, whose pairs are width and height.

    Raises:
        ConversionError: naming the entry that cannot be expressed.
    """
    aspect = str(config.get("image_aspect_ratio") or "square")
    if not aspect.startswith("anyres"):
        return {}
    merge = str(config.get("mm_patch_merge_type") or "flat")
    kind = merge.removesuffix("_nobase")
    if kind not in MERGES:
        raise ConversionError(f"{where}: mm_patch_merge_type={merge!r} (known: {', '.join(MERGES)}, and with _nobase)")
    limit = aspect.removeprefix("anyres").removeprefix("_max_")
    if limit and (not limit.isdecimal() or int(limit) < 1):
        raise ConversionError(f"{where}: image_aspect_ratio={aspect!r} (known: 'anyres' and 'anyres_max_9')")
    pinpoints = config.get("image_grid_pinpoints") or NEXT_PINPOINTS
    if isinstance(pinpoints, str):
        pinpoints = _all_between(pinpoints, size, where)
    anyres = {
        "grids": _grids([[height, width] for width, height in pinpoints], size, where),
        "merge": MERGES[kind],
        "base": kind == merge,
        "max_tiles": int(limit) if limit and MERGES[kind] == "unpad" else None,
        "convention": "llava",
        "several": "single" if limit else "tiles",
    }
    return {"anyres": anyres}


def class_of(model: ModelSettings) -> str:
    """The class of transformers that treats pictures and clips as the model does.

    Raises:
        ConversionError: there is none; says what would have to be different.
    """
    anyres, video, plain = model.anyres, model.video, VideoSettings()
    if anyres is None and model.geometry.plain:
        return "llava"
    if anyres is None or anyres.merge != "unpad" or not anyres.base or anyres.convention != "hf":
        why = "pictures need anyres with merge=unpad, base=true and convention=hf"
    elif anyres.max_tiles is not None and anyres.several == "single" and same_video(video, ONEVISION_VIDEO):
        return "llava_onevision"
    elif anyres.max_tiles is None and anyres.several == "tiles" and same_video(video, plain):
        return "llava_next"
    elif anyres.max_tiles is None and anyres.several == "tiles" and _is_next_video(video):
        return "llava_next_video"
    else:
        why = "it has max_tiles, several=single and OneVision's video, or none of them (and video pooled before the projector)"
    raise ConversionError(f"no class of transformers has this model.anyres and model.video: {why}")


def entries(model: ModelSettings, kind: str) -> Config:
    """What the config.json of a class says of pictures and clips."""
    if model.anyres is None:
        return {}
    size = model.vision.image_size
    found: Config = {"image_grid_pinpoints": [[rows * size, columns * size] for rows, columns in model.anyres.grids]}
    if kind == "llava_onevision":
        found["vision_aspect_ratio"] = f"anyres_max_{model.anyres.max_tiles}"
    if kind == "llava_next_video":
        found |= {"spatial_pool_mode": model.video.pool, "spatial_pool_stride": model.video.stride}
    return found


def same_video(one: VideoSettings, other: VideoSettings) -> bool:
    """Whether clips are treated alike; how frames would be pooled does not count where they are not."""
    unpooled = {"stride": 1, "pool_at": "after_projector"}
    first, second = ({**asdict(video), **(unpooled if video.pool == "none" else {})} for video in (one, other))
    return first == second


def _is_next_video(video: VideoSettings) -> bool:
    wanted = VideoSettings(pool=video.pool, stride=video.stride, pool_at="before_projector")
    return video.pool in ("average", "max") and video == wanted


def _grids(pinpoints: Any, size: int, where: Any) -> list[list[int]]:
    """Rows and columns of tiles from pairs of pixels."""
    pairs = isinstance(pinpoints, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pinpoints)
    if not pairs or not pinpoints:
        raise ConversionError(f"{where}: image_grid_pinpoints={pinpoints!r} must be a list of pairs of pixels")
    wrong = [pair for pair in pinpoints if any(side < size or side % size for side in pair)]
    if wrong:
        raise ConversionError(f"{where}: image_grid_pinpoints has {wrong[0]}, no multiple of vision_config.image_size {size}")
    return [[side // size for side in pair] for pair in pinpoints]


def _all_between(pinpoints: str, size: int, where: Any) -> list[list[int]]:
    """LLaVA-NeXT's short form ``(1x1),...,(6x6)``, in tiles: every grid from the first to the last."""
    ends = re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", pinpoints.replace(" ", ""))
    if ends is None:
        raise ConversionError(f"{where}: image_grid_pinpoints={pinpoints!r} (known: pairs of pixels, and '(1x1),...,(6x6)')")
    first, second, to_first, to_second = map(int, ends.groups())
    return [[size * one, size * two] for one in range(first, to_first + 1) for two in range(second, to_second + 1)]


def same(one: ModelSettings, other: ModelSettings) -> bool:
    """Whether two models treat pictures and clips alike."""
    anyres: list[AnyresSettings | None] = [one.anyres, other.anyres]
    return anyres[0] == anyres[1] and same_video(one.video, other.video)
