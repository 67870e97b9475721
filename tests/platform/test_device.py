"""Where the code runs: what is replaced where there is no CUDA, and that nothing is where there is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_mcore.platform import cpu, device

ROOT = Path(__file__).resolve().parents[2]
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")


def python(code: str, **environment: str) -> str:
    """The output of a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@without_cuda
def test_every_replacement_is_named_and_made_once() -> None:
    first = device.prepare()
    allocated = torch.cuda.current_device
    assert first == device.prepare() and torch.cuda.current_device is allocated
    assert len(set(first)) == len(first) == len(cpu.apply()) + 1  # and a fused Adam
    assert not [name for name in first if name.startswith("_")]  # each has its reason, none its function's name


@without_cuda
def test_factories_of_megatron_make_cpu_tensors_and_torch_stays_torch() -> None:
    device.prepare()
    from megatron.core.pipeline_parallel import schedules

    assert schedules.torch.zeros(2, device="cuda").device.type == "cpu"
    assert schedules.torch.tensor([1.0], device="cuda").device.type == "cpu"
    assert schedules.torch.nn is torch.nn and schedules.torch is not torch
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


@without_cuda
def test_the_tracker_of_random_states_works_on_the_cpu() -> None:
    device.prepare()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("one", 7)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with tracker.fork("one"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)  # the fork left the outer state alone
    with tracker.fork("one"):
        assert not torch.equal(torch.rand(3), first)  # and went on with its own


def test_a_machine_with_cuda_is_left_as_it_is() -> None:
    code = """
import torch
torch.cuda.is_available = lambda: True
kept = torch.cuda.current_device, torch.Tensor.cuda, torch.Tensor.type, torch.cuda.get_rng_state
from llava_mcore.platform import cpu, device
device.prepare()
assert kept == (torch.cuda.current_device, torch.Tensor.cuda, torch.Tensor.type, torch.cuda.get_rng_state)
print(cpu._applied)
"""
    assert python(code).splitlines()[-1] == "[]"


@without_cuda
def test_alone_without_a_launcher() -> None:
    code = """
from llava_mcore.platform import device
place = device.start()
print(place.rank, place.world_size, place.is_first, place.device)
print(place.description)
device.stop()
device.stop()
"""
    numbers, description = python(code).splitlines()[-2:]
    assert numbers == "0 1 True cpu"
    assert description.startswith("1 process(es) on ") and "gloo" in description and "11 replacements" in description
