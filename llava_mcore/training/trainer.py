"""THE loop: settings in, a trained model out, on any layout and any device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from llava_mcore.data.loader import Batch, Step, StreamLoader
from llava_mcore.data.shards import ShardDataset
from llava_mcore.data.tokenizer import load_tokenizer
from llava_mcore.models.initialize import initialize
from llava_mcore.models.llava import LlavaModel
from llava_mcore.parallel import groups as process_groups
from llava_mcore.parallel.broadcast import share_steps
from llava_mcore.platform import device
from llava_mcore.settings.compose import SettingsError, dump_yaml
from llava_mcore.settings.derive import derive
from llava_mcore.settings.schema import Settings, layout_problems
from llava_mcore.training import checkpoint_folder
from llava_mcore.training.checkpoint import Checkpointer, load_model, sharding_metadata
from llava_mcore.training.observe import Observer, StepRecord
from llava_mcore.training.observe.flops import FlopsCounter
from llava_mcore.training.optimizer import build_optimizer, distribute, freeze, learning_rates, trained_parameters


def forward_step(batches: Iterator[Batch], model: torch.nn.Module, *, device: torch.device) -> tuple[Tensor, Any]:
    """One micro-batch forward, in the form Megatron-Core's schedules call: the output, and the function that makes it a loss.

    The loss is the sum over tokens; the schedule divides the gradients by the token count of all ranks and micro-batches, so
    that uneven masks change nothing.
    """
    batch = next(batches)
    loss_T = model(
        batch.input_ids_T.to(device, non_blocking=True),
        batch.position_ids_T.to(device, non_blocking=True),
        batch.sample_lengths,
        batch.pixel_values_NCHW.to(device, non_blocking=True),
        batch.image_index_E.to(device, non_blocking=True),
        batch.labels_T.to(device, non_blocking=True),
    )
    return loss_T, partial(_sum_loss, batch.loss_tokens)


def _sum_loss(tokens: int, loss_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss summed over tokens, token count, and the sum once more for the log."""
    total = loss_T.sum()
    return total, torch.tensor(tokens, dtype=torch.int, device=total.device), total.detach()


