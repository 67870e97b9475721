"""THE loop: settings in, a trained model out, on any layout and any device."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from llava_mcore.conversion.convert import load_hf_into, write_sidecars
from llava_mcore.data.decode import Decoder
from llava_mcore.data.errors import DatasetError
from llava_mcore.data.loader import Step, StreamLoader
from llava_mcore.data.plan import Planner
from llava_mcore.data.sources import mixture_of, open_blend
from llava_mcore.data.tokenizer import load_tokenizer
from llava_mcore.models.backend import blank_pictures, problems_here
from llava_mcore.models.config import Recompute
from llava_mcore.models.fp8_weights import unquantized
from llava_mcore.models.initialize import LEARNED_TOKENS, initialize
from llava_mcore.models.llava import build_model
from llava_mcore.parallel import groups as process_groups
from llava_mcore.parallel.broadcast import share_steps
from llava_mcore.parallel.encoder import imbalance
from llava_mcore.platform import device
from llava_mcore.settings.compose import SettingsError, dump_yaml
from llava_mcore.settings.derive import derive
from llava_mcore.settings.layouts import layout_problems
from llava_mcore.settings.schema import Settings
from llava_mcore.training import checkpoint_folder, pipeline_split
from llava_mcore.training.checkpoint import Checkpointer, load_model, model_state, sharding_metadata
from llava_mcore.training.data_state import DataState
from llava_mcore.training.engine import distribute, forward_backward, padded_tokens
from llava_mcore.training.observe import Observer, StepRecord
from llava_mcore.training.observe.flops import FlopsCounter
from llava_mcore.training.optimizer import build_optimizer, freeze, learning_rates, trained_parameters


class TrainingError(RuntimeError):
    """The run cannot go on; every rank raises it."""


class Trainer:
    """Builds everything a run needs and runs it.

    Args:
        settings: the composed settings.

    Raises:
        SettingsError: the layout does not fit the model or the number of processes, on every rank and before any group is made.
    """

    def __init__(self, settings: Settings) -> None:
        if problems := _startup_problems(settings):
            raise SettingsError(problems)
        self.settings = settings = pipeline_split.resolve(settings)
        train, parallel = settings.train, settings.parallel
        self.place = device.start(parallel.timeout_minutes)
        self.say(self.place.description)
        self.groups = process_groups.build(parallel, train.seed)
        self.tokenizer = load_tokenizer(settings.data.tokenizer or "")
        blend = open_blend(settings.data, self.tokenizer, train.seed, train.global_batch_size)
        self.derived = derive(settings, blend.epoch_samples, self.place.world_size)
        self.planner = Planner(
            blend,
            settings.data,
            settings.model.geometry,
            seed=train.seed,
            global_batch_size=train.global_batch_size,
            total_samples=self.derived.total_samples,
            schedule=settings.model.geometry_at,
            max_positions=settings.model.language.max_position_embeddings,
        )
        self.last_step = min(self.derived.steps, train.stop_after or self.derived.steps)

        self.checkpointer = Checkpointer(settings, self.groups, self.place.is_first)
        self.resumed_from = self.checkpointer.latest() if train.resume else None
        recompute = Recompute.of(train)
        if parallel.tp_comm_overlap:
            from llava_mcore.models.transformer_engine import reserve_user_buffers

            reserve_user_buffers(settings)
        self.model = build_model(settings.model, parallel, train.dtype, self.groups, recompute, settings.precision)
        self.model.to(self.place.device)
        if self.resumed_from is None:
            self._first_weights()
        freeze(self.model, train.freeze, self.groups)
        self.ddp = distribute(self.model, parallel, self.groups)
        self.optimizer, self.scheduler = build_optimizer(self.ddp, train, parallel, self.derived, self.groups)

        self.step, self.waited = 0, 0.0
        self.flops = FlopsCounter(settings)
        self.data = DataState(settings, self.planner, self.groups, self.place.is_first)
        if self.resumed_from is not None:
            self._resume(self.resumed_from)
        self.loader = self._loader(self.step)
        self._describe()

    def fit(self) -> None:
        """Runs to the last step and saves it."""
        train = self.settings.train
        observer = Observer(
            self.settings, self.place.is_first, self.place.world_size, _device_name(self.place.device), Path(train.output_dir)
        )
        steps = share_steps(self._source(), self.groups, self.place.device)
        try:
            while self.step < self.last_step:
                started = time.perf_counter()
                step = next(steps)
                self.waited = time.perf_counter() - started
                lr = learning_rates(self.optimizer, train)
                loss, labelled, grad_norm = self.train_step(step)
                self.step += 1
                observer.log(self._record(step, loss, labelled, lr, grad_norm, time.perf_counter() - started))
                if (train.save_every and self.step % train.save_every == 0) or self.step == self.last_step:
                    self.save()
        finally:
            steps.close()
            observer.close()

    def train_step(self, step: Step) -> tuple[float, int, float]:
        """Forward, backward and update over one global batch.

        Returns:
            the mean loss per token with a label, the number of those, and the gradient norm.
        """
        for part in self.ddp:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = forward_backward(self.ddp, step.batches, self.groups, self.place.device)
        loss, labelled = self._mean_loss(losses, step)
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        return loss, labelled, float(grad_norm or 0.0)

    def save(self) -> None:
        """Publishes a checkpoint of the current step."""
        started = time.perf_counter()
        position = self.data.state_dict(self.step)
        if self.settings.parallel.overlap_param_gather:
            for part in self.ddp:  # the last update is gathered before it is saved
                part.disable_forward_pre_hook(param_sync=True)
                part.enable_forward_pre_hook()
        path = self.checkpointer.save(self.step, self.model, self.optimizer, position, self._write_sidecars)
        self.say(f"saved {path} in {time.perf_counter() - started:.1f} s")

    def say(self, text: str) -> None:
        """Prints on the first rank."""
        if self.place.is_first:
            print(text, flush=True)

    # ---- what happens once ----

    def _first_weights(self) -> None:
        """Random weights, or those of ``train.init_from``."""
        source = self._init_from()
        if source is None:
            initialize(self.model, self.settings.train.seed, sharding_metadata(self.groups))
            return
        # What a source without tiles or clips has not learned.
        initialize(self.model, self.settings.train.seed, sharding_metadata(self.groups), only=LEARNED_TOKENS)
        if checkpoint_folder.is_hf(source):
            with unquantized(self.model):
                load_hf_into(model_state(self.model, self.groups), source)
        else:
            load_model(source, self.model, self.groups)
        self.say(f"weights from {source}")

    def _init_from(self) -> Path | None:
        """``train.init_from``; of the output folder of a run, its newest checkpoint."""
        source = self.settings.train.init_from
        return None if source is None else checkpoint_folder.newest(source) or Path(source)

    def _resume(self, path: Path) -> None:
        meta = self.checkpointer.load(path, self.model, self.optimizer)
        self.data.resume(meta["data_position"])
        self.step = meta["step"]
        self.scheduler.step(self.step)
        self.say(f"resumed from {path}, step {self.step}")

    def _loader(self, start_step: int) -> StreamLoader:
        train, parallel = self.settings.train, self.settings.parallel
        return StreamLoader(
            self.planner,
            self.tokenizer,
            self.settings.data,
            self.settings.model.image_token_id,
            rank=self.groups.dp.rank(),
            size=self.groups.dp.size(),
            micro_batch_size=train.micro_batch_size,
            # An interleaved pipeline runs micro-batches in rounds of as many as it has stages.
            batches_multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
            cost=self.flops.cost(),
            start_step=start_step,
        )

    def _source(self) -> Iterator[Step] | None:
        """The steps, on the rank of this replica that reads them."""
        return iter(self.loader) if self.groups.replica.rank() == 0 else None

    def _describe(self) -> None:
        trained, total = trained_parameters(self.model, self.groups)
        parallel, derived = self.settings.parallel, self.derived
        sequence = " with sequence parallelism" if parallel.sequence_parallel else ""
        self.say(
            f"layout: tensor {parallel.tensor} x context {parallel.context} x pipeline {parallel.pipeline} x data "
            f"{derived.data_parallel}{sequence}; {trained:,} of {total:,} parameters trained; {derived.steps} steps "
            f"({derived.warmup_steps} warmup) over {derived.num_samples:,} samples"
        )
        if parallel.pipeline > 1:
            self.say(pipeline_split.table(self.settings))
        if self.place.is_first:
            with Decoder.from_settings(self.settings.data, self.settings.model.geometry) as decoder:
                self.say(f"data: {self.planner.describe()}; {decoder.describe()}")
            output = Path(self.settings.train.output_dir)
            output.mkdir(parents=True, exist_ok=True)
            (output / checkpoint_folder.SETTINGS).write_text(dump_yaml(self.settings), encoding="utf-8")

    def _write_sidecars(self, folder: Path) -> None:
        """Tokenizer of the run, and what the weights' source left for Hugging Face."""
        source = self.resumed_from or self._init_from()
        if source is not None and checkpoint_folder.is_hf(source):
            write_sidecars(source, folder)
        elif source is not None:
            checkpoint_folder.copy_sidecars(source, folder)
        shutil.rmtree(folder / checkpoint_folder.TOKENIZER, ignore_errors=True)
        self.tokenizer.save(folder / checkpoint_folder.TOKENIZER)

    # ---- what happens every step ----

    def _mean_loss(self, losses: list[Tensor], step: Step) -> tuple[float, int]:
        """Mean loss over the tokens with a label of all ranks, and how many those are; books the step's samples and padding.

        The samples may stop every rank.
        """
        counts = torch.zeros(5, dtype=torch.float64, device=self.place.device)
        if self.groups.is_last_stage and self.groups.tp.rank() == 0:
            counts[0] = sum(loss.double() for loss in losses)
            counts[1] = sum(batch.loss_tokens for batch in step.batches) if self.groups.cp.rank() == 0 else 0
        if self.groups.replica.rank() == 0:
            counts[2], counts[3] = len(step.bad), self.waited / self.groups.dp.size()
            counts[4] = self._exchange_padding(step)
        dist.all_reduce(counts)
        loss_sum, tokens, bad, self.waited, padding = counts.tolist()
        step.slots += int(padding)
        self.data.finish(step, int(bad))
        mean = loss_sum / max(tokens, 1.0)
        if mean != mean or mean in (float("inf"), float("-inf")):
            raise TrainingError(
                f"the loss of step {step.index + 1} is {mean}; lower train.lr, or look at its samples; checkpoints are intact"
            )
        return mean, int(tokens)

    def _record(
        self, step: Step, loss: float, labelled: int, lr: float | dict[str, float], grad_norm: float, seconds: float
    ) -> StepRecord:
        return StepRecord(
            step=self.step,
            steps=self.derived.steps,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=step.real_tokens,
            slots=step.slots,
            seconds=seconds,
            samples=step.samples,
            pictures=step.pictures,
            visual_tokens=step.visual_tokens,
            bad_samples=self.data.bad_samples,
            waited=self.waited,
            flops=self.flops.step(step.sample_lengths, step.pictures, labelled),
            encoder_imbalance=self._encoder_imbalance(step),
            blank_pictures=self._blank_pictures(step),
        )

    def _exchange_padding(self, step: Step) -> int:
        """Tokens that Transformer Engine's exchange adds to this replica's micro-batches."""
        padded_to = padded_tokens(next(iter(self.model)), step.batches)
        return 0 if padded_to is None else sum(padded_to - len(batch.input_ids_T) for batch in step.batches)

    def _tiles(self, step: Step) -> list[int]:
        """Tiles and frames of each of this replica's micro-batches."""
        geometry = self.settings.model.geometry
        return [sum(map(geometry.tiles, batch.shapes)) for batch in step.batches]

    def _blank_pictures(self, step: Step) -> int | None:
        """Pictures that only fill up the rows of an FP8 tower's products, over the ranks of this replica."""
        if self.settings.precision.fp8 is None or "vision_tower" not in self.settings.precision.fp8_modules:
            return None
        size = self.groups.encoders.size() if self.settings.parallel.encoder == "data_parallel" else 1
        rows, multiple = self.settings.model.vision.positions, self.settings.precision.fp8_multiple
        return sum(blank_pictures(count, size, rows, multiple) for count in self._tiles(step))

    def _encoder_imbalance(self, step: Step) -> float | None:
        """How unevenly the tiles of this replica's micro-batches fell on the ranks that encode them."""
        size = self.groups.encoders.size()
        if size == 1 or self.settings.parallel.encoder != "data_parallel":
            return None
        tiles = self._tiles(step)
        # The longest share of each micro-batch is what its other ranks wait for.
        longest = sum(imbalance([1.0] * count, size) * count for count in tiles)
        return longest / sum(tiles) if sum(tiles) else None


def _startup_problems(settings: Settings) -> list[str]:
    """What can be seen to be wrong before any process group is made."""
    problems = layout_problems(settings, device.world_size()) + problems_here(settings)
    try:
        paths = [("data.path" if settings.data.path else "data.mixture", source.path) for source in mixture_of(settings.data)]
    except DatasetError as error:
        problems, paths = [*problems, str(error)], []
    if settings.data.tokenizer is None:
        problems.append("data.tokenizer is not set")
    else:
        paths.append(("data.tokenizer", settings.data.tokenizer))
    problems += [f"{name}={value}: no such file or folder" for name, value in paths if not Path(value).exists()]
    source = settings.train.init_from
    if source is not None and not Path(source).exists():
        problems.append(f"train.init_from={source}: no such folder")
    return problems


def _device_name(place: torch.device) -> str:
    return torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
