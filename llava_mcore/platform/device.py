"""CUDA or CPU: picks the device, makes Megatron-Core run on it, and joins the processes.

Every process calls :func:`start` once, before anything of Megatron-Core is built.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llava_mcore.platform import adam, cpu


@dataclass(frozen=True)
class Place:
    """Where this process stands: its device and its number among all processes."""

    device: torch.device
    rank: int
    world_size: int
    description: str

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0


def has_cuda() -> bool:
    """Whether models run on CUDA here."""
    return torch.cuda.is_available()


def world_size() -> int:
    """Processes in all, as torchrun says; one without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def prepare() -> list[str]:
    """Makes Megatron-Core usable on this machine and names what was replaced; a second call changes nothing.

    With CUDA nothing of Megatron-Core is patched for the platform; only a missing fused Adam is supplied.
    """
    changes = [] if has_cuda() else cpu.apply()
    if not (importlib.util.find_spec("transformer_engine") or importlib.util.find_spec("apex")):
        changes += adam.install()
    return changes


def start(timeout_minutes: float = 10.0) -> Place:
    """Joins this process with its peers (torchrun's variables; without them, one process alone).

    Args:
        timeout_minutes: a collective that takes longer raises instead of hanging.

    Returns:
        the place of this process. The process group is left as it is if it exists already.
    """
    changes = prepare()
    rank, size = int(os.environ.get("RANK", 0)), world_size()
    if has_cuda():
        # Megatron-Core's overlap of communication and computation counts on kernels running in the order they were launched.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend, name = "nccl", torch.cuda.get_device_name(device)
    else:
        device = torch.device("cpu")
        backend, name = "gloo", platform.processor() or platform.machine()
        # torchrun says 1 where the user says nothing; the ranks of one machine share its cores.
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout, device_id=device if has_cuda() else None)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    replaced = f"{len(changes)} replacements for missing CUDA parts" if changes else "unpatched"
    description = f"{size} process(es) on {name}, {backend}, Megatron-Core {_megatron_version()} ({replaced})"
    return Place(device, rank, size, description)


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _megatron_version() -> str:
    from megatron.core.package_info import __version__

    return __version__