class Trainer:
    """Builds everything a run needs and runs it.

    Args:
        settings: the composed settings.

    Raises:
        SettingsError: the layout does not fit the model or the number of processes, on every rank and before any group is made.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        train, parallel, model = settings.train, settings.parallel, settings.model
        if problems := _startup_problems(settings):
            raise SettingsError(problems)
        self.place = device.start(parallel.timeout_minutes)
        self.say(self.place.description)
        self.groups = process_groups.build(parallel, train.seed)
        self.dataset, self.tokenizer = ShardDataset(settings.data.path), load_tokenizer(settings.data.tokenizer)
        self.derived = derive(settings, len(self.dataset), self.place.world_size)
        self.last_step = min(self.derived.steps, train.stop_after or self.derived.steps)

        self.checkpointer = Checkpointer(settings, self.groups, self.place.is_first)
        self.resumed_from = self.checkpointer.latest() if train.resume else None
        self.model = LlavaModel(model, parallel, train.dtype, self.groups).to(self.place.device)
        if self.resumed_from is None:
            self._first_weights()
        freeze(self.model, train.freeze, self.groups)
        self.ddp = distribute(self.model, train, parallel, self.groups)
        self.optimizer, self.scheduler = build_optimizer(self.ddp, train, parallel, self.derived, self.groups)
        self._connect_schedules()

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
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.forward_backward(
            forward_step_func=partial(forward_step, device=self.place.device),
            data_iterator=iter(step.batches),
            model=self.ddp,
            num_microbatches=len(step.batches),
            seq_length=self.settings.data.sequence_length * self.settings.train.micro_batch_size,
            micro_batch_size=1,
            p2p_communicator=P2PCommunicator(self.groups.pp, self.ddp.config),
            pg_collection=self.groups.mcore,
        )
        loss = self._mean_loss(losses, step)
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        return loss, float(grad_norm or 0.0)

    def save(self) -> None:
        """Publishes a checkpoint of the current step."""
        started = time.perf_counter()
        position = {**self.loader.state_dict(self.step), "bad_samples": self.bad_samples}
        if self.settings.parallel.overlap_param_gather:
            self.ddp.disable_forward_pre_hook(param_sync=True)  # the last update is gathered before it is saved
            self.ddp.enable_forward_pre_hook()
        path = self.checkpointer.save(self.step, self.model, self.optimizer, position, self._write_sidecars)
        self.say(f"saved {path} in {time.perf_counter() - started:.1f} s")

    def say(self, text: str) -> None:
        """Prints on the first rank."""
        if self.place.is_first:
            print(text, flush=True)

    # ---- what happens once ----

    def _first_weights(self) -> None:
        """Random weights, or those of ``train.init_from``."""
        source = self.settings.train.init_from
        if source is None:
            initialize(self.model, self.settings.train.seed, sharding_metadata(self.groups))
            return
        load_model(_as_checkpoint(source, self.settings, self.place.is_first), self.model, self.groups)
        self.say(f"weights from {source}")

    def _resume(self, path: Path) -> None:
        meta = self.checkpointer.load(path, self.model, self.optimizer)
        self.loader.check_state(meta["data_position"])
        self.step, self.bad_samples = meta["step"], meta["data_position"]["bad_samples"]
        self.loader = self._loader(self.step)
        self.scheduler.step(self.step)
        self.say(f"resumed from {path}, step {self.step}")

    def _connect_schedules(self) -> None:
        """Tells Megatron-Core's schedules when to reduce gradients and gather parameters."""
        config, parallel = self.ddp.config, self.settings.parallel
        config.finalize_model_grads_func = finalize_model_grads
        if parallel.overlap_grad_reduce:
            config.no_sync_func = self.ddp.no_sync
        self.forward_backward = get_forward_backward_func(parallel.pipeline, None)

    def _loader(self, start_step: int) -> StreamLoader:
        train = self.settings.train
        return StreamLoader(
            self.dataset,
            self.tokenizer,
            self.settings.data,
            self.settings.model.vision,
            self.settings.model.image_token_id,
            rank=self.groups.dp.rank(),
            size=self.groups.dp.size(),
            seed=train.seed,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            total_samples=self.derived.total_samples,
            start_step=start_step,
        )

    def _source(self) -> Iterator[Step] | None:
        """The steps, on the rank of this replica that reads them."""
        return iter(self.loader) if self.groups.replica.rank() == 0 else None

    def _describe(self) -> None:
        trained, total = trained_parameters(self.model, self.groups)
        parallel, derived = self.settings.parallel, self.derived
        self.say(
            f"layout: tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {derived.data_parallel}"
            f"{' with sequence parallelism' if parallel.sequence_parallel else ''}; {trained:,} of {total:,} parameters trained; "
            f"{derived.steps} steps ({derived.warmup_steps} warmup) over {derived.num_samples:,} samples"
        )
        if self.place.is_first:
            output = Path(self.settings.train.output_dir)
            output.mkdir(parents=True, exist_ok=True)
            (output / checkpoint_folder.SETTINGS).write_text(dump_yaml(self.settings), encoding="utf-8")

    def _write_sidecars(self, folder: Path) -> None:
        """Tokenizer of the run, and what the weights' source left for Hugging Face."""
        source = self.resumed_from or self.settings.train.init_from
        if source is not None and (Path(source) / checkpoint_folder.META).is_file():
            checkpoint_folder.copy_sidecars(source, folder)
        shutil.rmtree(folder / checkpoint_folder.TOKENIZER, ignore_errors=True)
        self.tokenizer.save(folder / checkpoint_folder.TOKENIZER)

    # ---- what happens every step ----

    def _mean_loss(self, losses: list[Tensor], step: Step) -> float:
        """Mean loss per predicted token over all ranks; counts bad samples and stops every rank together if they are too many."""
        counts = torch.zeros(3, dtype=torch.float64, device=self.place.device)
        if self.groups.is_last_stage and self.groups.tp.rank() == 0:
            counts[0] = sum(loss.double() for loss in losses)
            counts[1] = sum(batch.loss_tokens for batch in step.batches)
        if self.groups.replica.rank() == 0:
            counts[2] = len(step.bad)
        dist.all_reduce(counts)
        loss_sum, tokens, bad = counts.tolist()
        if bad:
            self._account_bad(step.bad if self.groups.replica.rank() == 0 else [])
        mean = loss_sum / max(tokens, 1.0)
        if mean != mean or mean in (float("inf"), float("-inf")):
            raise FloatingPointError(
                f"the loss of step {step.index + 1} is {mean}; lower train.lr or look at its samples (the checkpoint before is intact)"
            )
        return mean

    def _account_bad(self, names: list[str]) -> None:
        """Names the step's bad samples on the first rank and in a file; raises everywhere when the budget is spent."""
        gathered: list[list[str]] = [[] for _ in range(self.place.world_size)]
        dist.all_gather_object(gathered, names)
        found = [name for part in gathered for name in part]
        self.bad_samples += len(found)
        if self.place.is_first:
            with (Path(self.settings.train.output_dir) / "bad_samples.txt").open("a", encoding="utf-8") as file:
                for name in found:
                    file.write(f"step {self.step + 1}: {name}\n")
                    print(f"skipped sample: {name}", file=sys.stderr, flush=True)
        if self.bad_samples > self.settings.data.max_bad_samples:
            raise RuntimeError(
                f"{self.bad_samples} bad samples are more than data.max_bad_samples={self.settings.data.max_bad_samples}; the last: "
                f"{found[-1]}. All are in {self.settings.train.output_dir}/bad_samples.txt; run tools/prepare_data.py lint, or raise it"
            )

    def _record(
        self, step: Step, loss: float, lr: float | dict[str, float], grad_norm: float, seconds: float
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
            bad_samples=self.bad_samples,
            flops=self.flops.step(step.sample_lengths, step.pictures),
        )


def _startup_problems(settings: Settings) -> list[str]:
    """What can be seen to be wrong before any process group is made."""
    problems = layout_problems(settings, int(os.environ.get("WORLD_SIZE", 1)))
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


def _as_checkpoint(source: str, settings: Settings, is_first: bool) -> Path:
    """``source`` as a checkpoint of this project; a Hugging Face folder is converted once, into ``output_dir``."""
    path = Path(source)
    if (path / checkpoint_folder.META).is_file() or not checkpoint_folder.is_hf(path):
        return path
    imported = Path(settings.train.output_dir) / "imported"
    outcome: list[str | None] = [None]
    if is_first:
        # A process of its own: saving is collective over all processes, and this one is not alone.
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        command = [sys.executable, "-m", "llava_mcore.conversion", "import", str(path), str(imported), "--overwrite"]
        done = subprocess.run(command, env=alone, capture_output=True, text=True)
        outcome = [done.stderr.strip() if done.returncode else None]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise RuntimeError(f"train.init_from={source} could not be imported:\n{outcome[0]}")
    return imported


def _device_name(place: torch.device) -> str:
    return torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
