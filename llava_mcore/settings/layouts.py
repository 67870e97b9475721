"""Which layouts a model can be spread over: what is wrong with one, and which near it would work. No torch."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_mcore.settings.schema import LanguageSettings, ModelSettings, ParallelSettings, Settings

SUGGESTIONS = 3


def layout_problems(settings: Settings, world_size: int | None = None) -> list[str]:
    """Why this model cannot be spread this way, each reason with its fix; an empty list if it can.

    Args:
        settings: the composed settings.
        world_size: processes started, where known.
    """
    parallel = settings.parallel
    problems = _split_problems(settings.model, parallel)
    problems += _exchange_problems(settings.model.language, parallel.te_exchange, parallel.tensor, parallel.context)
    stream = settings.data.sequence_length * settings.train.micro_batch_size
    parts = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    if stream % parts:
        problems.append(
            f"data.sequence_length x train.micro_batch_size ({stream}) is not divisible by {parts}, as context parallelism "
            f"(parallel.context={parallel.context}) and sequence parallelism (parallel.tensor={parallel.tensor}) need; "
            f"use a multiple of {parts}"
        )
    if world_size is not None and world_size % parallel.model_ranks:
        problems.append(
            f"{world_size} processes cannot hold parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} x "
            f"parallel.context={parallel.context} = {parallel.model_ranks} ranks a model; start a multiple of "
            f"{parallel.model_ranks} processes or change the layout"
        )
    elif world_size is not None and world_size % parallel.least_ranks:
        problems.append(
            f"parallel.expert={parallel.expert} does not divide the {world_size // parallel.tensor // parallel.pipeline} data- "
            f"and context-parallel ranks of {world_size} processes; start a multiple of {parallel.least_ranks} or lower it"
        )
    if problems and (near := nearest_layouts(settings, world_size or parallel.least_ranks)):
        problems.append(f"layouts near it that work on {world_size or parallel.least_ranks} processes: " + "; ".join(near))
    return problems


def nearest_layouts(settings: Settings, world_size: int) -> list[str]:
    """Up to three layouts that fit the model, the stream and ``world_size`` processes, the most similar first."""
    model, parallel = settings.model, settings.parallel
    if _expert_problems(model, parallel):
        return []  # other sizes do not help
    stream = settings.data.sequence_length * settings.train.micro_batch_size
    wanted = (parallel.tensor, parallel.pipeline, parallel.context)
    divisors = [number for number in range(1, world_size + 1) if world_size % number == 0]
    found = []
    for sizes in itertools.product(divisors, repeat=3):
        tensor, pipeline, context = sizes
        if world_size % math.prod(sizes) or stream % (context * tensor) or pipeline > model.language.num_layers:
            continue
        if world_size // tensor // pipeline % parallel.expert:
            continue
        if model.language.num_layers % pipeline or _tensor_problems(model, tensor, parallel.encoder):
            continue
        if context > 1 and _exchange_problems(model.language, parallel.te_exchange, tensor, context):
            continue
        distance = sum(abs(math.log2(have / want)) for have, want in zip(sizes, wanted, strict=True))
        found.append((distance, sizes))
    names = ("parallel.tensor", "parallel.pipeline", "parallel.context")
    return [
        " ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True)) for _, sizes in sorted(found)[:SUGGESTIONS]
    ]


def _split_problems(model: ModelSettings, parallel: ParallelSettings) -> list[str]:
    """Heads, widths and layers that the layout does not divide."""
    problems = _tensor_problems(model, parallel.tensor, parallel.encoder) + _expert_problems(model, parallel)
    layers, split = model.language.num_layers, parallel.pipeline_split
    if split == "even" and layers % parallel.chunks:
        virtual = f" x parallel.virtual_pipeline={parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else ""
        problems.append(
            f"model.language.num_layers ({layers}) is not divisible by parallel.pipeline={parallel.pipeline}{virtual}; use "
            f"{_divisors(layers)}, or parallel.pipeline_split=auto"
        )
    if isinstance(split, list) and sum(split) != layers:
        problems.append(f"parallel.pipeline_split={split} holds {sum(split)} layers, model.language.num_layers is {layers}")
    return problems


def _exchange_problems(language: LanguageSettings, exchange: str | None, tensor: int, context: int) -> list[str]:
    """What Transformer Engine's exchange of keys and values asks of the decoder."""
    if exchange == "p2p" and language.sliding_window is not None:
        return [
            f"parallel.context_exchange=p2p knows no sliding window (model.language.sliding_window={language.sliding_window}); "
            f"use ring"
        ]
    ranks = tensor * context
    split = [
        ("model.language.num_attention_heads", language.num_attention_heads),
        ("model.language.num_query_groups", language.query_groups),
    ]
    return [
        f"{name} ({count}) is not divisible by parallel.tensor={tensor} x parallel.context={context}, as "
        f"parallel.context_exchange=a2a needs; use ring"
        for name, count in split
        if exchange == "a2a" and count % ranks
    ]


def _expert_problems(model: ModelSettings, parallel: ParallelSettings) -> list[str]:
    """What experts ask of a layout."""
    experts = model.language.num_experts
    if experts is None:
        return [f"parallel.expert={parallel.expert}: this model has no experts; set parallel.expert=1"] * (parallel.expert > 1)
    problems = []
    if experts % parallel.expert:
        problems.append(
            f"model.language.num_experts ({experts}) is not divisible by parallel.expert={parallel.expert}; use "
            f"{_divisors(experts)}"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        problems.append("experts with parallel.tensor > 1 need parallel.sequence=true: each rank routes its part of the tokens")
    return problems


def _tensor_problems(model: ModelSettings, tensor: int, encoder: str) -> list[str]:
    """What is split over tensor-parallel ranks and does not divide."""
    language, vision = model.language, model.vision
    split = [
        ("model.language.num_attention_heads", language.num_attention_heads),
        ("model.language.num_query_groups", language.query_groups),
        ("model.language.ffn_hidden_size", language.ffn_hidden_size),
        ("the padded vocabulary", language.padded_vocab_size),
    ]
    if encoder == "tensor_parallel":
        split += [
            ("model.language.hidden_size", language.hidden_size),  # the projector's width
            ("model.vision.num_attention_heads", vision.num_attention_heads),
            ("model.vision.ffn_hidden_size", vision.ffn_hidden_size),
        ]
    return [
        f"{name} ({count}) is not divisible by parallel.tensor={tensor}; use {_divisors(count)}"
        for name, count in split
        if count % tensor
    ]


def _divisors(count: int) -> str:
    """The small divisors of ``count``, for an error message."""
    return "one of " + ", ".join(str(number) for number in range(1, min(count, 64) + 1) if count % number == 0)
