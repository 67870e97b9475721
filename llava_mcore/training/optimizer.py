"""What is trained and how fast: freezing, learning rates by module, AdamW over the distributed optimizer, the schedule."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import nn

from llava_mcore.models.config import DTYPES
from llava_mcore.models.llava import ModelParts
from llava_mcore.parallel.groups import Groups
from llava_mcore.settings.compose import SettingsError
from llava_mcore.settings.derive import Derived
from llava_mcore.settings.schema import ParallelSettings, TrainSettings

LAYER_NUMBER = r"(?<=language_model\.decoder\.layers\.)\d+"
MODULES = ("vision_tower", "projector", "language_model")


def global_parameters(model: ModelParts) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of this rank under the names they have in the whole model, as one process would see them.

    A pipeline stage numbers its layers from zero; here they have their place in the whole decoder. A tied head on the last
    stage goes by the name of the embedding it is a copy of.
    """
    for part in model:
        layers = part.language_model.decoder.layers
        first = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in part.named_parameters():
            if layer := re.search(LAYER_NUMBER, name):
                name = f"{name[: layer.start()]}{int(layer[0]) + first}{name[layer.end() :]}"
            if part.share_embeddings_and_output_weights and name == "language_model.output_layer.weight":
                name = "language_model.embedding.word_embeddings.weight"
            yield name, parameter


def freeze(model: ModelParts, patterns: list[str], groups: Groups) -> None:
    """Turns gradients off for what ``patterns`` name; collective over the ranks of a model replica.

    Args:
        model: the parts of the model this rank holds.
        patterns: module names (``vision_tower``, ``projector``, ``language_model``) or regular expressions that are searched in
            the global parameter names.
        groups: process groups.

    Raises:
        SettingsError: for a pattern that is no regular expression or matches nothing anywhere, and if nothing is left to train.
    """
    try:
        expressions = {pattern: re.compile(rf"^{pattern}\." if pattern in MODULES else pattern) for pattern in patterns}
    except re.error as error:
        raise SettingsError([f"train.freeze: {error.pattern!r} is not a regular expression: {error}"]) from error
    matched: set[str] = set()
    trained = 0
    names = []
    for name, parameter in global_parameters(model):
        hits = {pattern for pattern, expression in expressions.items() if expression.search(name)}
        parameter.requires_grad_(not hits)
        matched |= hits
        trained += not hits
        names.append(name)
    everywhere: list[tuple[set[str], int, list[str]]] = [None] * groups.replica.size()  # type: ignore[list-item]
    dist.all_gather_object(everywhere, (matched, trained, names), group=groups.replica)
    unmatched = set(patterns).difference(*(found for found, _, _ in everywhere))
    if unmatched:
        example = next(name for _, _, names in everywhere for name in names)
        raise SettingsError(
            f"train.freeze: {pattern!r} matches no parameter; use {', '.join(MODULES)} or a regular expression over names such "
            f"as {example}"
            for pattern in sorted(unmatched)
        )
    if not sum(count for _, count, _ in everywhere):
        raise SettingsError([f"train.freeze={patterns} leaves nothing to train"])


def build_optimizer(
    model: Sequence[DistributedDataParallel], train: TrainSettings, parallel: ParallelSettings, derived: Derived, groups: Groups
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW and its schedule: linear warmup from zero to the peak, then cosine, linear or constant."""
    lowest = train.min_lr_ratio
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.lr * lowest,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=train.dtype == "bfloat16",
        params_dtype=DTYPES[train.dtype],
        use_distributed_optimizer=True,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_recipe=model[0].config.fp8_recipe if model[0].config.fp8 else None,
    )
    undecayed = ParamWithNamePredicate("bias_or_norm", lambda parameter, name: parameter.dim() == 1 or name.endswith(".bias"))
    overrides = {ParamKey(with_name_predicate=undecayed): {"wd_mult": 0.0}}
    for module, lr in train.module_lr.items():
        overrides[ParamKey(name=f"module.{module}.*")] = {"max_lr": lr, "min_lr": lr * lowest}
    optimizer = get_megatron_optimizer(config, list(model), overrides, use_gloo_process_groups=False, pg_collection=groups.mcore)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.lr * lowest,
        # Megatron-Core wants at least one step after the warmup.
        lr_warmup_steps=min(derived.warmup_steps, derived.steps - 1),
        lr_decay_steps=derived.steps,
        lr_decay_style=train.schedule,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=derived.steps,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def learning_rates(optimizer: MegatronOptimizer, train: TrainSettings) -> float | dict[str, float]:
    """The learning rate of the coming step, or one for each module where they differ."""
    by_peak = {group["max_lr"]: group["lr"] for group in optimizer.param_groups}
    if not train.module_lr:
        return by_peak.get(train.lr, next(iter(by_peak.values()), 0.0))
    peaks: dict[str, float] = dict.fromkeys(MODULES, train.lr)
    peaks |= {str(module): lr for module, lr in train.module_lr.items()}
    return {module: by_peak[peak] for module, peak in peaks.items() if peak in by_peak}


def whole_numel(parameter: nn.Parameter, groups: Groups) -> int:
    """Elements of a parameter over its expert-parallel ranks, which each hold as many experts."""
    is_expert = not getattr(parameter, "allreduce", True)
    return parameter.numel() * (groups.ep.size() if is_expert else 1)


def trained_parameters(model: ModelParts, groups: Groups) -> tuple[int, int]:
    """Parameters of the whole model that are trained, and all of them, each counted once; collective over a model replica."""
    own = [
        parameter
        for parameter in model.parameters()
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, groups.tp)
    ]
    sizes = [(whole_numel(parameter, groups), parameter.requires_grad) for parameter in own]
    counts = torch.tensor([sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)])
    everywhere: list[torch.Tensor] = [None] * groups.mcore.mp.size()  # type: ignore[list-item]
    dist.all_gather_object(everywhere, counts, group=groups.mcore.mp)
    trained, total = torch.stack(everywhere).sum(dim=0).tolist()
    return trained, total
