"""Speed and memory of a decoder with the widths of 7B on one GPU: `python tests/gpu/measure.py [--quick] [--json FILE]`.

A full training step (forward, backward, clipping, AdamW) on packed streams of 4096 tokens, text only, on every backend that runs
here, and transformers' LlamaForCausalLM (SDPA, fused AdamW) on the same tokens as one unpadded row, which favours it. Each model
is built, warmed up, timed and dropped in turn, as the memory holds one. MFU counts the arithmetic the model needs
(training/observe/flops.py).
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]

import _common  # noqa: E402
import subject  # noqa: E402
from _common import Measure  # noqa: E402

from llava_mcore.data.loader import Batch  # noqa: E402
from llava_mcore.models.backend import problems_here  # noqa: E402
from llava_mcore.parallel import groups as process_groups  # noqa: E402
from llava_mcore.settings.compose import compose  # noqa: E402
from llava_mcore.settings.derive import derive  # noqa: E402
from llava_mcore.settings.schema import Settings  # noqa: E402
from llava_mcore.training.dry_run import stages  # noqa: E402
from llava_mcore.training.engine import forward_backward  # noqa: E402
from llava_mcore.training.observe.flops import FlopsCounter, peak_flops  # noqa: E402
from llava_mcore.training.optimizer import build_optimizer, freeze  # noqa: E402

TOKENS, SAMPLES = 4096, 4
BF16 = {
    "torch, sdpa": ["precision.backend=torch", "precision.attention=sdpa"],
    "torch, flash": ["precision.backend=torch", "precision.attention=flash"],
    "Transformer Engine": ["precision.backend=transformer_engine"],
}
FP8 = {
    "FP8 tensorwise": ["precision=fp8_hybrid", "precision.fp8_first_last_bf16=0"],
    "FP8 blockwise": ["precision=fp8_blockwise"],
}


class Figures(NamedTuple):
    """What one choice of layers and kernels gives."""

    tokens_per_second: float
    mfu: float  # of the bfloat16 peak
    memory: str


_taken: dict[tuple[str, int], Figures | None] = {}
failed: list[str] = []  # what was to run here and did not


def settings(layers: int, *overrides: str) -> Settings:
    """The 7B decoder with fewer layers on one process; its tower is frozen and gets no picture."""
    return compose(
        [
            "experiment=finetune_llava_7b",
            "parallel=single",
            f"model.language.num_layers={layers}",
            f"data.sequence_length={TOKENS}",
            "train.freeze=[vision_tower,projector]",
            *overrides,
        ]
    )


def ids() -> torch.Tensor:
    """Token ids [TOKENS], the same for everybody."""
    return torch.randint(4, 31_000, (TOKENS,), generator=torch.Generator().manual_seed(1))


def text_batch(samples: int) -> Batch:
    """One stream of ``samples`` samples of equal length, a label everywhere."""
    ids_T, length = ids(), TOKENS // samples
    return Batch(
        input_ids_T=ids_T,
        labels_T=ids_T.roll(-1),
        position_ids_T=torch.arange(length).repeat(samples),
        sample_lengths=[length] * samples,
        image_index_E=torch.empty(0, dtype=torch.int64),
        pixel_values_NCHW=torch.empty(0, 3, 336, 336),
        loss_tokens=TOKENS,
        real_tokens=TOKENS,
    )


def timed(step: Callable[[], Any], quick: bool) -> tuple[float, float]:
    """Median seconds of a step and the peak of memory in bytes."""
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(5 if quick else 20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), float(torch.cuda.max_memory_allocated())


def ours(overrides: list[str], quick: bool, samples: int = SAMPLES) -> Figures | None:
    """Tokens/s, MFU of the bfloat16 peak (0 where it isn't known) and peak memory; None where it cannot run."""
    key = (" ".join(overrides), samples)
    if key not in _taken:
        run = settings(2 if quick else 6, *overrides)
        problems = problems_here(run)
        print("\n".join(f"not measured: {problem}" for problem in problems), end="\n" if problems else "")
        try:
            _taken[key] = None if problems else _measured(run, quick, samples)
        except Exception:  # the figures of the others are worth having
            traceback.print_exc()
            _taken[key] = None
            failed.append(key[0])
            process_groups.destroy()
        gc.collect()
        torch.cuda.empty_cache()
    return _taken[key]


def _measured(run: Settings, quick: bool, samples: int) -> Figures:
    built = subject.Subject(run, prepare=lambda model, groups: freeze(model, run.train.freeze, groups))
    optimizer, scheduler = build_optimizer(built.ddp, run.train, run.parallel, derive(run, 1000, 1), built.groups)
    batch = text_batch(samples)

    def step() -> None:
        for part in built.ddp:
            part.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(built.ddp, [batch], built.groups, built.device)
        optimizer.step()
        scheduler.step(1)

    seconds, peak_bytes = timed(step, quick)
    built.close()
    flops = FlopsCounter(run).step(batch.sample_lengths, 0)
    peak = peak_flops(torch.cuda.get_device_name(), "bfloat16")
    estimate = sum(stages(run)[0].memory(run, 1).values())
    memory = (
        f"{peak_bytes / 2**30:.1f} GiB at the peak, {estimate / 2**30:.1f} of them weights, gradients and optimizer by estimate"
    )
    return Figures(TOKENS / seconds, flops / seconds / peak if peak else 0.0, memory)


def transformers(quick: bool) -> float:
    """Tokens/s of the same decoder there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    language = settings(2 if quick else 6).model.language
    config = LlamaConfig(
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_attention_heads,
        num_key_value_heads=language.query_groups,
        vocab_size=language.padded_vocab_size,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    row = ids()[None].cuda()

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=row, labels=row).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return TOKENS / timed(step, quick)[0]


def best(choices: dict[str, list[str]], quick: bool, samples: int = SAMPLES) -> tuple[str, Figures] | None:
    """The fastest of those that run here."""
    found = {name: figures for name, overrides in choices.items() if (figures := ours(overrides, quick, samples)) is not None}
    return max(found.items(), key=lambda item: item[1][0]) if found else None


def mfu(quick: bool) -> Measure:
    """Of the fastest bfloat16 backend; the peer's figure is the floor that was set."""
    name, (rate, share, memory) = best(BF16, quick) or _nothing("bfloat16")
    each = "; ".join(f"{other}: {f[0]:,.0f} tokens/s" for other in BF16 if (f := ours(BF16[other], quick)) is not None)
    return Measure(share, 0.5, "MFU", 1.0, note=f"{name}, {rate:,.0f} tokens/s, {memory}; peer = floor of 50 %. {each}")


def over_transformers(quick: bool) -> Measure:
    """Tokens/s in bfloat16, both on one sample of 4096 tokens."""
    name, (rate, _, memory) = best(BF16, quick, samples=1) or _nothing("bfloat16")
    peer = transformers(quick)
    gc.collect()
    torch.cuda.empty_cache()
    return Measure(rate, peer, "tokens/s", 1.3, note=f"{name}, {memory}, one sample of {TOKENS} tokens")


def fp8_over_bf16(quick: bool) -> Measure:
    """Tokens/s of the fastest FP8 recipe over the fastest bfloat16 backend."""
    name, (rate, _, memory) = best(FP8, quick) or _nothing("FP8")
    other, (bf16, _, _) = best(BF16, quick) or _nothing("bfloat16")
    return Measure(rate, bf16, "tokens/s", 1.3, note=f"{name}, {memory}, over {other}")


def _nothing(what: str) -> Any:
    raise SystemExit(f"no backend here runs {what}; the reasons are above")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing to measure here")
    measures: dict[str, Callable[[bool], Measure]] = {"mfu": mfu, "over_transformers": over_transformers}
    if not problems_here(settings(2, "precision=fp8_hybrid")):
        measures["fp8_over_bf16"] = fp8_over_bf16
    _common.run("gpu_step", (__doc__ or "").splitlines()[0], measures)
    if failed:
        raise SystemExit(f"failed, with the reasons above: {', '.join(failed)}")
