"""Pure arithmetic of pictures: how many embeddings one costs. The loader and the model both ask here.

No torch: the loader writes the placeholders from these numbers and the model never counts anything.
"""

from __future__ import annotations


def num_patches(image_size: int, patch_size: int) -> int:
    """Whole patches of a square picture of ``image_size`` pixels cut into squares of ``patch_size`` pixels.

    Pixels that fill no patch, at the right and below, are not seen (384 pixels in patches of 14 are 27 x 27 patches), as in the
    convolution of the published towers.
    """
    return (image_size // patch_size) ** 2


def num_image_embeddings(image_size: int, patch_size: int, select_feature: str) -> int:
    """Decoder embeddings one picture becomes: its patches, plus the class token for ``cls_patch``."""
    return num_patches(image_size, patch_size) + (1 if select_feature == "cls_patch" else 0)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple
