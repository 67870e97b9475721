"""transformers' LLaVA as the oracle: a tiny random model, samples, and its logits, loss and gradients one sample at a time.

Shape suffixes: L tokens of a sample, V vocabulary, T tokens of a stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_mcore.data.loader import Batch

IMAGE_TOKEN = 7
IMAGE_SIZE, PATCH = 20, 5
PATCHES = (IMAGE_SIZE // PATCH) ** 2
STREAM = 112


@dataclass
class Sample:
    """Token ids with placeholders, labels already shifted, pictures."""

    input_ids_L: Tensor
    labels_L: Tensor
    pixels: Tensor  # [pictures, 3, size, size]


def make_model(folder: Path, *, tied: bool = False, select: str = "default", heads: int = 6, groups: int = 2) -> Path:
    """Saves a random LLaVA of awkward sizes: an odd number of queries a group, a vocabulary of 101, an odd tower."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(11)
    text = LlamaConfig(
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=10,
        vocab_size=101,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    vision = CLIPVisionConfig(
        hidden_size=40,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        initializer_range=0.1,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        vision_feature_select_strategy=select,
        vision_feature_layer=-2,
        tie_word_embeddings=tied,
    )
    model = LlavaForConditionalGeneration(config).float()
    for parameter in model.parameters():  # norms and biases too, so that none is one or zero by accident
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def make_samples(tokens_each: int = PATCHES) -> list[Sample]:
    """Pictures at the start, in the middle, at the end; several, one and none; one sample without a label, one of one token."""
    generator = torch.Generator().manual_seed(5)
    plans = ["I5", "4I3", "I3I4", "9", "2I2I1", "6I", "1", "3I8"]
    samples = []
    for number, plan in enumerate(plans):
        ids: list[int] = []
        pictures = 0
        for part in plan:
            if part == "I":
                ids += [IMAGE_TOKEN] * tokens_each
                pictures += 1
            else:
                ids += torch.randint(10, 101, (int(part),), generator=generator).tolist()
        input_ids = torch.tensor(ids)
        labels = input_ids.roll(-1)
        labels[-1] = -100
        labels[labels == IMAGE_TOKEN] = -100
        labels[: min(2, len(ids) - 1)] = -100  # part of the prompt is not trained on
        if number == 3:
            labels[:] = -100
        samples.append(Sample(input_ids, labels, torch.randn(pictures, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)))
    return samples


def pack(samples: list[Sample], streams: list[list[int]], length: int = STREAM) -> list[Batch]:
    """One micro-batch a stream, as the loader makes them."""
    batches = []
    for stream in streams:
        ids = torch.zeros(length, dtype=torch.int64)
        labels = torch.full((length,), -100)
        lengths, places, at = [], [], 0
        for number in stream:
            sample = samples[number]
            size = len(sample.input_ids_L)
            ids[at : at + size], labels[at : at + size] = sample.input_ids_L, sample.labels_L
            places.append((sample.input_ids_L == IMAGE_TOKEN).nonzero()[:, 0] + at)
            lengths.append(size)
            at += size
        real = at
        if at < length:
            lengths.append(length - at)
        batches.append(
            Batch(
                input_ids_T=ids,
                labels_T=labels,
                position_ids_T=torch.cat([torch.arange(size) for size in lengths]),
                sample_lengths=lengths,
                image_index_E=torch.cat([torch.zeros(0, dtype=torch.int64), *places]),
                pixel_values_NCHW=torch.cat(
                    [torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE), *(samples[number].pixels for number in stream)]
                ),
                loss_tokens=int((labels != -100).sum()),
                real_tokens=real,
            )
        )
    return batches


def run_transformers(folder: Path, samples: list[Sample]) -> dict[str, Any]:
    """Logits of every sample, the mean loss per token over all of them, and its gradients by name."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    total, tokens, logits = torch.zeros(()), 0, []
    for sample in samples:
        pictures = {"pixel_values": sample.pixels} if len(sample.pixels) else {}
        output_LV = model(input_ids=sample.input_ids_L[None], **pictures).logits[0]
        total = total + torch.nn.functional.cross_entropy(output_LV, sample.labels_L, ignore_index=-100, reduction="sum")
        tokens += int((sample.labels_L != -100).sum())
        logits.append(output_LV.detach())
    loss = total / tokens
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits, "loss": float(loss), "gradients": gradients}
