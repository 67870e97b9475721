"""One training step of this project and of transformers, from the same weights and the same samples.

Shape suffixes: L tokens of a sample, B samples of a batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_mcore.conversion import hf_config
from llava_mcore.conversion.convert import load_hf_into
from llava_mcore.data.conversation import IGNORE
from llava_mcore.data.loader import Batch, Piece, lay_out
from llava_mcore.data.packing import pack
from llava_mcore.models.initialize import initialize
from llava_mcore.models.llava import LlavaModel, ModelParts, build_model
from llava_mcore.parallel.groups import Groups
from llava_mcore.settings.compose import from_dict
from llava_mcore.settings.derive import derive
from llava_mcore.settings.schema import ModelSettings, Settings
from llava_mcore.training.checkpoint import model_state, sharding_metadata
from llava_mcore.training.engine import distribute, forward_backward
from llava_mcore.training.optimizer import build_optimizer, freeze

CPU = torch.device("cpu")
BOS, IMAGE = 1, 3
FIRST_WORD = 4  # ids below are special
LR, CLIP = 1e-4, 1.0
LONGEST = 4096  # positions the decoders are made for; only what is used costs anything


def settings_of(
    hidden: int, ffn: int, layers: int, heads: int, vocab: int, tower: tuple[int, int, int], freeze: Sequence[str]
) -> Settings:
    """A run on one process in float32.

    Args:
        hidden, ffn, layers, heads, vocab: of the decoder.
        tower: width, layers, and patches along a side of a picture; the last layer is the selected one, so that this project,
            which does not build unused layers, computes just what transformers does.
        freeze: modules that are not trained.
    """
    width, tower_layers, side = tower
    return from_dict(
        {
            "model": {
                "vision": {
                    "image_size": 14 * side,
                    "patch_size": 14,
                    "hidden_size": width,
                    "ffn_hidden_size": 4 * width,
                    "num_layers": tower_layers,
                    "num_attention_heads": width // 64,
                    "select_layer": -1,
                },
                "projector": {},
                "language": {
                    "hidden_size": hidden,
                    "ffn_hidden_size": ffn,
                    "num_layers": layers,
                    "num_attention_heads": heads,
                    "vocab_size": vocab,
                    "max_position_embeddings": LONGEST,
                },
                "image_token_id": IMAGE,
            },
            "data": {"sequence_length": LONGEST},
            "train": {
                "steps": 1000,
                "dtype": "float32",
                "lr": LR,
                "warmup_ratio": 0.0,
                "clip_grad": CLIP,
                "freeze": list(freeze),
            },
            "parallel": {},
        }
    )


@dataclass(frozen=True)
class Sample:
    """Token ids with placeholders for at most one picture; the labels are not shifted, as transformers wants them.

    The positions are those of the decoder, counted where there are none.
    """

    input_ids_L: np.ndarray
    labels_L: np.ndarray
    pixels: np.ndarray  # float32 [pictures, 3, size, size]
    positions_L: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids_L)

    def piece(self) -> Piece:
        """The sample as the loader lays it into a stream."""
        shifted_L = np.append(self.labels_L[1:], IGNORE)
        slots_E = np.flatnonzero(self.input_ids_L == IMAGE)
        return Piece(self.input_ids_L, shifted_L, slots_E, self.pixels, positions_L=self.positions_L)


def make_sample(model: ModelSettings, text: int, picture: bool, random: np.random.Generator) -> Sample:
    """BOS, perhaps a picture, and ``text`` random words, of which the second half is learned."""
    placeholders = model.embeddings_per_image if picture else 0
    words = random.integers(FIRST_WORD, model.language.vocab_size, text)
    ids = np.concatenate([[BOS], np.full(placeholders, IMAGE), words]).astype(np.int64)
    labels = np.full_like(ids, IGNORE)
    labels[-max(1, text // 2) :] = ids[-max(1, text // 2) :]
    size = model.vision.image_size
    return Sample(ids, labels, random.standard_normal((int(picture), 3, size, size), dtype=np.float32))


def padded(samples: Sequence[Sample], image_size: int) -> Batch:
    """One micro-batch: each sample in a stream of its own, all as long as the longest."""
    return lay_out([[sample.piece()] for sample in samples], max(map(len, samples)), image_size)


def packed(samples: Sequence[Sample], capacity: int, image_size: int) -> list[Batch]:
    """Micro-batches of one packed stream each, as the loader makes them."""
    streams = pack([len(sample) for sample in samples], capacity)
    return [lay_out([[samples[number].piece() for number in stream]], capacity, image_size) for stream in streams]


def rows(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """What transformers' model is called with: one row a sample, padded on the right to the longest."""
    ids_BL = torch.zeros(len(samples), max(map(len, samples)), dtype=torch.int64)
    labels_BL, mask_BL = torch.full_like(ids_BL, IGNORE), torch.zeros_like(ids_BL)
    for row, sample in enumerate(samples):
        ids_BL[row, : len(sample)] = torch.from_numpy(sample.input_ids_L)
        labels_BL[row, : len(sample)] = torch.from_numpy(sample.labels_L)
        mask_BL[row, : len(sample)] = 1
    inputs = {"input_ids": ids_BL, "labels": labels_BL, "attention_mask": mask_BL}
    pixels = np.concatenate([sample.pixels for sample in samples])
    return inputs | ({"pixel_values": torch.from_numpy(pixels)} if len(pixels) else {})


