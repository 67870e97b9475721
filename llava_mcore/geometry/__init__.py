"""Pure arithmetic of pictures and clips: sizes and counts in ``shapes``, the order of embeddings in ``arrange``. No torch."""

from llava_mcore.geometry.arrange import Arrangement, arrange
from llava_mcore.geometry.shapes import (
    SINGLE,
    Anyres,
    Cut,
    Frames,
    Geometry,
    Shape,
    num_image_embeddings,
    num_patches,
    round_up,
)

__all__ = [
    "SINGLE",
    "Anyres",
    "Arrangement",
    "Cut",
    "Frames",
    "Geometry",
    "Shape",
    "arrange",
    "num_image_embeddings",
    "num_patches",
    "round_up",
]
