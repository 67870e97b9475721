"""Fewer embeddings a picture: what merging saves of a training step, what it costs, and what it does to what is learned.

    python benchmarks/visual_tokens.py [--quick] [--json FILE]

The task is the quickstart's: which digit is written in a held-out scan of scikit-learn's. The scans are enlarged to pictures of
many patches, and a sample is a picture with a question of a few words, so that embeddings of pictures are nearly all that the
decoder reads. As in the quickstart, everything learns first, here with every patch; then the tower is frozen and each way to make
fewer goes on from there. The peer is the same with every patch, or with patches averaged in squares to as many embeddings.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from _common import Measure, alternate, run
from _step import BOS, CPU, IMAGE, Ours, Sample, padded, settings_of
from PIL import Image

from llava_mcore.data.conversation import IGNORE
from llava_mcore.data.sample import positions_of
from llava_mcore.geometry import SINGLE
from llava_mcore.models.llava import ModelParts
from llava_mcore.models.reduction.picture import merge_grid
from llava_mcore.parallel import groups as process_groups
from llava_mcore.parallel.groups import Groups
from llava_mcore.platform import device
from llava_mcore.settings.schema import ModelSettings, Pooling, Settings, TokenMerging
from llava_mcore.training.engine import forward_logits

HELD_OUT = 297  # as in the quickstart
QUESTION, FIRST_DIGIT, VOCAB = (4, 5, 6, 7), 8, 64


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        timed: hidden, ffn, layers and heads of the decoder whose steps are timed.
        timed_side: patches along a side of its pictures.
        pictures: of a timed step.
        rounds: timed steps that count.
        learned: the decoder that is trained.
        side: patches along a side of its pictures.
        batch: samples of a training step.
        steps: training steps with every patch, and then of each way to make fewer.
        scored: held-out pictures asked about.
    """

    timed: tuple[int, int, int, int] = (512, 1408, 4, 8)
    timed_side: int = 24
    pictures: int = 2
    rounds: int = 5
    learned: tuple[int, int, int, int] = (128, 384, 3, 2)
    side: int = 12
    batch: int = 16
    steps: tuple[int, int] = (360, 120)
    scored: int = HELD_OUT


FULL = Plan()
QUICK = Plan((256, 704, 2, 4), 16, 2, 3, (64, 160, 2, 1), 8, 8, (4, 2), 32)


def plan_of(quick: bool) -> Plan:
    """The plan of a full or a quick run."""
    return QUICK if quick else FULL


@cache
def one_process() -> Groups:
    """Process groups of one rank."""
    device.start()
    return process_groups.build(settings_with(FULL.learned, FULL.side, None).parallel)


def settings_with(
    decoder: tuple[int, int, int, int],
    side: int,
    reduction: TokenMerging | Pooling | None,
    steps: int = 1000,
    freeze: Sequence[str] = (),
) -> Settings:
    """A run with one way to make fewer embeddings."""
    settings = settings_of(*decoder, VOCAB, (64, 2, side), freeze)
    key = "pooling" if isinstance(reduction, Pooling) else "token_merging"
    projector = dataclasses.replace(settings.model.projector, **{key: reduction})
    train = dataclasses.replace(settings.train, lr=1e-3, steps=steps, warmup_ratio=0.05)
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, projector=projector), train=train)


# ---- the task ----


@cache
def scans() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scans [n, 8, 8] and digits of the training and of the held-out part, divided as in the quickstart."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    loaded = load_digits()
    train, held_out = train_test_split(np.arange(len(loaded.target)), test_size=HELD_OUT, random_state=0, stratify=loaded.target)
    return loaded.images[train], loaded.target[train], loaded.images[held_out], loaded.target[held_out]


