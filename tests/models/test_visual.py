"""Pictures of many sizes and clips of several lengths against transformers' own classes, in one process and in layouts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ranks import ranks

sys.path.insert(0, str(Path(__file__).parent))

import ours  # noqa: E402
import visual_oracle as oracle  # noqa: E402

from llava_mcore.conversion import fusions  # noqa: E402
from llava_mcore.conversion.convert import import_hf  # noqa: E402
from llava_mcore.conversion.families import plan  # noqa: E402
from llava_mcore.training.checkpoint_folder import read_model_settings  # noqa: E402

KINDS = ("llava_next", "llava_next_video", "llava_onevision")
CLIPS = [1, 2, 5, 8]
STREAM = 512
LAYOUTS = {
    "TP2+SP": (2, {"tensor": 2}),
    "TP2, split encoder": (2, {"tensor": 2, "encoder": "tensor_parallel"}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    hf = oracle.make_model(folder / "hf", request.param)
    import_hf(hf, folder / "checkpoint", compare_logits=False)
    return request.param, hf, folder / "checkpoint"


def worst_of(found: dict, theirs: dict, streams: list[list[int]]) -> float:
    """Largest difference of logits over the largest value of each sample."""
    worst = 0.0
    for stream, logits in zip(streams, found["logits"], strict=True):
        at = 0
        for number in stream:
            expected = theirs["logits"][number]
            gap = (logits[at : at + len(expected)] - expected).abs().max() / expected.abs().max()
            worst, at = max(worst, float(gap)), at + len(expected)
    return worst


def worst_gradient(results: list[dict], theirs: dict, checkpoint: Path) -> float:
    """Largest difference of any parameter's gradient over its largest value."""
    whole = ours.assemble([part for result in results for part in result["gradients"]])
    floor = 1e-3 * max(float(gradient.abs().max()) for gradient in theirs["gradients"].values())
    worst, compared = 0.0, set()
    for entry in plan(read_model_settings(checkpoint)).tensors:
        for name, part in zip(entry.names, fusions.split(whole.pop(entry.ours), entry), strict=True):
            expected = theirs["gradients"][in_memory(name)]
            worst = max(worst, float((part - expected).abs().max() / expected.abs().max().clamp(min=floor)))
            compared.add(in_memory(name))
    assert not whole and compared == set(theirs["gradients"])
    assert "model.image_newline" in compared
    return worst


def in_memory(saved: str) -> str:
    """The name a saved tensor has in transformers' model."""
    if saved == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + saved.replace("language_model.model.", "language_model.")


def test_every_size_equals_transformers(model) -> None:
    """Logits over 200 pictures; transformers refuses another number of placeholders than its own."""
    kind, hf, checkpoint = model
    geometry = read_model_settings(checkpoint).geometry
    samples = oracle.make_samples(geometry, kind, 200, CLIPS if kind != "llava_next" else [])
    streams = oracle.streams(samples, STREAM)
    (found,) = ranks(1).run(ours.run_logits, checkpoint, oracle.batches(samples, streams, STREAM, geometry.image_size))
    worst = worst_of({"logits": found}, oracle.logits(hf, samples), streams)
    print(f"\n{kind}: {worst:.1e} of {len(samples)} samples")
    assert worst < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_transformers(model, layout: str) -> None:
    kind, hf, checkpoint = model
    size, parallel = LAYOUTS[layout]
    geometry = read_model_settings(checkpoint).geometry
    samples = oracle.make_samples(geometry, kind, 12, CLIPS[:2] if kind != "llava_next" else [])
    theirs = oracle.run_transformers(hf, samples)
    streams = [*oracle.streams(samples, STREAM), []]  # one without any picture
    results = ranks(size).run(
        ours.run_layout, checkpoint, parallel, oracle.batches(samples, streams, STREAM, geometry.image_size)
    )
    last = next(result for result in results if result["last"])
    worst = {"gradients": worst_gradient(results, theirs, checkpoint)}
    if last["logits"]:
        worst["logits"] = worst_of(last, theirs, streams)
    if "context" not in parallel:
        worst["loss"] = abs(last["loss"] - theirs["loss"]) / theirs["loss"]
    print(f"\n{kind} {layout}: " + ", ".join(f"{what} {value:.1e}" for what, value in worst.items()))
    assert max(worst.values()) < TOLERANCE, worst
