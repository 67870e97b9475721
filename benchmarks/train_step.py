"""How fast a training step is, against transformers and against this project's own other ways.

    python benchmarks/train_step.py [--quick] [--json FILE] [--only MEASURE ...]

Everything runs on the CPU in float32, on one process but for the encoder measure (four).
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without being installed

from _common import Measure, alternate, run  # noqa: E402
from _step import Ours, Sample, make_sample, packed, padded, pair, rows, settings_of  # noqa: E402
from _text import make_shards, make_tokenizer  # noqa: E402

from llava_mcore.data.lengths import build_lengths  # noqa: E402
from llava_mcore.data.loader import StreamLoader  # noqa: E402
from llava_mcore.data.plan import Planner  # noqa: E402
from llava_mcore.data.sources import open_blend  # noqa: E402
from llava_mcore.data.tokenizer import load_tokenizer  # noqa: E402
from llava_mcore.models.initialize import initialize  # noqa: E402
from llava_mcore.models.llava import build_model  # noqa: E402
from llava_mcore.parallel import groups as process_groups  # noqa: E402
from llava_mcore.parallel.encoder import reduce_gradients  # noqa: E402
from llava_mcore.parallel.groups import Groups  # noqa: E402
from llava_mcore.platform import device  # noqa: E402
from llava_mcore.settings.schema import ModelSettings, Settings  # noqa: E402
from llava_mcore.training.checkpoint import sharding_metadata  # noqa: E402
from llava_mcore.training.observe.flops import FlopsCounter  # noqa: E402
from llava_mcore.training.optimizer import freeze  # noqa: E402

PHASE_1, PHASE_2 = ("vision_tower", "language_model"), ("vision_tower",)

# Lengths spread like LLaVA-mix665k at LLaVA's own settings. The shares are the published counts (40,688 ShareGPT conversations of
# 665,298 are text only, the others have one picture); the spreads of text are assumptions: lognormal, median 180 and sigma 0.8
# beside a picture, median 300 and sigma 1.0 alone; samples are cut at 2048 tokens, a picture is 576. A smaller picture scales
# every length with it. The peer pads 16 rows (LLaVA's batch of a device) to their longest, in random order.
TEXT_ONLY_SHARE = 40_688 / 665_298
WITH_PICTURE, ALONE = (180.0, 0.8), (300.0, 1.0)
PICTURE_TOKENS, LONGEST_SAMPLE, STREAM = 576, 2048, 4096
ROWS = 16


@dataclass(frozen=True)
class Plan:
    """How large and how often; ``quick`` is for a first look, where Python's own time counts for more."""

    decoder: tuple[int, int, int, int, int]  # width, MLP, layers, heads, vocabulary
    side: int  # patches along a side of a picture
    tower: tuple[int, int]  # width, layers
    rounds: int
    mix_decoder: tuple[int, int, int, int, int]
    mix_samples: int
    loaded_samples: int  # of a step of the loading measure
    loaded_tower: tuple[int, int]  # about 5 % of the decoder's FLOPs
    pictures: int  # of the encoder measure
    encoder_tower: tuple[int, int]


FULL = Plan(
    decoder=(512, 1376, 8, 8, 8000),
    side=12,
    tower=(256, 4),
    rounds=7,
    mix_decoder=(384, 1024, 6, 6, 8000),
    mix_samples=64,
    loaded_samples=24,
    loaded_tower=(256, 7),
    pictures=16,
    encoder_tower=(384, 6),
)
QUICK = Plan(
    decoder=(256, 688, 4, 4, 2048),
    side=6,
    tower=(128, 2),
    rounds=3,
    mix_decoder=(256, 688, 4, 4, 2048),
    mix_samples=32,
    loaded_samples=16,
    loaded_tower=(128, 3),
    pictures=16,
    encoder_tower=(128, 4),
)


def plan_of(quick: bool) -> Plan:
    """The sizes of a run."""
    return QUICK if quick else FULL


@cache
def one_process() -> Groups:
    """The groups of this process alone."""
    device.start()
    return process_groups.build(settings_of(*QUICK.decoder, (*QUICK.tower, QUICK.side), PHASE_2).parallel)


