"""The partitioned model against transformers: logits, loss and every gradient, at every layout, from one imported checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ranks import ranks

sys.path.insert(0, str(Path(__file__).parent))

import oracle  # noqa: E402
import ours  # noqa: E402

from llava_mcore.conversion import fusions  # noqa: E402
from llava_mcore.conversion.convert import import_hf  # noqa: E402
from llava_mcore.conversion.families import plan  # noqa: E402
from llava_mcore.training.checkpoint_folder import read_model_settings  # noqa: E402

# Streams of uneven content: text only, no label at all, many pictures; four, so that two data-parallel ranks get two each.
STREAMS = [[0, 1, 3], [2, 6], [4, 5], [7]]

LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor": 2, "sequence": False}),
    "TP2+SP": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
    "DP2+overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "TP2xPP2+SP": (4, {"tensor": 2, "pipeline": 2}),
    "TP2xDP2+SP": (4, {"tensor": 2}),
    "PP4": (4, {"pipeline": 4}),
    "PP2xDP2": (4, {"pipeline": 2}),
}

# Float32 sums in another order differ by a few of its 1.2e-7 steps in each of about ten layers; measured: 2e-6 (see the README).
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["untied", "tied", "cls_patch"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    select = "full" if request.param == "cls_patch" else "default"
    hf = oracle.make_model(folder / "hf", tied=request.param == "tied", select=select)
    import_hf(hf, folder / "checkpoint", compare_logits=False)
    samples = oracle.make_samples(oracle.PATCHES + (select == "full"))
    return request.param, folder / "checkpoint", samples, oracle.run_transformers(hf, samples)


def relative(ours_: torch.Tensor, theirs: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest absolute value, or over ``floor`` where that is larger."""
    return float((ours_ - theirs).abs().max() / theirs.abs().max().clamp(min=floor))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_transformers(case, layout: str, record_property) -> None:
    name, checkpoint, samples, theirs = case
    if name != "untied" and layout in ("PP4", "PP2xDP2", "DP2+overlap"):
        pytest.skip("one kind of model is enough here")
    size, parallel = LAYOUTS[layout]
    batches = oracle.pack(samples, STREAMS)
    results = ranks(size).run(ours.run_layout, checkpoint, parallel, batches)

    worst = {"loss": 0.0, "logits": 0.0, "gradients": 0.0}
    for result in results:
        if not result["last"]:
            continue
        worst["loss"] = max(worst["loss"], abs(result["loss"] - theirs["loss"]) / theirs["loss"])
        replicas = max(other["dp"] for other in results) + 1
        for stream, logits in zip(STREAMS[result["dp"] :: replicas], result["logits"], strict=True):
            at = 0
            for number in stream:
                expected = theirs["logits"][number]
                worst["logits"] = max(worst["logits"], relative(logits[at : at + len(expected)], expected))
                at += len(expected)

    whole = ours.assemble([part for result in results for part in result["gradients"]])
    settings = read_model_settings(checkpoint)
    compared = set()
    # Softmax does not see a bias of the keys, so its true gradient is zero and both sides hold rounding only: no tensor is
    # measured against less than a thousandth of the largest gradient.
    floor = 1e-3 * max(float(gradient.abs().max()) for gradient in theirs["gradients"].values())
    for entry in plan(settings).tensors:
        parts = fusions.split(whole.pop(entry.ours), entry)
        for hf_name, part in zip(entry.names, parts, strict=True):
            expected = theirs["gradients"][in_memory(hf_name)]
            worst["gradients"] = max(worst["gradients"], relative(part, expected, floor))
            compared.add(in_memory(hf_name))
    assert not whole, f"gradients without a counterpart: {sorted(whole)}"
    assert compared == set(theirs["gradients"]), set(theirs["gradients"]) ^ compared
    for what, value in worst.items():
        record_property(what, value)
    print(f"\n{name} {layout}: " + ", ".join(f"{what} {value:.1e}" for what, value in worst.items()))
    assert max(worst.values()) < TOLERANCE, worst


def in_memory(saved: str) -> str:
    """The name a saved tensor has in transformers' model."""
    if saved == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + saved.replace("language_model.model.", "language_model.")
