"""What LLaVA's own config.json says of tiles, in the forms that published checkpoints have."""

from __future__ import annotations

from typing import Any

import pytest

from llava_mcore.conversion.families import ConversionError
from llava_mcore.conversion.visual import of_original
from llava_mcore.geometry import Shape
from llava_mcore.settings.compose import compose

V16 = {  # LLaVA-v1.6
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
ONEVISION = {
    "image_aspect_ratio": "anyres_max_9",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": "(1x1),...,(6x6)",
}


def test_published_forms() -> None:
    assert of_original({"image_aspect_ratio": "pad"}, 336, "here") == of_original({}, 336, "here") == {}
    (found,) = of_original(V16, 336, "here").values()
    # Pairs are width and height there, rows and columns here.
    assert found["grids"] == [[2, 1], [1, 2], [2, 2], [1, 3], [3, 1]]
    assert (found["merge"], found["base"], found["max_tiles"], found["several"]) == ("unpad", True, None, "tiles")
    (found,) = of_original(ONEVISION, 384, "here").values()
    assert found["grids"] == [[columns, rows] for rows in range(1, 7) for columns in range(1, 7)]
    assert (found["max_tiles"], found["several"], found["convention"]) == (9, "single", "llava")
    (found,) = of_original(V16 | {"mm_patch_merge_type": "spatial_nobase"}, 336, "here").values()
    assert (found["merge"], found["base"]) == ("spatial", False)


def test_they_make_a_geometry() -> None:
    """A wide picture of LLaVA-v1.6: the base, and two tiles less the rows of padding, each row with a newline."""
    anyres = of_original(V16, 336, "here")["anyres"]
    overrides = [f"model.anyres.{name}={value}" for name, value in anyres.items() if value is not None]
    geometry = compose(["experiment=pretrain_llava_7b", *(text.replace(" ", "") for text in overrides)]).model.geometry
    assert geometry.tiles(Shape(672, 336)) == 3
    assert geometry.embeddings(Shape(672, 336)) == 576 + 24 * (48 + 1)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"mm_patch_merge_type": "spatial_avg"}, "mm_patch_merge_type='spatial_avg' .known: flat, spatial"),
        ({"image_aspect_ratio": "anyres_max_0"}, "image_aspect_ratio='anyres_max_0'"),
        ({"image_grid_pinpoints": "(1x1)...6"}, "known: pairs of pixels, and '.1x1.,...,.6x6.'"),
        ({"image_grid_pinpoints": [[336, 500]]}, "no multiple of vision_config.image_size 336"),
    ],
)
def test_what_cannot_be_read(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError, match=f"here: .*{reason}"):
        of_original(V16 | changed, 336, "here")
