"""Pure arithmetic of pictures: how many embeddings one costs. The loader and the model both ask here.

No torch: the loader writes the placeholders from these numbers and the model never counts anything.
"""

from __future__ import annotations


def num_patches(image_size: int, patch_size: int) -> int:
    """Patches of a square picture of ``image_size`` pixels cut into squares of ``patch_size`` pixels."""
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
    return (image_size // patch_size) ** 2


def num_image_embeddings(image_size: int, patch_size: int, select_feature: str) -> int:
    """Decoder embeddings one picture becomes: its patches, plus the class token for ``cls_patch``."""
    return num_patches(image_size, patch_size) + (1 if select_feature == "cls_patch" else 0)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple
