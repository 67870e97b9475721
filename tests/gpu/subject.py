"""A small LLaVA on one GPU whose sizes every kernel takes, on any backend, and what is asked of it.

Shape suffixes: T tokens of a stream.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llava_mcore.data.loader import Batch
from llava_mcore.models.backend import TE, installed
from llava_mcore.models.config import Recompute
from llava_mcore.models.initialize import initialize
from llava_mcore.models.llava import ModelParts, build_model
from llava_mcore.parallel import groups as process_groups
from llava_mcore.parallel.groups import Groups
from llava_mcore.platform import device
from llava_mcore.settings.compose import compose
from llava_mcore.settings.derive import derive
from llava_mcore.settings.schema import Settings
from llava_mcore.training.checkpoint import sharding_metadata
from llava_mcore.training.engine import distribute, forward_backward
from llava_mcore.training.optimizer import build_optimizer

LENGTHS = [201, 86, 225]  # over two context-parallel ranks, Transformer Engine's exchange needs padding in each
PICTURE = 16  # embeddings of a picture


def settings(*overrides: str) -> Settings:
    """The tests' model with heads, widths and streams of sizes that FP8 and flash attention take."""
    return compose(
        [
            "experiment=quickstart",
            "model.language.hidden_size=256",
            "model.language.ffn_hidden_size=512",
            "model.vision.hidden_size=128",
            "data.sequence_length=512",
            "train.micro_batch_size=1",
            "train.dtype=bfloat16",
            *overrides,
        ]
    )


def batch(changed: int | None = None) -> Batch:
    """Three samples, two with a picture; in ``changed`` every token and pixel is another."""
    generator = torch.Generator().manual_seed(1)
    ids_T = torch.randint(4, 500, (sum(LENGTHS),), generator=generator)
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    starts = [0, LENGTHS[0], LENGTHS[0] + LENGTHS[1]]
    if changed is not None:
        ids_T[starts[changed] : starts[changed] + LENGTHS[changed]] += 1
        for picture in {0: [0], 1: [], 2: [1]}[changed]:
            pixels[picture] += 1.0
    image_index = torch.cat([torch.arange(PICTURE) + 3, torch.arange(PICTURE) + starts[2] + 9])
    labels_T = ids_T.roll(-1)
    labels_T[image_index] = -100
    labels_T[torch.tensor(LENGTHS).cumsum(0) - 1] = -100  # the next token is another sample's
    return Batch(
        input_ids_T=ids_T,
        labels_T=labels_T,
        position_ids_T=torch.cat([torch.arange(length) for length in LENGTHS]),
        sample_lengths=list(LENGTHS),
        pixel_values_NCHW=pixels,
        image_index_E=image_index,
        loss_tokens=int((labels_T != -100).sum()),
        real_tokens=len(ids_T),
    )


@dataclass
class Result:
    """What one backend found."""

    token_losses_T: torch.Tensor
    gradients: dict[str, torch.Tensor]


class Subject:
    """The model of one setting, with weights that are a function of the seed and not of the backend."""

    def __init__(self, run: Settings, prepare: Callable[[ModelParts, Groups], Any] | None = None) -> None:
        self.device = device.start(timeout_minutes=5).device
        forget_choices()
        self.run, self.groups = run, process_groups.build(run.parallel)
        if run.parallel.tp_comm_overlap:
            from llava_mcore.models.transformer_engine import reserve_user_buffers

            reserve_user_buffers(run)
        self.model = build_model(run.model, run.parallel, run.train.dtype, self.groups, Recompute.of(run.train), run.precision)
        self.model.to(self.device)
        initialize(self.model, run.train.seed, sharding_metadata(self.groups))
        if prepare is not None:  # freezes, say
            prepare(self.model, self.groups)
        self.ddp = distribute(self.model, run.parallel, self.groups)

    def own_tokens(self) -> torch.Tensor:
        """Which tokens of ``batch()`` this context-parallel rank computes, T where it holds padding: int64 [C] on the host."""
        (part,) = self.model
        return torch.from_numpy(part.split(LENGTHS).tokens(self.groups.cp.rank()))

    def token_losses(self, batch_: Batch) -> torch.Tensor:
        """Of this rank's tokens, [C], float32."""
        (part,) = self.model
        with torch.no_grad():
            return part(
                batch_.input_ids_T.to(self.device),
                batch_.position_ids_T.to(self.device),
                batch_.sample_lengths,
                batch_.pixel_values_NCHW.to(self.device),
                batch_.image_index_E,
                batch_.labelled(),
                batch_.labels_T.to(self.device),
            ).float()

    def result(self) -> Result:
        """Token losses and gradients by parameter name, norms under the names they have where they are fused."""
        losses_T = self.token_losses(batch())
        for part in self.ddp:
            part.zero_grad_buffer()
        forward_backward(self.ddp, [batch()], self.groups, self.device, force_all_reduce=True)
        named = {_fused_name(name): parameter.main_grad.clone() for name, parameter in self.model.named_parameters()}
        return Result(losses_T, named)

    def train(self, steps: int) -> list[float]:
        """Mean losses of ``steps`` optimizer steps on the same batch."""
        derived = derive(self.run, 1000, 1)
        optimizer, scheduler = build_optimizer(self.ddp, self.run.train, self.run.parallel, derived, self.groups)
        losses = []
        for _ in range(steps):
            for part in self.ddp:
                part.zero_grad_buffer()
            optimizer.zero_grad()
            (loss,) = forward_backward(self.ddp, [batch()], self.groups, self.device)
            optimizer.step()
            scheduler.step(1)
            losses.append(float(loss) / batch().loss_tokens)
        return losses

    def close(self) -> None:
        """Forgets the groups, so that the next one can be built."""
        process_groups.destroy()


def forget_choices() -> None:
    """What is kept in a process for one run.

    Megatron-Core keeps the choice of attention in the environment and refuses another. Transformer Engine reads it there, and not
    again for a call of the same shapes and masks as the one before; it also keeps user buffers, and the groups of FP8 scales.
    """
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
    if TE in installed():
        from transformer_engine.pytorch import destroy_ub
        from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        _attention_backends["attention_params"] = None
        FP8GlobalStateManager.reset()
        destroy_ub()


def _fused_name(name: str) -> str:
    return name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
        "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
    )