def samples(images: np.ndarray, digits: np.ndarray, model: ModelSettings) -> list[Sample]:
    """One question about each scan; the answer is the last token, learned from the one before it."""
    found = []
    for scan, digit in zip(images, digits.tolist(), strict=True):
        picture = Image.fromarray(scan.astype(np.float32) / 8 - 1).resize([model.vision.image_size] * 2, Image.Resampling.BICUBIC)
        ids = np.array([BOS, *[IMAGE] * model.embeddings_per_image, *QUESTION, FIRST_DIGIT + digit], dtype=np.int64)
        labels = np.full_like(ids, IGNORE)
        labels[-1] = ids[-1]
        positions = positions_of(len(ids), np.flatnonzero(ids == IMAGE), model.geometry, [SINGLE])
        found.append(Sample(ids, labels, np.repeat(np.asarray(picture)[None, None], 3, axis=1), positions))
    return found


def trained(plan: Plan, settings: Settings, start: ModelParts | None, first_epoch: int) -> Ours:
    """The model after the steps of its settings, on samples in an order that is the same for all."""
    ours = Ours(settings, one_process(), start=start)
    images, digits, *_ = scans()
    order = np.concatenate([np.random.default_rng(first_epoch + epoch).permutation(len(digits)) for epoch in range(4)])
    for step in range(settings.train.steps or 0):
        chosen = order[step * plan.batch : (step + 1) * plan.batch]
        ours.step([padded(samples(images[chosen], digits[chosen], settings.model), settings.model.vision.image_size)])
    return ours


@cache
def every_patch(quick: bool) -> ModelParts:
    """The weights that every way to make fewer embeddings goes on from."""
    plan = plan_of(quick)
    started = time.perf_counter()
    ours = trained(plan, settings_with(plan.learned, plan.side, None, plan.steps[0]), None, 0)
    print(f"  first phase: {score(plan, ours):.1f} % right, {time.perf_counter() - started:.0f} s", flush=True)
    return ours.model


@cache
def accuracy(quick: bool, reduction: str) -> float:
    """Held-out digits right in percent, after both phases."""
    plan = plan_of(quick)
    settings = settings_with(plan.learned, plan.side, reduction_of(reduction), plan.steps[1], ["vision_tower"])
    start = every_patch(quick)
    started = time.perf_counter()
    percent = score(plan, trained(plan, settings, start, 10))
    each = settings.model.embeddings_per_image
    print(f"  {reduction}: {each} embeddings, {percent:.1f} % right, {time.perf_counter() - started:.0f} s", flush=True)
    return percent


def score(plan: Plan, ours: Ours) -> float:
    """Held-out digits right, in percent."""
    model, right = ours.model.settings, 0
    *_, images, digits = (part[: plan.scored] for part in scans())
    for start in range(0, plan.scored, 32):
        asked = samples(images[start : start + 32], digits[start : start + 32], model)
        length = len(asked[0])
        places = [number * length + length - 2 for number in range(len(asked))]
        batch = padded(asked, model.vision.image_size)
        (logits,) = forward_logits(ours.model, [batch], [places], one_process(), CPU)
        right += int((logits.argmax(dim=-1) == torch.from_numpy(digits[start : start + 32]) + FIRST_DIGIT).sum())
    return 100 * right / plan.scored


def reduction_of(name: str) -> TokenMerging | Pooling | None:
    """``merge 0.5``, ``merge 0.5 within windows``, ``average 2x2``, each perhaps with `` counted`` behind, or ``every patch``."""
    kind, *rest = name.split()
    if kind == "every":
        return None
    positions = "counted" if rest[-1] == "counted" else "kept"
    if kind == "average":
        return Pooling(kind="average", stride=int(rest[0][0]), where="after", positions=positions)
    return TokenMerging(ratio=float(rest[0]), scope="window" if "windows" in rest else "picture", positions=positions)


# ---- the measures ----


def timed_step(quick: bool, reduction: str) -> tuple[Ours, list]:
    """A model and the batch of one of its steps."""
    plan = plan_of(quick)
    settings = settings_with(plan.timed, plan.timed_side, reduction_of(reduction))
    images, digits, *_ = scans()
    asked = samples(images[: plan.pictures], digits[: plan.pictures], settings.model)
    return Ours(settings, one_process()), [padded(asked, settings.model.vision.image_size)]


