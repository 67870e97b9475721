"""Rotary position embedding (Su et al., 2021), with the changes for longer contexts that published decoders use.

Shape suffixes: T tokens of a micro-batch, F frequencies, R = 2 F the width of a head that turns, Q rows of the position ids.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from llava_mcore.settings.schema import LanguageSettings, RopeScaling


def frequencies(language: LanguageSettings) -> Tensor:
    """Radians a token for each pair of dimensions: [F], or for longrope [2, F], those of short samples and those of long ones.

    In float32 on the CPU, so that every device rounds alike, and in transformers' order of operations.

    Sources: linear: Chen et al., 2023 (https://arxiv.org/abs/2306.15595); llama3: Grattafiori et al., 2024
    (https://arxiv.org/abs/2407.21783) and Meta's code; yarn: Peng et al., 2023 (https://arxiv.org/abs/2309.00071); longrope: Ding
    et al., 2024 (https://arxiv.org/abs/2402.13753).
    """
    width, base, scaling = language.rotary_dim, language.rotary_base, language.rope_scaling
    powers_F = base ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    plain_F = 1.0 / powers_F
    if scaling is None:
        return plain_F
    if scaling.type == "linear":
        assert scaling.factor is not None
        return plain_F / scaling.factor
    if scaling.type == "llama3":
        return _llama3(plain_F, scaling)
    if scaling.type == "yarn":
        return _yarn(plain_F, 1.0 / (_factor(language) * powers_F), language)
    return torch.stack([1.0 / (torch.tensor(divisors) * powers_F) for divisors in (scaling.short_factor, scaling.long_factor)])


def attention_factor(language: LanguageSettings) -> float:
    """What turned queries and keys are each multiplied by."""
    scaling = language.rope_scaling
    if scaling is None or scaling.type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    factor = _factor(language)
    if factor <= 1:
        return 1.0
    if scaling.type == "longrope":
        assert scaling.original_max_position_embeddings is not None
        return math.sqrt(1 + math.log(factor) / math.log(scaling.original_max_position_embeddings))
    if scaling.mscale and scaling.mscale_all_dim:
        return (0.1 * scaling.mscale * math.log(factor) + 1) / (0.1 * scaling.mscale_all_dim * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def _factor(language: LanguageSettings) -> float:
    scaling = language.rope_scaling
    assert scaling is not None and scaling.original_max_position_embeddings is not None
    return scaling.factor or language.max_position_embeddings / scaling.original_max_position_embeddings


def _llama3(plain_F: Tensor, scaling: RopeScaling) -> Tensor:
    """Long waves are stretched, short ones left alone, those between partly."""
    original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    assert original is not None and low is not None and high is not None and scaling.factor is not None
    waves_F = 2 * math.pi / plain_F
    stretched_F = plain_F / scaling.factor
    share_F = (original / waves_F - low) / (high - low)
    between_F = (1 - share_F) * stretched_F + share_F * plain_F
    chosen_F = torch.where(waves_F > original / low, stretched_F, plain_F)
    return torch.where((waves_F <= original / low) & (waves_F >= original / high), between_F, chosen_F)


def _yarn(plain_F: Tensor, stretched_F: Tensor, language: LanguageSettings) -> Tensor:
    """Dimensions that turn often keep their frequency, those that turn seldom get the stretched one, with a ramp between."""
    scaling, width = language.rope_scaling, language.rotary_dim
    assert scaling is not None and scaling.original_max_position_embeddings is not None
    original = scaling.original_max_position_embeddings

    def dimension(rotations: float) -> float:
        """The dimension that turns so often over the original context."""
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(language.rotary_base))

    first, last = dimension(scaling.beta_fast or 32), dimension(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    span = last - first if last != first else 0.001
    kept_F = 1 - ((torch.arange(width // 2, dtype=torch.float32) - first) / span).clamp(0, 1)
    return stretched_F * (1 - kept_F) + plain_F * kept_F


class RotaryEmbedding(nn.Module):
    """Angles at given positions.

    Megatron-Core's own either counts from the start of the stream or walks over the packed samples one by one; looking the
    angles up by position is exact for any packing and one operation. It takes the place of the multimodal rotary embedding,
    the one Megatron-Core hands position ids to.
    """

    def __init__(self, language: LanguageSettings) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequencies(language), persistent=False)
        scaling = language.rope_scaling
        self.longest_short = scaling.original_max_position_embeddings if scaling and scaling.type == "longrope" else None

    @property
    def needs_lengths(self) -> bool:
        """Whether the angles depend on how long a token's sample is."""
        return self.longest_short is not None

    def forward(self, position_ids_QT: Tensor, _section: Any = None, cp_group: Any = None) -> Tensor:
        """Angles [T, 1, 1, R], float32.

        Args:
            position_ids_QT: positions; where ``needs_lengths``, in a second row the length of each token's whole sample.
        """
        frequencies_F: Tensor = self.frequencies  # type: ignore[assignment]
        if self.longest_short is None:
            angles_TF = torch.outer(position_ids_QT[0].float(), frequencies_F)
        else:
            frequencies_TF = frequencies_F[(position_ids_QT[1] > self.longest_short).long()]
            angles_TF = position_ids_QT[0].float()[:, None] * frequencies_TF
        return torch.cat([angles_TF, angles_TF], dim=-1)[:, None, None, :]
