"""THE loop: settings in, a trained model out, on any layout and any device."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from llava_mcore.conversion.convert import load_hf_into, write_sidecars
from llava_mcore.data.loader import Step, StreamLoader
from llava_mcore.data.shards import ShardDataset
from llava_mcore.data.tokenizer import load_tokenizer
from llava_mcore.models.backend import problems_here
from llava_mcore.models.config import Recompute
from llava_mcore.models.initialize import initialize
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
from llava_mcore.training.engine import distribute, forward_backward
from llava_mcore.training.observe import Observer, StepRecord
from llava_mcore.training.observe.flops import FlopsCounter
from llava_mcore.training.optimizer import build_optimizer, freeze, learning_rates, trained_parameters

BAD_SAMPLES = "bad_samples.txt"


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
        self.dataset, self.tokenizer = ShardDataset(settings.data.path or ""), load_tokenizer(settings.data.tokenizer or "")
        self.derived = derive(settings, len(self.dataset), self.place.world_size)
        self.last_step = min(self.derived.steps, train.stop_after or self.derived.steps)

        self.checkpointer = Checkpointer(settings, self.groups, self.place.is_first)
        self.resumed_from = self.checkpointer.latest() if train.resume else None
        recompute = Recompute.of(train)
        self.model = build_model(settings.model, parallel, train.dtype, self.groups, recompute, settings.precision)
        self.model.to(self.place.device)
        if self.resumed_from is None:
            self._first_weights()
        freeze(self.model, train.freeze, self.groups)
        self.ddp = distribute(self.model, parallel, self.groups)
        self.optimizer, self.scheduler = build_optimizer(self.ddp, train, parallel, self.derived, self.groups)

        self.step, self.bad_samples = 0, 0
        self.loader = self._loader(0)
        if self.resumed_from is not None:
            self._resume(self.resumed_from)
        self.flops = FlopsCounter(settings)
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
                lr = learning_rates(self.optimizer, train)
                loss, grad_norm = self.train_step(step)
                self.step += 1
                observer.log(self._record(step, loss, lr, grad_norm, time.perf_counter() - started))
                if (train.save_every and self.step % train.save_every == 0) or self.step == self.last_step:
                    self.save()
        finally:
            steps.close()
            observer.close()

    def train_step(self, step: Step) -> tuple[float, float]:
        """Forward, backward and update over one global batch; returns the mean loss per token and the gradient norm."""
        for part in self.ddp:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = forward_backward(self.ddp, step.batches, self.groups, self.place.device)
        loss = self._mean_loss(losses, step)
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        return loss, float(grad_norm or 0.0)

    def save(self) -> None:
        """Publishes a checkpoint of the current step."""
        started = time.perf_counter()
        position = {**self.loader.state_dict(self.step), "bad_samples": self.bad_samples}
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
        if checkpoint_folder.is_hf(source):
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
        self.loader.check_state(meta["data_position"])
        self.step, self.bad_samples = meta["step"], meta["data_position"]["bad_samples"]
        self.loader = self._loader(self.step)
        self.scheduler.step(self.step)
        self.say(f"resumed from {path}, step {self.step}")

    def _loader(self, start_step: int) -> StreamLoader:
        train, parallel = self.settings.train, self.settings.parallel
        return StreamLoader(
            self.dataset,
            self.tokenizer,
            self.settings.data,
            self.settings.model.vision,
            self.settings.model.image_token_id,
            embeddings_at=self.settings.model.embeddings_at,
            rank=self.groups.dp.rank(),
            size=self.groups.dp.size(),
            seed=train.seed,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            # An interleaved pipeline runs micro-batches in rounds of as many as it has stages.
            batches_multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
            total_samples=self.derived.total_samples,
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

    def _mean_loss(self, losses: list[Tensor], step: Step) -> float:
        """Mean loss per predicted token over all ranks; counts bad samples and stops every rank together if they are too many."""
        counts = torch.zeros(3, dtype=torch.float64, device=self.place.device)
        if self.groups.is_last_stage and self.groups.tp.rank() == 0:
            counts[0] = sum(loss.double() for loss in losses)
            counts[1] = sum(batch.loss_tokens for batch in step.batches) if self.groups.cp.rank() == 0 else 0
        if self.groups.replica.rank() == 0:
            counts[2] = len(step.bad)
        dist.all_reduce(counts)
        loss_sum, tokens, bad = counts.tolist()
        if bad:
            self._account_bad(step.bad if self.groups.replica.rank() == 0 else [])
        mean = loss_sum / max(tokens, 1.0)
        if mean != mean or mean in (float("inf"), float("-inf")):
            raise TrainingError(
                f"the loss of step {step.index + 1} is {mean}; lower train.lr, or look at its samples; checkpoints are intact"
            )
        return mean

    def _account_bad(self, names: list[str]) -> None:
        """Names the step's bad samples on the first rank and in a file; raises everywhere when the budget is spent."""
        gathered: list[list[str]] = [[] for _ in range(self.place.world_size)]
        dist.all_gather_object(gathered, names)
        found = [name for part in gathered for name in part]
        self.bad_samples += len(found)
        listed = Path(self.settings.train.output_dir) / BAD_SAMPLES
        if self.place.is_first:
            with listed.open("a", encoding="utf-8") as file:
                for name in found:
                    file.write(f"step {self.step + 1}: {name}\n")
                    print(f"skipped sample: {name}", file=sys.stderr, flush=True)
        if self.bad_samples > self.settings.data.max_bad_samples:
            limit = self.settings.data.max_bad_samples
            raise TrainingError(
                f"{self.bad_samples} bad samples are more than data.max_bad_samples={limit}; the last: {found[-1]}. All are in "
                f"{listed}; look at them with tools/prepare_data.py lint, or raise the limit"
            )

    def _record(self, step: Step, loss: float, lr: float | dict[str, float], grad_norm: float, seconds: float) -> StepRecord:
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
            bad_samples=self.bad_samples,
            flops=self.flops.step(step.sample_lengths, step.pictures),
            encoder_imbalance=self._encoder_imbalance(step),
        )

    def _encoder_imbalance(self, step: Step) -> float | None:
        """How unevenly the pictures of this replica's micro-batches fell on the ranks that encode them."""
        size = self.groups.encoders.size()
        if size == 1 or self.settings.parallel.encoder != "data_parallel":
            return None
        pictures = [len(batch.pixel_values_NCHW) for batch in step.batches]
        # The longest share of each micro-batch is what its other ranks wait for.
        longest = sum(imbalance([1.0] * count, size) * count for count in pictures)
        return longest / sum(pictures) if sum(pictures) else None


def _startup_problems(settings: Settings) -> list[str]:
    """What can be seen to be wrong before any process group is made."""
    problems = layout_problems(settings, device.world_size()) + problems_here(settings)
    for name in ("path", "tokenizer"):
        value = getattr(settings.data, name)
        if value is None:
            problems.append(f"data.{name} is not set")
        elif not Path(value).exists():
            problems.append(f"data.{name}={value}: no such file or folder")
    source = settings.train.init_from
    if source is not None and not Path(source).exists():
        problems.append(f"train.init_from={source}: no such folder")
    return problems


def _device_name(place: torch.device) -> str:
    return torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