def rate(tokens: int, work: Callable[[], Any]) -> float:
    """Tokens a second of ``work``. What earlier work left behind is collected first, as it is nobody's cost here."""
    gc.collect()
    start = time.perf_counter()
    work()
    return tokens / (time.perf_counter() - start)


# ---- against transformers ----


def full_step(quick: bool) -> Measure:
    """A whole step on one padded batch, phase 2: the tower is frozen in both."""
    plan = plan_of(quick)
    settings = settings_of(*plan.decoder, (*plan.tower, plan.side), PHASE_2)
    ours, peer = pair(settings, one_process())
    random = np.random.default_rng(0)
    samples = [make_sample(settings.model, text, True, random) for text in (40, 72, 96, 112)]
    our_batches, peer_batches = [padded(samples, settings.model.vision.image_size)], [rows(samples)]
    tokens = sum(map(len, samples))
    figures = alternate(
        lambda _: rate(tokens, lambda: ours.step(our_batches)),
        lambda _: rate(tokens, lambda: peer.step(peer_batches)),
        plan.rounds,
        warmup=2,
    )
    note = f"{len(samples)} rows of up to {max(map(len, samples))} tokens, decoder {plan.decoder}, SDPA, AdamW fused in the peer"
    return Measure(*figures, "real tokens/s", 1.0, note=note)


def mix_samples(model: ModelSettings, count: int, random: np.random.Generator) -> list[Sample]:
    """Samples with lengths spread like LLaVA-mix665k, scaled to the model's pictures."""
    each = model.embeddings_per_image
    scale = each / PICTURE_TOKENS
    samples = []
    for _ in range(count):
        shown = bool(random.random() >= TEXT_ONLY_SHARE)
        median, sigma = WITH_PICTURE if shown else ALONE
        room = round(LONGEST_SAMPLE * scale) - 1 - (each if shown else 0)
        text = round(random.lognormal(np.log(median * scale), sigma))
        samples.append(make_sample(model, min(max(text, 2), room), shown, random))
    return samples


def mixed_lengths(quick: bool) -> Measure:
    """Whole steps on lengths spread like LLaVA-mix665k, packed against padded; every round has samples of its own."""
    plan = plan_of(quick)
    settings = settings_of(*plan.mix_decoder, (*plan.tower, plan.side), PHASE_2)
    model, size = settings.model, settings.model.vision.image_size
    ours, peer = pair(settings, one_process())
    random = np.random.default_rng(1)
    rounds = [mix_samples(model, plan.mix_samples, random) for _ in range(plan.rounds)]
    capacity = round(STREAM * model.embeddings_per_image / PICTURE_TOKENS)

    def our_rate(number: int) -> float:
        batches = packed(rounds[number], capacity, size)
        return rate(sum(map(len, rounds[number])), lambda: ours.step(batches))

    def peer_rate(number: int) -> float:
        samples = rounds[number]
        batches = [rows(samples[first : first + ROWS]) for first in range(0, len(samples), ROWS)]
        return rate(sum(map(len, samples)), lambda: peer.step(batches))

    figures = alternate(our_rate, peer_rate, plan.rounds)
    filled = [_filled(samples, capacity) for samples in rounds]
    spread = (
        f"{1 - TEXT_ONLY_SHARE:.1%} one picture of {PICTURE_TOKENS} + text lognormal(median {WITH_PICTURE[0]:.0f}, sigma "
        f"{WITH_PICTURE[1]}), {TEXT_ONLY_SHARE:.1%} text only lognormal(median {ALONE[0]:.0f}, sigma {ALONE[1]}), "
        f"cut at {LONGEST_SAMPLE}"
    )
    note = (
        f"lengths like LLaVA-mix665k x {model.embeddings_per_image}/{PICTURE_TOKENS}: {spread}; steps of "
        f"{plan.mix_samples} samples; streams of {STREAM} {np.mean([own for own, _ in filled]):.0%} full, the peer's batches of "
        f"{ROWS} rows {np.mean([other for _, other in filled]):.0%}; decoder {plan.mix_decoder}"
    )
    return Measure(*figures, "real tokens/s", 2.0, note=note)


