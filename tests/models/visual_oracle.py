"""transformers' LLaVA-NeXT, -NeXT-Video and -OneVision as oracles: tiny random models, pictures of many sizes, clips.

Shape suffixes: L tokens of a sample, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from llava_mcore.data.loader import Batch, Piece, lay_out
from llava_mcore.data.packing import pack
from llava_mcore.geometry import Geometry, Shape

IMAGE, VIDEO = 100, 99
TEXT = {
    "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "vocab_size": 101, "max_position_embeddings": 4096, "initializer_range": 0.1,
}  # fmt: skip
TOWER = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.1,
}  # fmt: skip
NEXT = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
ONEVISION = [[24 * rows, 24 * columns] for rows in range(1, 7) for columns in range(1, 7)]


@dataclass
class Sample:
    """Token ids with our placeholders and with theirs, labels already shifted, tiles and what they belong to."""

    input_ids_L: Tensor
    their_ids_L: Tensor
    labels_L: Tensor
    pixels: Tensor  # [tiles, 3, size, size]
    shapes: list[Shape]
    theirs: dict[str, Any] = field(default_factory=dict)  # what their model takes beside ids


def make_model(folder: Path, kind: str) -> Path:
    """Saves a random model: CLIP of 4 x 4 patches, or SigLIP of 3 x 3, with pixels that fill no patch."""
    torch.manual_seed(11)
    clip = transformers.CLIPVisionConfig(**TOWER, image_size=28, patch_size=7)
    llama = transformers.LlamaConfig(**TEXT)
    ids = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    if kind == "llava_next":
        ids.pop("video_token_index")
        config = transformers.LlavaNextConfig(vision_config=clip, text_config=llama, image_grid_pinpoints=NEXT, **ids)
        model = transformers.LlavaNextForConditionalGeneration(config)
    elif kind == "llava_next_video":
        config = transformers.LlavaNextVideoConfig(vision_config=clip, text_config=llama, image_grid_pinpoints=NEXT, **ids)
        model = transformers.LlavaNextVideoForConditionalGeneration(config)
    else:
        siglip = transformers.SiglipVisionConfig(**TOWER, image_size=24, patch_size=7, vision_use_head=False)
        qwen = transformers.Qwen2Config(**TEXT)
        config = transformers.LlavaOnevisionConfig(
            vision_config=siglip, text_config=qwen, image_grid_pinpoints=ONEVISION, vision_aspect_ratio="anyres_max_4", **ids
        )
        model = transformers.LlavaOnevisionForConditionalGeneration(config)
    for parameter in model.parameters():  # norms and biases too, so that none is one or zero by accident
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def make_samples(geometry: Geometry, kind: str, pictures: int, clips: list[int]) -> list[Sample]:
    """Samples with ``pictures`` pictures of random sizes in all, some of them several to a sample, and clips of these lengths."""
    random = np.random.default_rng(5)
    sizes = [(1, 1), (1, 400), (400, 1), (336, 336), (1056, 220)]  # the last is one where LLaVA's own rounding differs
    sizes += [tuple(random.integers(1, 1500, 2).tolist()) for _ in range(pictures - len(sizes))]  # type: ignore[misc]
    counts = [1] * (pictures * 3 // 5) + [2] * (pictures // 10) + [3] * (pictures // 15) + [1] * pictures
    samples, at = [], 0
    for count in counts:
        if at + count <= pictures:
            samples.append(_sample(geometry, kind, sizes[at : at + count], 0, random))
            at += count
    for frames in clips:
        samples.append(_sample(geometry, kind, [], frames, random))
    if clips:
        samples.append(_sample(geometry, kind, sizes[3:4], clips[-1], random))
    return samples


def _sample(geometry: Geometry, kind: str, sizes: list[tuple[int, int]], frames: int, random: np.random.Generator) -> Sample:
    shapes = [geometry.picture(*size, len(sizes) > 1) for size in sizes] + [Shape(frames=frames)] * (frames > 0)
    ours, theirs = [np.array([1, 5])], [np.array([1, 5])]
    for shape in shapes:
        places = geometry.embeddings(shape)
        text = random.integers(6, 90, random.integers(1, 6))
        ours += [np.full(places, IMAGE), text]
        theirs += [np.full(places, VIDEO if shape.frames else IMAGE), text]
    ids = torch.from_numpy(np.concatenate(ours))
    labels = ids.roll(-1)
    labels[-1] = -100
    labels[labels == IMAGE] = -100
    tiles = [geometry.tiles(shape) for shape in shapes]
    size = geometry.image_size
    pixels = torch.from_numpy(random.standard_normal((sum(tiles), 3, size, size), dtype=np.float32))
    each = pixels.split(tiles)
    more: dict[str, Any] = {}
    if sizes:
        longest = max(tiles[: len(sizes)])
        padded = [torch.cat([own, own.new_zeros(longest - len(own), 3, size, size)]) for own in each[: len(sizes)]]
        more |= {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor([[height, width] for width, height in sizes])}
        if kind == "llava_onevision":
            more["batch_num_images"] = torch.tensor([len(sizes)])
    if frames:
        more["pixel_values_videos"] = each[-1][None]
    return Sample(ids, torch.from_numpy(np.concatenate(theirs)), labels, pixels, shapes, more)


def batches(samples: list[Sample], streams: list[list[int]], length: int, size: int) -> list[Batch]:
    """One micro-batch a stream, by the loader's own laying out."""
    pieces = [
        Piece(
            sample.input_ids_L.numpy(),
            sample.labels_L.numpy(),
            np.flatnonzero(sample.input_ids_L.numpy() == IMAGE),
            sample.pixels.numpy(),
            sample.shapes,
        )
        for sample in samples
    ]
    return [lay_out([[pieces[number] for number in stream]], length, size) for stream in streams]


def streams(samples: list[Sample], length: int) -> list[list[int]]:
    """Which samples share a stream."""
    return pack([len(sample.input_ids_L) for sample in samples], length)


def _model(folder: Path) -> Any:
    model = transformers.AutoModelForImageTextToText
    return model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits(folder: Path, samples: list[Sample]) -> dict[str, Any]:
    """Logits of every sample."""
    model = _model(folder)
    return {"logits": [model(input_ids=sample.their_ids_L[None], **sample.theirs).logits[0] for sample in samples]}


def run_transformers(folder: Path, samples: list[Sample]) -> dict[str, Any]:
    """Logits of every sample, the mean loss per token over all of them, and its gradients by name."""
    model = _model(folder)
    total, tokens, logits = torch.zeros(()), 0, []
    for sample in samples:
        output_LV = model(input_ids=sample.their_ids_L[None], **sample.theirs).logits[0]
        total = total + torch.nn.functional.cross_entropy(output_LV, sample.labels_L, ignore_index=-100, reduction="sum")
        tokens += int((sample.labels_L != -100).sum())
        logits.append(output_LV.detach())
    (total / tokens).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits, "loss": float(total.detach()) / tokens, "gradients": gradients}
