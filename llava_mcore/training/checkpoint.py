"""Distributed checkpoints: saved from any layout, loaded into any other, published atomically.

A checkpoint is written aside, synced and renamed; then ``latest`` is pointed at it. A kill at any instant leaves the one before.
What a folder holds is said in ``training.checkpoint_folder``.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException as WriteFailure

from llava_mcore.models.fp8_weights import give_values, unquantized
from llava_mcore.models.initialize import LEARNED_TOKENS
from llava_mcore.models.llava import ModelParts
from llava_mcore.models.vision import resized_positions
from llava_mcore.parallel.broadcast import from_first
from llava_mcore.parallel.groups import Groups
from llava_mcore.settings import compose
from llava_mcore.settings.schema import ModelSettings, Settings
from llava_mcore.training import checkpoint_folder as folder
from llava_mcore.training.checkpoint_folder import CheckpointError
from llava_mcore.training.optimizer import whole_numel

# Settings of the model that its weights do not depend on.
OF_TRAINING = ("model.init_std", "model.language.router_aux_loss")
POSITIONS = "vision_tower.position_embedding"


def sharding_metadata(groups: Groups) -> dict[str, Any]:
    """How Megatron-Core names and shards what it saves: layers by their own names, optimizer state reshardable to any layout."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,
        "dp_cp_group": groups.mcore.dp_cp,
    }


def model_state(model: ModelParts, groups: Groups) -> dict[str, dict[str, Any]]:
    """The sharded weights of each part, without what layers keep beside them for FP8 (:func:`scaling_state`)."""
    return _states(model, groups, extra=False)


def scaling_state(model: ModelParts, groups: Groups) -> dict[str, dict[str, Any]]:
    """What Transformer Engine's layers keep from step to step: the scales of delayed scaling, and what they follow from."""
    return _states(model, groups, extra=True)


def _states(model: ModelParts, groups: Groups, extra: bool) -> dict[str, dict[str, Any]]:
    states = {}
    for number, part in enumerate(model):
        state = part.sharded_state_dict(metadata=sharding_metadata(groups))
        states[f"part{number}"] = {name: shard for name, shard in state.items() if name.endswith("_extra_state") == extra}
    if groups.tower.tp is not groups.tp:
        # The encoder is whole on each tensor-parallel rank, of which Megatron-Core knows nothing: one of the copies is saved.
        for name, shard in ((name, shard) for state in states.values() for name, shard in state.items()):
            if name.startswith(("vision_tower.", "projector.")) and isinstance(shard, ShardedBase):
                shard.replica_id = (shard.replica_id[0], groups.tp.rank(), shard.replica_id[2])
    return states


def load_model(path: str | Path, model: ModelParts, groups: Groups) -> None:
    """Fills ``model`` with the weights of a checkpoint of any layout; collective.

    The pictures may be of another size than the checkpoint's (the position table of the tower is then interpolated), and become
    embeddings in another way; a learned token that the checkpoint lacks keeps the value it has.

    Raises:
        CheckpointError: the folder is incomplete or belongs to another model (naming every setting that differs).
    """
    path = folder.require_checkpoint(path)
    stored = folder.read_model_settings(path)
    require_same_model(path, model.settings, but_for=_not_of_weights(stored, model.settings))
    states, positions = model_state(model, groups), stored.vision.positions
    held = {"newline": stored.geometry.has_newline, "faster": stored.geometry.has_faster, "time_gate": stored.geometry.has_time}
    for state in states.values():
        for name in (LEARNED_TOKENS + token for token, there in held.items() if not there):
            state.pop(name, None)
        if (table := state.get(POSITIONS)) is not None and table.global_shape[0] != positions:
            other = table.data.new_empty(positions, table.global_shape[1])
            state[POSITIONS] = ShardedTensor.from_rank_offsets(table.key, other, replica_id=table.replica_id)
    loaded = dist_checkpointing.load({"model": states}, str(path / folder.WEIGHTS))
    vision = model.settings.vision
    for state in loaded["model"].values():
        if POSITIONS in state:
            state[POSITIONS] = resized_positions(state[POSITIONS], vision.positions, vision.class_token)
    _put_weights(model, loaded["model"])


def _put_weights(model: ModelParts, states: dict[str, dict[str, Any]]) -> None:
    with unquantized(model):
        for part, state in zip(model, states.values(), strict=True):
            part.load_state_dict(state, strict=False)  # extra states are not always there