def _filled(samples: Sequence[Sample], capacity: int) -> tuple[float, float]:
    """Shares of real tokens in the packed streams and in the padded rows."""
    lengths = [len(sample) for sample in samples]
    batches = [lengths[first : first + ROWS] for first in range(0, len(lengths), ROWS)]
    streams = packed([dataclasses.replace(sample, pixels=sample.pixels[:, :, :1, :1]) for sample in samples], capacity, 1)
    return sum(lengths) / (len(streams) * capacity), sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


# ---- against the text-only decoder ----


def over_text_only(quick: bool) -> Measure:
    """Phase 2 on real pictures out of shards, against the same decoder on text samples of the same lengths."""
    plan = plan_of(quick)
    settings = settings_of(*plan.decoder, (*plan.loaded_tower, plan.side), PHASE_2)
    model = settings.model
    count = plan.loaded_samples * (plan.rounds + 2)
    words = np.random.default_rng(2).lognormal(np.log(60), 0.6, count).clip(4, 300).astype(int)
    settings.data = dataclasses.replace(settings.data, sequence_length=1024, image_mode="pad")
    runs: list[tuple[Ours, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_folder = make_tokenizer(Path(folder) / "tokenizer", model.language.vocab_size)
        tokenizer = load_tokenizer(tokenizer_folder)
        for pictures in (True, False):
            each = model.embeddings_per_image
            shards = make_shards(Path(folder) / str(pictures), words, pictures, model.language.vocab_size, each, seed=3)
            side = settings if pictures else _text_only(settings)
            build_lengths(shards, tokenizer_folder, side.data.template)
            data = dataclasses.replace(side.data, path=str(shards), packing_window=0)
            blend = open_blend(data, tokenizer, 4, plan.loaded_samples)
            planner = Planner(blend, data, model.geometry, seed=4, global_batch_size=plan.loaded_samples)
            loader = StreamLoader(planner, tokenizer, data, model.image_token_id, rank=0, size=1, micro_batch_size=1)
            runs.append((Ours(side, one_process(), text_only=not pictures), iter(loader)))
        seen: list[tuple[list[int], int]] = []

        def step(side: int) -> float:
            ours, steps = runs[side]
            taken = []

            def work() -> None:
                taken.append(next(steps))
                ours.step(taken[0].batches)

            per_second = rate(1, work)
            if side == 0:
                seen.append((taken[0].sample_lengths, taken[0].pictures))
            return taken[0].slots * per_second

        figures = alternate(lambda _: step(0), lambda _: step(1), plan.rounds)
        for _, steps in runs:
            steps.close()
    lengths, pictures_seen = [length for part, _ in seen for length in part], sum(number for _, number in seen)
    flops = FlopsCounter(settings).breakdown(lengths, pictures_seen)
    note = (
        f"{pictures_seen} JPEG and PNG of {len(lengths)} samples decoded through the loader; tower "
        f"{plan.loaded_tower} {flops['vision_tower'] / flops['language_model']:.1%} of the decoder's FLOPs; streams of "
        f"{settings.data.sequence_length}"
    )
    return Measure(*figures, "stream tokens/s", 0.9, note=note)


def _text_only(settings: Settings) -> Settings:
    """The same run where tower and projector are not trained."""
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, freeze=["vision_tower", "projector"]))


# ---- the encoder over ranks ----


