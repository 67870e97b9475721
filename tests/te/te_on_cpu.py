"""Transformer Engine's own Python, and Megatron-Core's around it, on a CPU: real but for the kernels (te_kernels.py).

It shows how our layers, layouts, precisions and checkpoints meet Transformer Engine: its modules, its FP8 state and tensors, its
exchanges over context-parallel ranks and its user buffers run as published. It shows nothing of its kernels; tests/gpu does.

:func:`prepare` is called in a process of its own, before Megatron-Core is imported (``ranks(4, HOPPER)``).
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "build" / "transformer_engine-2.11.0"  # put there by tests/run.sh
HOPPER, BLACKWELL = ("te_on_cpu", 9, 0), ("te_on_cpu", 10, 0)  # for ``prepared_by``: compute capability

needs_te = pytest.mark.skipif(
    not FOLDER.is_dir() or torch.cuda.is_available(),
    reason="needs Transformer Engine's Python (bash tests/run.sh gets it) and no CUDA; tests/gpu runs the real one",
)

# What cannot be imported without CUDA, and that none of our layers uses.
LEFT_OUT = ("onnx_extensions", "triton", "triton.permutation", "triton.cross_entropy", "triton.pad")


class Nothing(types.ModuleType):
    """A module whose every name is something that is never called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Stream(contextlib.nullcontext):
    """Work on a CPU comes in the order of the program, on any stream."""

    def __init__(self, *_: Any) -> None:
        super().__init__(self)

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any: ...


class Cuda(types.ModuleType):
    """``torch.cuda`` where the device is the CPU."""

    Stream = Event = Stream

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__("torch.cuda")
        properties = types.SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132)
        self.is_available = lambda: True
        self.current_device = lambda: torch.device("cpu")
        self.get_device_capability = lambda device=None: capability
        self.get_device_properties = lambda device=None: properties
        self.stream = lambda stream: stream
        self.current_stream = lambda device=None: Stream()
        self.synchronize = lambda device=None: None
        self.is_current_stream_capturing = lambda: False

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def prepare(major: int, minor: int) -> None:
    """Makes ``transformer_engine`` importable, and Megatron-Core find it installed, on a device of this compute capability."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)  # what Megatron-Core decided in the process that started this one
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its libraries are not looked for
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # scales that follow from earlier steps: its Python instead of a kernel
    sys.path.insert(0, str(FOLDER))
    import te_kernels

    sys.modules["transformer_engine_torch"] = te_kernels
    sys.modules["einops"] = Nothing("einops")
    for name in LEFT_OUT:
        sys.modules[f"transformer_engine.pytorch.{name}"] = Nothing(name)
    package = types.ModuleType("transformer_engine")
    package.__path__ = [str(FOLDER / "transformer_engine")]
    package.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None, is_package=True)
    package.__version__ = "2.11.0"
    sys.modules["transformer_engine"] = package
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda name: None  # it is there
    # Its modules ask whether a tensor is on a GPU. Nobody else gets another answer.
    torch.Tensor.is_cuda = property(lambda self: sys._getframe(1).f_globals["__name__"].startswith("transformer_engine"))
    import transformer_engine.pytorch

    _adapt(Cuda((major, minor)))


def _adapt(cuda: Cuda) -> None:
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.extensions import transformer_engine as extension

    from llava_mcore.models import backend
    from llava_mcore.platform import cpu

    cpu.apply()
    for module in [module for name, module in sys.modules.items() if name.startswith("transformer_engine.")]:
        if getattr(module, "torch", None) is torch:
            module.torch = _torch_of(cuda)
    extension.torch = backend.torch = _torch_of(cuda)

    # An FP8 tensor is a tensor whose type is asked for twice on the way.
    type_name = torch.Tensor.type
    torch.Tensor.type = lambda self, *how, **named: (  # type: ignore[method-assign, assignment]
        found.replace("cuda.cuda", "cuda") if isinstance(found := type_name(self, *how, **named), str) else found
    )

    # Gloo gathers several buffers at once as if they were of one type; FP8 weights and their biases are not.
    buffers._coalescing_manager = lambda group, async_ops=False: contextlib.nullcontext(types.SimpleNamespace(wait=lambda: None))
    buffers.dist_all_gather_func = _at_once(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = _at_once(buffers.dist_reduce_scatter_func)

    # Transformer Engine waits for some messages twice; Gloo would wait for another.
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    send_and_receive = context_parallel.flash_attn_p2p_communicate
    context_parallel.flash_attn_p2p_communicate = lambda *given: [Once(work) for work in send_and_receive(*given)]


class Once:
    """A message that is waited for once."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            work.wait()


def _at_once(collective: Any) -> Any:
    return lambda *given, async_op=False, **how: collective(*given, **how)


def _torch_of(cuda: Cuda, **names: Any) -> Any:
    """torch as it is where there is CUDA; ``names`` mean something else in it."""
    from llava_mcore.platform import cpu

    found = cpu.TorchOnCpu("torch")
    found.cuda, found.device, found.version = cuda, Device, types.SimpleNamespace(cuda="13.0")
    found.__dict__.update(names)
    return found


class _IsDevice(type):
    def __instancecheck__(cls, thing: Any) -> bool:
        return isinstance(thing, torch.device)


class Device(metaclass=_IsDevice):
    """``torch.device``, of which every GPU is the CPU."""

    def __new__(cls, kind: Any, *index: int) -> Any:
        return torch.device("cpu") if str(kind).startswith("cuda") else torch.device(kind, *index)


@contextlib.contextmanager
def attention_in_float32() -> Iterator[None]:
    """Transformer Engine's fused attention takes half precision alone; here float32 passes for it, for exact comparisons."""
    from transformer_engine.pytorch.attention.dot_product_attention import backends, utils

    kept = backends.torch
    backends.torch = utils.torch = _torch_of(kept.cuda, bfloat16=torch.float32)
    try:
        yield
    finally:
        backends.torch = utils.torch = kept


def forget() -> None:
    """What Transformer Engine keeps in a process for one training run."""
    from transformer_engine.pytorch import destroy_ub
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    destroy_ub()
