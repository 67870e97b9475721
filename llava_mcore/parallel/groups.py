"""The process groups of a run: built once, passed as an argument, never fetched.

Ranks are laid out tensor-parallel first, then data-parallel, then pipeline, as Megatron-Core does, so that the ranks of a
tensor-parallel group are neighbours on a node.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from llava_mcore.settings.schema import ParallelSettings


@dataclass(frozen=True)
class Groups:
    """Every group one process belongs to.

    Attributes:
        mcore: Megatron-Core's collection, handed to its model, optimizer and schedules.
        tower: the collection of the vision tower, which has no pipeline as it lives whole on the first stage: the decoder's
            tensor-parallel group, or groups of one rank where each encodes its own pictures.
        replica: the ranks that hold one copy of the model and work on the same streams (tensor x context x pipeline).
    """

    mcore: ProcessGroupCollection
    tower: ProcessGroupCollection
    replica: dist.ProcessGroup

    @property
    def tp(self) -> dist.ProcessGroup:
        """Tensor-parallel group."""
        return self.mcore.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        """Pipeline group."""
        return self.mcore.pp

    @property
    def dp(self) -> dist.ProcessGroup:
        """Data-parallel group."""
        return self.mcore.dp

    @property
    def cp(self) -> dist.ProcessGroup:
        """Context-parallel group."""
        return self.mcore.cp

    @property
    def ep(self) -> dist.ProcessGroup:
        """Expert-parallel group."""
        return self.mcore.ep

    @property
    def encoders(self) -> dist.ProcessGroup:
        """The ranks of the first stage that share the pictures of a stream (tensor x context)."""
        return self.mcore.tp_cp

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the tower, the projector and the embedding."""
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head and computes the loss."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pp, self.pp.size() - 1)


def build(parallel: ParallelSettings, seed: int = 0) -> Groups:
    """Builds all groups and seeds this rank's random states; every process calls this once.

    Args:
        parallel: the layout; its tensor x pipeline divides the world size (``settings.schema.layout_problems`` says so first).
        seed: of random states. Weights and data order have seeds of their own; Megatron-Core forks these states around dropout.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        distributed_timeout_minutes=max(1, int(parallel.timeout_minutes)),
        create_gloo_process_groups=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of groups that only partial optimizer sharding has
        mcore = ProcessGroupCollection.use_mpu_process_groups()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed + 1, tp_rank=mcore.tp.rank(), ep_rank=mcore.ep.rank(), etp_rank=mcore.expt_tp.rank(), force_reset_rng=True
    )
    alone, _ = dist.new_subgroups(group_size=1)
    tower_tp = alone if parallel.encoder == "data_parallel" else mcore.tp
    replica = _with_same_rank_in(mcore.dp)
    return Groups(mcore, ProcessGroupCollection(tp=tower_tp, pp=None, cp=None), replica)


def _with_same_rank_in(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The ranks, over all copies of ``group``, that stand at the same place in theirs."""
    places = [0] * dist.get_world_size()
    dist.all_gather_object(places, group.rank())
    found, _ = dist.new_subgroups_by_enumeration(
        [[rank for rank, place in enumerate(places) if place == wanted] for wanted in range(group.size())]
    )
    return found


def destroy() -> None:
    """Forgets all groups, so that another layout can be built in the same processes."""
    parallel_state.destroy_model_parallel()