def _not_of_weights(theirs: ModelSettings, ours: ModelSettings) -> tuple[str, ...]:
    """Settings that may differ between a checkpoint and the model its weights are for."""
    ways = ("model.anyres", "model.video", "model.vision.token_merging", "model.projector.token_merging")
    names = ("model.vision.image_size", *ways)
    return (*names, "model.projector.pooling") if theirs.feature_size == ours.feature_size else names


def require_same_model(path: Path, model: ModelSettings, but_for: tuple[str, ...] = ()) -> None:
    """Refuses a checkpoint whose tensors cannot be this model's, for another reason than the settings ``but_for``."""
    # A part that one of them has and the other has not is told with all its settings.
    absent: dict[str, Any] = defaultdict(lambda: None)
    theirs, ours = (absent | _flat("model", asdict(settings)) for settings in (folder.read_model_settings(path), model))
    differing = [
        f"{name}: {theirs[name]!r} in the checkpoint, {ours[name]!r} here"
        for name in sorted(ours.keys() | theirs.keys())
        if not f"{name}.".startswith(tuple(f"{left_out}." for left_out in (*OF_TRAINING, *but_for)))
        and theirs[name] != ours[name]
    ]
    if differing:
        raise CheckpointError(f"{path} is a checkpoint of another model: " + "; ".join(differing))


def _flat(path: str, value: Any) -> dict[str, Any]:
    """Nested settings as dotted paths."""
    if not isinstance(value, dict):
        return {path: value}
    return {name: leaf for key, inner in value.items() for name, leaf in _flat(f"{path}.{key}", inner).items()}


def delayed_scaling(precision: dict[str, Any]) -> bool:
    """Whether FP8 numbers are scaled by what earlier steps had, of settings ``precision``."""
    return precision.get("fp8") is not None and precision.get("fp8_recipe") == "delayed"