class DecoderOnly(LlavaModel):
    """The same decoder in a text-only run: pictures cost nothing, as there are none."""

    def encode_images(self, pixel_values_NChw: Tensor, *_: Any, **_unused: Any) -> tuple[Tensor, None]:
        """No embeddings [0, H]; LlavaModel would encode a blank picture to keep ranks in step."""
        if len(pixel_values_NChw):
            raise ValueError(f"{len(pixel_values_NChw)} pictures in a text-only run")
        return pixel_values_NChw.new_zeros(0, self.config.hidden_size), None


class Ours:
    """This project's model, optimizer and step, as the trainer puts them together."""

    def __init__(
        self,
        settings: Settings,
        groups: Groups,
        hf_folder: str | None = None,
        text_only: bool = False,
        start: ModelParts | None = None,
    ) -> None:
        train, parallel = settings.train, settings.parallel
        if text_only:
            self.model = ModelParts([DecoderOnly(settings.model, parallel, train.dtype, groups, precision=settings.precision)])
        else:
            self.model = build_model(settings.model, parallel, train.dtype, groups, precision=settings.precision)
        if start is not None:
            self.model.load_state_dict(start.state_dict(), strict=False)  # but for the extra states of Transformer Engine
        elif hf_folder is None:
            initialize(self.model, train.seed, sharding_metadata(groups))
        else:
            load_hf_into(model_state(self.model, groups), hf_folder)
        freeze(self.model, train.freeze, groups)
        self.groups = groups
        self.ddp = distribute(self.model, parallel, groups)
        self.optimizer, self.scheduler = build_optimizer(self.ddp, train, parallel, derive(settings, 1, 1), groups)
        self.scheduler.step(1)

    def backward(self, batches: Sequence[Batch]) -> float:
        """Gradients of a step; returns the mean loss per token."""
        for part in self.ddp:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = forward_backward(self.ddp, batches, self.groups, CPU)
        return float(sum(losses)) / sum(batch.loss_tokens for batch in batches)

    def step(self, batches: Sequence[Batch]) -> float:
        """Forward, backward, clipping, AdamW and the schedule; returns the mean loss per token."""
        loss = self.backward(batches)
        self.optimizer.step()
        self.scheduler.step(1)
        return loss


class Transformers:
    """The peer: ``LlavaForConditionalGeneration`` with SDPA and torch's fused AdamW, as its ``Trainer`` would run it."""

    def __init__(self, settings: Settings) -> None:
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        torch.manual_seed(settings.train.seed)
        config = LlavaConfig.from_dict(hf_config.from_settings(settings.model, bos_id=BOS, eos_id=2, pad_id=0))
        config._attn_implementation = "sdpa"
        self.model: Any = LlavaForConditionalGeneration(config).float().train()
        if "vision_tower" in settings.train.freeze:
            self.model.model.vision_tower.requires_grad_(False)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0, fused=True)

    def step(self, batches: Sequence[dict[str, Tensor]]) -> float:
        """Forward, backward, clipping and AdamW; returns the mean loss per token."""
        self.optimizer.zero_grad()
        tokens = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self.model(**batch, use_cache=False, num_items_in_batch=tokens).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        return total


def pair(settings: Settings, groups: Groups) -> tuple[Ours, Transformers]:
    """Both with the same weights."""
    peer = Transformers(settings)
    with tempfile.TemporaryDirectory() as folder:
        peer.model.save_pretrained(folder)
        return Ours(settings, groups, folder), peer
