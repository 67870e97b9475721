"""What a run would do, found out without a GPU: layout, parameters, memory, batch arithmetic, and the first batch decoded.

    python -m llava_mcore.train experiment=finetune_llava_7b data.path=... data.tokenizer=... --dry-run

Nothing of the model is built, so a 13B layout for 64 ranks is checked on a laptop. The exit code says whether all is well.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, cast

from llava_mcore.geometry import SINGLE
from llava_mcore.parallel.sequence import padded_tokens, stream_multiple
from llava_mcore.settings.compose import SettingsError
from llava_mcore.settings.derive import Derived, derive
from llava_mcore.settings.layouts import layout_problems
from llava_mcore.settings.schema import ModelSettings, Settings
from llava_mcore.training import checkpoint_folder, pipeline_split
from llava_mcore.training.observe.flops import (
    MODULES,
    FlopsCounter,
    language_layer_parameters,
    parameter_counts,
    trained_modules,
    vision_embedding_parameters,
    vision_layer_parameters,
)

GIB = 2**30
SAMPLES_SHOWN = 20
TEXT_SHOWN = 300
# Bytes a trained parameter costs besides its weight: gradients are summed in float32; Adam keeps two float32 moments, and a
# float32 copy of the weights where these are bfloat16.
GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"float32": 8, "bfloat16": 12}
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one pipeline stage holds; parameters are those of one of its ranks, tensor-parallel parts counted once."""

    index: int
    holds: str
    parameters: dict[str, int]
    """By module, on one rank."""
    trained: dict[str, int]
    """Of these, the ones that learn."""
    experts: int = 0
    """Of the decoder's, those of experts."""

    def memory(self, settings: Settings, data_parallel: int) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer state on one rank."""
        dtype, trained = settings.train.dtype, sum(self.trained.values())
        experts = self.experts if "language_model" in self.trained else 0
        # The distributed optimizer is always on, and spreads over context-parallel ranks as well; that of an expert over the
        # ranks that hold it.
        ranks = data_parallel * settings.parallel.context
        shared = (trained - experts) / ranks + experts / max(1, ranks // settings.parallel.expert)
        return {
            "weights": sum(self.parameters.values()) * WEIGHT_BYTES[dtype],
            "gradients": trained * GRADIENT_BYTES,
            "optimizer": math.ceil(shared * OPTIMIZER_BYTES[dtype]),
        }


def stages(settings: Settings) -> list[Stage]:
    """The pipeline stages of a layout: the first holds tower, projector and embedding, the last the final norm and the head."""
    model, parallel = settings.model, settings.parallel
    tensor, encoder_tensor = parallel.tensor, parallel.tensor if parallel.encoder == "tensor_parallel" else 1
    trained = trained_modules(settings)
    layer = language_layer_parameters(model)
    matrix = model.language.padded_vocab_size * model.language.hidden_size // tensor
    found = []
    for index, stage in enumerate(pipeline_split.stages(settings)):
        is_first, is_last = index == 0, index == parallel.pipeline - 1
        experts = sum(stage.layers) * (layer.experts // tensor // parallel.expert)
        decoder = sum(stage.layers) * (layer.split // tensor + layer.whole) + experts
        holds = []
        parameters = {}
        if is_first:
            parameters["vision_tower"] = _tower_parameters(model, encoder_tensor)
            parameters["projector"] = _projector_parameters(model, encoder_tensor)
            holds += [f"vision tower ({model.vision.used_layers} layers)", "projector", "embedding"]
            decoder += matrix
        holds.append(f"{' + '.join(map(str, stage.layers))} decoder layers")
        if is_last:
            holds += ["final norm", "head (the embedding's weights)" if model.language.tie_word_embeddings else "head"]
            decoder += model.language.hidden_size
            if not (model.language.tie_word_embeddings and is_first):  # tied, the last of several stages keeps a copy
                decoder += matrix
        parameters["language_model"] = decoder
        learning = {name: count for name, count in parameters.items() if name in trained}
        found.append(Stage(index=index, holds=", ".join(holds), parameters=parameters, trained=learning, experts=experts))
    return found


def _tower_parameters(model: ModelSettings, tensor: int) -> int:
    """The embeddings stand whole on every rank, the layers are split."""
    split, whole = vision_layer_parameters(model)
    return vision_embedding_parameters(model) + model.vision.used_layers * (split // tensor + whole)


def _projector_parameters(model: ModelSettings, tensor: int) -> int:
    """Its first layer is split by columns, bias included; the second by rows, so its bias stands whole."""
    width = model.language.hidden_size
    first = width * (model.feature_size + 1) // tensor
    return first if model.projector.type == "linear" else first + width * width // tensor + width


def world_size_from_environment(settings: Settings) -> int:
    """Processes torchrun started, or without it those one replica of the model needs."""
    return int(os.environ.get("WORLD_SIZE", settings.parallel.least_ranks))


def report(settings: Settings, world_size: int | None = None) -> int:
    """Print what the run would be. Every part is shown that can be, whatever is wrong with another.

    Args:
        settings: the composed settings.
        world_size: processes (None: from torchrun's environment, else those one replica needs).

    Returns:
        0 if the run can start as it is, 1 if not, with every problem printed. Ranks but the first print nothing and return 0.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    if world_size is None:
        world_size = world_size_from_environment(settings)
    page = _Page()
    page.problems += layout_problems(settings, world_size)
    data_parallel = max(1, world_size // settings.parallel.model_ranks)
    _show_layout(page, settings, world_size, data_parallel)
    _show_memory(page, settings, data_parallel)
    _check_training(page, settings)
    blend, tokenizer = _open_data(page, settings)
    derived = _show_batch(page, settings, world_size, data_parallel, blend)
    if blend is not None:
        _show_first_batch(page, settings, data_parallel, blend, tokenizer, derived)
    page.finish()
    return 1 if page.problems else 0


@dataclass
class _Page:
    """Prints as it goes and remembers what was wrong."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def title(self, text: str) -> None:
        print(f"\n{text}")

    def row(self, name: str, value: object) -> None:
        print(f"  {name:<22} {value}", flush=True)

    def table(self, rows: list[list[str]]) -> None:
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
            print("  " + "  ".join([*cells, row[-1]]), flush=True)

    def finish(self) -> None:
        for warning in self.warnings:
            print(f"\nwarning: {warning}")
        if self.problems:
            print(f"\n{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}: the run cannot start like this")
            for problem in self.problems:
                print(f"  {problem}")
        else:
            print("\nall is well: the run can start")


def _show_layout(page: _Page, settings: Settings, world_size: int, data_parallel: int) -> None:
    parallel = settings.parallel
    page.title("layout")
    sizes = f"tensor {parallel.tensor} x context {parallel.context} x pipeline {parallel.pipeline} x data {data_parallel}"
    page.row("processes", f"{world_size} = {sizes}")
    if parallel.expert > 1:
        each = (settings.model.language.num_experts or 0) // parallel.expert
        page.row("experts", f"{each} of each layer on a rank, over {parallel.expert} data- and context-parallel ranks")
    page.row("sequence parallelism", "on" if parallel.sequence_parallel else "off")
    shards = data_parallel * parallel.context
    spread = f"spread over {shards} data- and context-parallel ranks" if shards > 1 else "whole on every rank"
    page.row("optimizer state", spread)
    for stage in stages(settings):
        page.row(f"stage {stage.index}", stage.holds)
    if parallel.pipeline > 1:
        print(pipeline_split.table(settings))
    counts, trained = parameter_counts(settings.model), trained_modules(settings)
    page.title("parameters of the model")
    rows = [["module", "parameters", ""]]
    rows += [[name, f"{counts[name]:,}", "trained" if name in trained else "frozen"] for name in MODULES]
    rows.append(["all", f"{sum(counts.values()):,}", f"{sum(counts[name] for name in trained):,} trained"])
    page.table(rows)
    expressions = [name for name in settings.train.freeze if name not in MODULES]
    if expressions:
        page.row("freeze", f"{', '.join(expressions)}: expressions over parameter names, not counted as frozen here")


def _show_memory(page: _Page, settings: Settings, data_parallel: int) -> None:
    page.title("memory of one rank (GiB)")
    rows = [["stage", "parameters", "trained", "weights", "gradients", "optimizer", "sum"]]
    for stage in stages(settings):
        memory = stage.memory(settings, data_parallel)
        sizes = [*memory.values(), sum(memory.values())]
        numbers = [f"{sum(stage.parameters.values()):,}", f"{sum(stage.trained.values()):,}"]
        rows.append([str(stage.index), *numbers, *(f"{size / GIB:.3g}" for size in sizes)])
    page.table(rows)
    print("  Not counted: activations and logits, communication buffers, fragmentation, the CUDA context (0.5 to 1 GiB).")


def _check_training(page: _Page, settings: Settings) -> None:
    """What would fail, or be for nothing, in the first minute."""
    train = settings.train
    for pattern in train.freeze:
        try:
            re.compile(pattern)
        except re.error as error:
            page.problems.append(f"train.freeze: {pattern!r} is not a regular expression: {error}")
    if not trained_modules(settings):
        page.problems.append("train.freeze: every module is frozen, nothing would be trained; take one out")
    if train.init_from is not None and not checkpoint_folder.is_hf(train.init_from):
        try:
            checkpoint_folder.require_checkpoint(train.init_from)
        except checkpoint_folder.CheckpointError as error:
            page.problems.append(f"train.init_from: {error}; name a checkpoint of this project or a Hugging Face folder")
    frozen = [name for name in MODULES if name in train.freeze and name != "projector"]
    if train.init_from is None and frozen:
        page.warnings.append(f"train.init_from is null, so {' and '.join(frozen)} would stay frozen at random weights")


def _open_data(page: _Page, settings: Settings) -> tuple[Any, Any]:
    """The order of the run's samples and the tokenizer, each None with the reason noted."""
    data = settings.data
    if data.tokenizer is None:
        page.problems.append(
            "data.tokenizer is not set, so the first batch was not tried; name a folder with tokenizer.json or tokenizer.model"
        )
    from llava_mcore.data.shards import ShardDataset
    from llava_mcore.data.sources import mixture_of, open_blend
    from llava_mcore.data.tokenizer import load_tokenizer

    tokenizer = None
    before = len(page.problems)
    try:
        if data.tokenizer is not None:
            tokenizer = load_tokenizer(data.tokenizer)
    except (ValueError, OSError) as error:
        page.problems.append(f"data.tokenizer={data.tokenizer}: {error}")
    try:
        sources = mixture_of(data)
    except ValueError as error:
        page.problems.append(f"{error}; tools/prepare_data.py shard writes such a folder")
        return None, tokenizer
    for source in sources:
        try:
            ShardDataset(source.path)
        except (ValueError, OSError) as error:
            page.problems.append(str(error))
    if tokenizer is None or len(page.problems) > before:
        return None, tokenizer
    try:
        return open_blend(data, tokenizer, settings.train.seed, settings.train.global_batch_size), tokenizer
    except (ValueError, OSError) as error:
        page.problems.append(str(error))
        return None, tokenizer


def _show_batch(page: _Page, settings: Settings, world_size: int, data_parallel: int, blend: Any) -> Derived | None:
    train = settings.train
    page.title("batch")
    page.row("samples a step", train.global_batch_size)
    page.row("stream", f"{settings.data.sequence_length} tokens, {train.micro_batch_size} a micro-batch")
    page.row("picture", _price(settings.model))
    if train.global_batch_size < data_parallel:
        page.warnings.append(
            f"train.global_batch_size {train.global_batch_size} is below the data-parallel size {data_parallel}: "
            "some ranks get padding only"
        )
    if blend is None and train.steps is None:
        page.row("steps", "unknown until data.path is set (train.epochs needs the number of samples)")
        return None
    try:
        derived = derive(settings, blend.epoch_samples if blend is not None else train.global_batch_size, world_size)
    except SettingsError as error:
        page.problems += [problem for problem in error.problems if problem not in page.problems]
        return None
    page.row("steps", f"{derived.steps}, of which {derived.warmup_steps} warm up")
    page.row("samples of the run", f"{derived.total_samples:,}")
    if blend is not None:
        page.row("samples of the data", f"{derived.num_samples:,} ({derived.total_samples / derived.num_samples:.3g} epochs)")
    return derived


def _show_first_batch(
    page: _Page, settings: Settings, data_parallel: int, blend: Any, tokenizer: Any, derived: Derived | None
) -> None:
    """Step 0 of the first data-parallel rank, through the loader the run would use."""
    train, data = settings.train, settings.data
    from llava_mcore.data.loader import StreamLoader
    from llava_mcore.data.plan import Planner

    rows = settings.model.language.vocab_size
    if tokenizer.vocab_size > rows:
        page.problems.append(
            f"model.language.vocab_size {rows} has no row for every one of the tokenizer's {tokenizer.vocab_size} pieces; "
            f"set model.language.vocab_size={tokenizer.vocab_size} or more"
        )
        return
    page.title("first batch (data-parallel rank 0)")
    try:
        planner = Planner(
            blend,
            data,
            settings.model.geometry,
            seed=train.seed,
            global_batch_size=train.global_batch_size,
            total_samples=derived.total_samples if derived else None,
            schedule=settings.model.geometry_at,
            max_positions=settings.model.language.max_position_embeddings,
        )
        loader = StreamLoader(
            planner,
            tokenizer,
            data,
            settings.model.image_token_id,
            rank=0,
            size=data_parallel,
            micro_batch_size=train.micro_batch_size,
            cost=FlopsCounter(settings).cost(),
        )
        with contextlib.closing(cast(Generator, iter(loader))) as steps:
            step = next(steps)
    except Exception as error:  # whatever the data does to the loader is what this page is there to say
        page.problems.append(f"the first batch cannot be made: {type(error).__name__}: {error}")
        return
    _describe_step(page, settings, tokenizer, step)


def _price(model: ModelSettings) -> str:
    """What a picture costs, or some pictures, where it depends on their sizes, and what it would without merging and pooling."""
    geometry = model.geometry
    if geometry.anyres is None:
        first, last, patches = model.geometry_at(0).embeddings(SINGLE), geometry.embeddings(SINGLE), geometry.side**2
        text = f"{last} tokens"
        if first != last and model.projector.token_merging is not None:
            text = f"{first} tokens at first, {last} from step {model.projector.token_merging.schedule_steps + 1} on"
        return text if last >= patches else f"{text}, of {patches} patches"
    sizes = ((336, 336), (1024, 768), (768, 1024), (1600, 400))
    prices = (f"{geometry.embeddings(geometry.picture(*size, False)):,} of {size[0]} x {size[1]}" for size in sizes)
    return f"tokens: {', '.join(prices)} pixels"


def _describe_step(page: _Page, settings: Settings, tokenizer: Any, step: Any) -> None:
    supervised = sum(batch.loss_tokens for batch in step.batches)
    page.row("samples", f"{step.samples} on all ranks, {len(step.bad)} bad among this rank's, {len(step.left_out)} left out")
    page.row("tokens", f"{step.real_tokens:,} in {step.slots:,} slots ({1 - step.real_tokens / max(step.slots, 1):.1%} padding)")
    if multiple := stream_multiple(settings.parallel, settings.precision):
        ranks, real = settings.parallel.context, sum(len(batch.input_ids_T) for batch in step.batches)
        padded = len(step.batches) * max(padded_tokens(batch.sample_lengths, ranks, multiple) for batch in step.batches)
        exchange = f"parallel.context_exchange={settings.parallel.context_exchange}"
        page.row("exchange padding", f"{padded - real:,} tokens beside {real:,} slots of this rank, for {exchange}")
    page.row("image embeddings", f"{step.visual_tokens:,} of those tokens, of {step.pictures:,} pictures, tiles and frames")
    page.row("micro-batches", f"{len(step.batches)} on this rank, {supervised:,} tokens predicted")
    # Other ranks' labels are not known here; they are taken to be as dense as this rank's.
    labelled = round(step.real_tokens * supervised / max(1, sum(batch.real_tokens for batch in step.batches)))
    page.row("model TFLOP", f"{FlopsCounter(settings).step(step.sample_lengths, step.pictures, labelled) / 1e12:.4g} a step")
    for what, samples in (("bad sample", step.bad), ("left out", step.left_out)):
        for sample in samples[:SAMPLES_SHOWN]:
            page.row(what, sample)
    if not step.samples:
        page.problems.append("no sample of the first step could be used; see tools/prepare_data.py lint")
        return
    batch = step.batches[0]
    length = batch.sample_lengths[0]
    ids, labels = batch.input_ids_T[:length].tolist(), batch.labels_T[:length].tolist()
    page.row("first sample", f"{length} tokens, of which {ids.count(settings.model.image_token_id)} of pictures")
    text = tokenizer.decode([token for token in ids if token != settings.model.image_token_id])
    target = tokenizer.decode([token for token in labels if token >= 0])
    page.row("  reads", repr(text[:TEXT_SHOWN]))
    page.row("  predicts", repr(target[:TEXT_SHOWN]))
    if supervised == 0 and step.samples:
        page.warnings.append("this rank predicts no token in the first step: check data.template against the conversations")