class Checkpointer:
    """Saves and resumes a run.

    Args:
        settings: the composed settings; they are stored in every checkpoint and rebuild the run.
        groups: process groups.
        is_first: whether this rank writes what is written once.
    """

    def __init__(self, settings: Settings, groups: Groups, is_first: bool) -> None:
        self.settings, self.groups, self.is_first = settings, groups, is_first
        self.root = Path(settings.train.output_dir) / folder.CHECKPOINTS

    def latest(self) -> Path | None:
        """The newest complete checkpoint of the run, or None."""
        return folder.newest(self.settings.train.output_dir)

    def save(
        self,
        step: int,
        model: ModelParts,
        optimizer: MegatronOptimizer,
        data_position: dict[str, Any],
        write_sidecars: Callable[[Path], None],
    ) -> Path:
        """Writes the checkpoint of ``step``; collective. Older ones beyond ``keep_checkpoints`` go afterwards.

        Args:
            step: optimizer steps done.
            model: the parts of the model, not wrapped.
            optimizer: its optimizer.
            data_position: where the data stands (of the loader, the same on every rank).
            write_sidecars: puts the tokenizer and what else travels along into a folder; called on the first rank.

        Raises:
            CheckpointError: on every rank, if the disk has no room or cannot be written to; earlier checkpoints stay as they are.
        """
        final = self.root / f"step_{step:08d}"
        partial = self.root / f".step_{step:08d}.partial"
        state = self._state(model, optimizer, is_loading=False)
        give_values(state["model"], state["optimizer"])
        self._require_room(model)
        if self.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / folder.WEIGHTS).mkdir(parents=True)
        dist.barrier()
        self._write_weights(state, partial)
        problem = None
        if self.is_first:
            try:
                write_sidecars(partial)
                (partial / folder.SETTINGS).write_text(compose.dump_yaml(self.settings), encoding="utf-8")
                folder.write_meta(
                    partial,
                    step=step,
                    contents=["model", "optimizer"],
                    layout=self._layout(),
                    data_position=data_position,
                    saved_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                )
                folder.sync(partial)
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                self._point_at(final)
            except OSError as error:
                problem = str(error)
        if problem := from_first(problem, dist.group.WORLD):
            raise self._not_written(partial, problem)
        if self.is_first:
            self._remove_old(final)
        return final

    def _write_weights(self, state: dict[str, Any], partial: Path) -> None:
        """Writes weights/; collective. All ranks of a failed write raise."""
        metadata = {**sharding_metadata(self.groups), "dp_cp_group": None}
        try:
            dist_checkpointing.save(state, str(partial / folder.WEIGHTS), content_metadata=metadata)
        except WriteFailure as failure:  # on every rank, but not every rank knows why
            reasons = [f"rank {rank}: {str(error).splitlines()[0]}" for rank, (error, _) in failure.failures.items()]
            # torch's file writer keeps the system's reason to itself; how much room is left tells a full disk from other errors.
            reasons.append(f"{shutil.disk_usage(self.root).free / 2**20:.1f} MiB are free")
            raise self._not_written(partial, from_first("; ".join(reasons), dist.group.WORLD)) from failure
        except OSError as error:  # of what the first rank writes for all; the launcher ends the others
            raise self._not_written(partial, str(error)) from error

    def _not_written(self, partial: Path, reason: str) -> CheckpointError:
        if self.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        return CheckpointError(
            f"the checkpoint {partial} could not be written ({reason}) and was removed; those before it are intact. Make room, "
            f"lower train.keep_checkpoints or set another train.output_dir, then start the same command again"
        )

    def load(self, path: Path, model: ModelParts, optimizer: MegatronOptimizer) -> dict[str, Any]:
        """Takes weights, optimizer state and random state from a checkpoint of this run; collective.

        Returns:
            the checkpoint's ``meta.json``: step and data position among others.
        """
        require_same_model(path, self.settings.model)
        stored = folder.read_settings(path)
        for name in ("freeze", "dtype"):
            then, now = stored["train"][name], getattr(self.settings.train, name)
            if then != now:
                raise CheckpointError(
                    f"{path} was saved with train.{name}={then}, the run now has {now}; set it back, or start a new run "
                    f"with train.init_from={path} and another train.output_dir"
                )
        meta = folder.read_meta(path)
        state = self._state(model, optimizer, is_loading=True)
        if meta["layout"] != self._layout():
            del state["random"]  # it belongs to ranks that are not there
        if not delayed_scaling(stored.get("precision", {})):
            state.pop("scaling", None)
        loaded = dist_checkpointing.load(state, str(path / folder.WEIGHTS))
        scaling = loaded.get("scaling", {})
        _put_weights(model, {part: weights | scaling.get(part, {}) for part, weights in loaded["model"].items()})
        optimizer.load_state_dict(loaded["optimizer"])
        if "random" in loaded:
            torch.set_rng_state(loaded["random"]["torch"])
            get_cuda_rng_tracker().set_states(loaded["random"]["tracker"])
        return meta

    def _state(self, model: ModelParts, optimizer: MegatronOptimizer, is_loading: bool) -> dict[str, Any]:
        weights = model_state(model, self.groups)
        states = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
        random = ShardedObject("random", states, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)
        metadata = sharding_metadata(self.groups)
        state = {
            "model": weights,
            "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata),
            "random": random,
        }
        if delayed_scaling(asdict(self.settings.precision)):
            state["scaling"] = scaling_state(model, self.groups)
        return state

    def _layout(self) -> dict[str, int]:
        """What says whether a rank of the checkpoint is the same rank here."""
        parallel = self.settings.parallel
        sizes = {name: getattr(parallel, name) for name in ("tensor", "pipeline", "context", "expert", "virtual_pipeline")}
        return {"world_size": dist.get_world_size(), **sizes}

    def _require_room(self, model: ModelParts) -> None:
        """Compares what will be written with what is free, before anything is written."""
        weights = sum(whole_numel(p, self.groups) * p.element_size() for p in model.parameters())
        # Two moments and, for bfloat16 weights, a float32 copy of what is trained.
        trained = sum(whole_numel(p, self.groups) for p in model.parameters() if p.requires_grad)
        state = trained * (8 if self.settings.train.dtype == "float32" else 12)
        bytes_everywhere: list[int] = [0] * self.groups.mcore.mp.size()
        dist.all_gather_object(bytes_everywhere, weights + state, group=self.groups.mcore.mp)
        needed = sum(bytes_everywhere)
        self.root.mkdir(parents=True, exist_ok=True)
        free = [shutil.disk_usage(self.root).free]
        dist.broadcast_object_list(free, src=0)
        if needed > free[0]:
            raise CheckpointError(
                f"{self.root}: no room for a checkpoint of {needed / 2**30:.2f} GiB, {free[0] / 2**30:.2f} GiB are free; "
                f"make room, lower train.keep_checkpoints or set another train.output_dir"
            )

    def _point_at(self, final: Path) -> None:
        aside = self.root / f".{folder.LATEST}.partial"
        aside.write_text(final.name + "\n", encoding="utf-8")
        folder.sync_path(aside)
        os.replace(aside, self.root / folder.LATEST)
        folder.sync_path(self.root)

    def _remove_old(self, newest: Path) -> None:
        keep = self.settings.train.keep_checkpoints
        older = sorted(path for path in self.root.glob("step_*") if path.is_dir() and path != newest)
        for path in older[: max(0, len(older) - (keep - 1))] if keep else []:
            shutil.rmtree(path)