def encoder_over_ranks(quick: bool) -> Measure:
    """Encoder data parallelism against every rank encoding every picture, TP2 x CP2."""
    plan = plan_of(quick)
    settings = settings_of(*plan.decoder, (*plan.encoder_tower, plan.side), PHASE_2)
    settings.parallel = dataclasses.replace(settings.parallel, tensor=2, context=2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    size = settings.parallel.model_ranks
    processes = [
        context.Process(target=_encode_on_rank, args=(rank, size, port, settings, plan, answers), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a rank of the encoder measure failed: exit codes {[process.exitcode for process in processes]}")
    cpu_ours, cpu_peer, wall_ours, wall_peer = answers.get()
    note = (
        f"{plan.pictures} pictures, frozen tower {plan.encoder_tower} and projector forward, backward and gradient sum; CPU "
        f"seconds of the busiest of {size} ranks, as they share cores; wall time {wall_ours:.3f} s against {wall_peer:.3f} s, "
        f"{wall_peer / wall_ours:.2f} x"
    )
    return Measure(cpu_ours, cpu_peer, "CPU s", 2.0, "lower", note)


def _encode_on_rank(rank: int, size: int, port: int, settings: Settings, plan: Plan, answers: Any) -> None:
    """One rank of the encoder measure; the first answers for all."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device.start(timeout_minutes=5)
    groups = process_groups.build(settings.parallel)
    parts = build_model(settings.model, settings.parallel, "float32", groups)
    initialize(parts, settings.train.seed, sharding_metadata(groups))
    freeze(parts, settings.train.freeze, groups)
    (model,) = parts
    projector = list(model.projector.parameters())
    every_rank = partial(model._encode, each=settings.model.embeddings_per_image)
    size_px = settings.model.vision.image_size
    pixels = torch.randn(plan.pictures, 3, size_px, size_px, generator=torch.Generator().manual_seed(5))

    def measure(encode: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]], dealt: bool) -> torch.Tensor:
        model.zero_grad()
        torch.distributed.barrier()
        cpu, wall = time.process_time(), time.perf_counter()
        encode(pixels)[0].square().mean().backward()
        if dealt:
            for parameter in projector:
                parameter.main_grad = parameter.grad  # type: ignore[attr-defined]
            reduce_gradients(projector, groups.tp)
        taken = torch.tensor([time.process_time() - cpu, time.perf_counter() - wall], dtype=torch.float64)
        torch.distributed.all_reduce(taken, op=torch.distributed.ReduceOp.MAX)
        return taken

    found: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for number in range(plan.rounds + 1):
        for dealt in (True, False) if number % 2 else (False, True):
            taken = measure(model.encode_images if dealt else every_rank, dealt)
            if number:
                found[dealt].append(taken)
    if rank == 0:
        (cpu_ours, wall_ours), (cpu_peer, wall_peer) = (
            torch.stack(found[dealt]).median(dim=0).values.tolist() for dealt in (True, False)
        )
        answers.put((cpu_ours, cpu_peer, wall_ours, wall_peer))
    device.stop()


# ---- memory ----


def stored_bytes(quick: bool) -> Measure:
    """What training keeps beside the weights: phase 1 (frozen tower and decoder) against phase 2, same batch."""
    plan = plan_of(quick)
    kept = {}
    for phase in (PHASE_1, PHASE_2):
        settings = settings_of(*plan.decoder, (*plan.tower, plan.side), phase)
        random = np.random.default_rng(0)
        samples = [make_sample(settings.model, text, True, random) for text in (40, 72, 96, 112)]
        ours = Ours(settings, one_process())
        kept[phase] = _kept(ours, samples, settings.model.vision.image_size)
    parts = [f"{one / 2**20:.1f} against {two / 2**20:.1f} MiB" for one, two in zip(kept[PHASE_1], kept[PHASE_2], strict=True)]
    note = f"activations {parts[0]}, gradients {parts[1]}, optimizer {parts[2]}"
    return Measure(sum(kept[PHASE_1]) / 2**20, sum(kept[PHASE_2]) / 2**20, "MiB", 3.0, "lower", note)


def _kept(ours: Ours, samples: Sequence[Sample], image_size: int) -> tuple[int, int, int]:
    """Bytes of activations saved for backward (not those of weights), of gradients, and of optimizer state."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in ours.model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()  # alive until backward, so an address is counted once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ours.backward([padded(samples, image_size)])
    ours.optimizer.step()
    gradients = [grad for p in ours.model.parameters() if (grad := getattr(p, "main_grad", None)) is not None]
    state = [value for _, entry in ours.optimizer.state.items() for value in entry.values() if torch.is_tensor(value)]
    return sum(saved.values()), _bytes(gradients), _bytes(state)


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the storages of some tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


MEASURES = {
    "full_step": full_step,
    "mixed_lengths": mixed_lengths,
    "over_text_only": over_text_only,
    "encoder_over_ranks": encoder_over_ranks,
    "stored_bytes": stored_bytes,
}

if __name__ == "__main__":
    run("train_step", "Speed and memory of a training step.", MEASURES)