def step_speed(quick: bool, reduction: str, peer: str, at_least: float) -> Measure:
    """Steps a second of one reduction and of another."""
    plan = plan_of(quick)
    sides = [timed_step(quick, name) for name in (reduction, peer)]

    def seconds(side: int, _: int) -> float:
        ours, batches = sides[side]
        started = time.perf_counter()
        ours.step(batches)
        return time.perf_counter() - started

    taken = alternate(partial(seconds, 0), partial(seconds, 1), plan.rounds)
    each = [ours.model.settings.embeddings_per_image for ours, _ in sides]
    note = f"{plan.pictures} pictures of {each[0]} embeddings ({reduction}) against {each[1]} ({peer}), decoder {plan.timed}"
    return Measure(1 / taken[0], 1 / taken[1], "steps/s", at_least, note=note)


def merge_share(quick: bool) -> Measure:
    """The merging of a step, forward and backward, in percent of the step it is part of, against the 2 % it may take."""
    plan = plan_of(quick)
    ours, batches = timed_step(quick, "merge 0.5")
    merging, kept = ours.model.settings.projector.token_merging, ours.model.settings.embeddings_per_image
    features = torch.randn(
        plan.pictures, plan.timed_side**2, plan.timed[0], generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    gradient = torch.randn(plan.pictures, kept, plan.timed[0], generator=torch.Generator().manual_seed(1))

    def merge(_: int) -> float:
        started = time.perf_counter()
        merge_grid(features, plan.timed_side, kept, merging)[0].backward(gradient)
        return time.perf_counter() - started

    def step(_: int) -> float:
        started = time.perf_counter()
        ours.step(batches)
        return time.perf_counter() - started

    merged, whole = alternate(merge, step, plan.rounds)
    note = f"merging takes {merged * 1e3:.2f} ms of a step of {whole * 1e3:.0f} ms, decoder {plan.timed}"
    return Measure(100 * merged / whole, 2.0, "% of a step", 1.0, "lower", note)


def learned(quick: bool, reduction: str, peer: str, at_least: float) -> Measure:
    """Held-out digits right with one reduction and with another."""
    plan = plan_of(quick)
    right = [accuracy(quick, name) for name in (reduction, peer)]
    first, then = plan.steps
    note = f"{reduction} against {peer} of {plan.side**2} patches; {first} steps of {plan.batch} samples with all, then {then}"
    return Measure(*right, "% right", at_least, note=note)


MEASURES = {
    "step_quarter_merged": partial(step_speed, reduction="merge 0.25", peer="every patch", at_least=1.0),
    "step_half_merged": partial(step_speed, reduction="merge 0.5", peer="every patch", at_least=1.6),
    "step_three_quarters_merged": partial(step_speed, reduction="merge 0.75", peer="every patch", at_least=1.0),
    "step_against_pooling": partial(step_speed, reduction="merge 0.75", peer="average 2x2", at_least=0.98),
    "merge_share": merge_share,
    "accuracy_quarter_merged": partial(learned, reduction="merge 0.25", peer="every patch", at_least=0.99),
    "accuracy_quarter_within_windows": partial(learned, reduction="merge 0.25 within windows", peer="every patch", at_least=0.99),
    "accuracy_half_merged": partial(learned, reduction="merge 0.5", peer="every patch", at_least=0.99),
    "accuracy_half_within_windows": partial(learned, reduction="merge 0.5 within windows", peer="every patch", at_least=0.99),
    "accuracy_three_quarters_merged": partial(learned, reduction="merge 0.75", peer="every patch", at_least=0.99),
    "accuracy_half_against_counted": partial(learned, reduction="merge 0.5", peer="merge 0.5 counted", at_least=1.0),
    "accuracy_pooled_against_counted": partial(learned, reduction="average 2x2", peer="average 2x2 counted", at_least=1.0),
    "accuracy_against_pooling": partial(learned, reduction="merge 0.75", peer="average 2x2", at_least=1.0),
}

if __name__ == "__main__":
    run("visual_tokens", "What fewer embeddings a picture save, cost and do.", MEASURES)
