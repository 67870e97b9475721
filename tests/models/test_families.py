"""Every family against transformers: logits, loss and gradients at every kind of layout, and weights in and out, bit for bit."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

import family_models  # noqa: E402
import oracle  # noqa: E402
import ours  # noqa: E402

from llava_mcore.conversion import fusions  # noqa: E402
from llava_mcore.conversion.convert import export_hf, import_hf  # noqa: E402
from llava_mcore.conversion.families import plan  # noqa: E402
from llava_mcore.parallel import groups as process_groups  # noqa: E402
from llava_mcore.training.checkpoint_folder import read_model_settings  # noqa: E402

STREAMS = [[0, 1, 3], [2, 6], [4, 5], [7]]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2, "pipeline_split": [2, 1]}),
    "EP2": (2, {"expert": 2}),
    "CP2": (2, {"context": 2}),
    "CP2 ring": (2, {"context": 2, "context_exchange": "ring"}),
}
# Of the largest absolute value; what is measured is printed. A gradient is held against the largest value of its own tensor, so
# float32 rounding of whole sums shows in the tensors with the smallest gradients.
TOLERANCE = {"loss": 1e-5, "logits": 1e-5, "gradients": 5e-5}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, list, dict]]:
    """Name -> (as transformers saved it, imported, micro-batches, transformers' own results)."""
    found = {}
    for name in family_models.ALL:
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        hf = family_models.make(name, folder / "hf")
        import_hf(hf, folder / "checkpoint", compare_logits=False)
        samples = oracle.make_samples(family_models.patches(name))
        found[name] = hf, folder / "checkpoint", oracle.pack(samples, STREAMS), oracle.run_transformers(hf, samples)
    return found


def run_all(checkpoints: dict[str, Path], parallel: dict[str, Any], batches: dict[str, list]) -> dict[str, dict]:
    """On a rank: every model under one layout."""
    results = {}
    for name, checkpoint in checkpoints.items():
        results[name] = ours.run_layout(checkpoint, parallel, batches[name])
        process_groups.destroy()
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_transformers(cases: dict, layout: str, record_property: Any) -> None:
    size, parallel = LAYOUTS[layout]
    if "expert" in parallel:
        cases = {name: cases[name] for name in family_models.EXPERTS}
    if "context" in parallel:  # windows, and angles that depend on a sample's length
        cases = {name: cases[name] for name in ("mistral", "phi3", "phi4 mini", "mixtral")}
    checkpoints = {name: case[1] for name, case in cases.items()}
    batches = {name: case[2] for name, case in cases.items()}
    everywhere = ranks(size).run(run_all, checkpoints, parallel, batches)
    wrong = []
    print()
    for name, (_, checkpoint, _, theirs) in cases.items():
        results = [result[name] for result in everywhere]
        worst = {"loss": abs(float(loss_of(results)) - theirs["loss"]) / theirs["loss"], "logits": 0.0}
        for part, expected in logits_of(results, theirs["logits"]):
            worst["logits"] = max(worst["logits"], float((part - expected).abs().max() / expected.abs().max()))
        worst["gradients"] = worst_gradient(results, checkpoint, theirs["gradients"])
        says = f"{name:14s} {layout}: " + ", ".join(f"{what} {value:.1e}" for what, value in worst.items())
        print(says)
        record_property(f"{name} {layout}", worst)
        if not all(value < TOLERANCE[what] for what, value in worst.items()):
            wrong.append(says)
    assert not wrong, "\n".join(wrong)


def loss_of(results: list[dict]) -> float:
    """Each context-parallel rank has its tokens' share of the sum; tensor- and data-parallel ranks all have the same."""
    return sum(result["loss"] for result in results if result["last"] and result["tp"] == result["dp"] == 0)


def logits_of(results: list[dict], expected: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each sample's logits, ours and theirs."""
    replicas = max(result["dp"] for result in results) + 1
    for result in (result for result in results if result["logits"]):
        for stream, logits in zip(STREAMS[result["dp"] :: replicas], result["logits"], strict=True):
            at = 0
            for number in stream:
                yield logits[at : at + len(expected[number])], expected[number]
                at += len(expected[number])


def worst_gradient(results: list[dict], checkpoint: Path, expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any gradient over its largest value (or a thousandth of the largest of all)."""
    whole = ours.assemble([part for result in results for part in result["gradients"]])
    floor = 1e-3 * max(float(gradient.abs().max()) for gradient in expected.values())
    worst, compared = 0.0, set()
    for entry in plan(read_model_settings(checkpoint)).tensors:
        gradient = whole.pop(entry.ours)
        # In memory, transformers keeps a layer's experts together as we do.
        parts = [gradient] if entry.fusion == "experts" else fusions.split(gradient, entry)
        for name, part in zip(dict.fromkeys(map(in_memory, entry.names)), parts, strict=True):
            compared.add(name)
            difference = (part - expected[name]).abs().max() / expected[name].abs().max().clamp(min=floor)
            worst = max(worst, float(difference))
    assert not whole, f"gradients without a counterpart: {sorted(whole)}"
    assert compared == set(expected), set(expected) ^ compared
    return worst


def in_memory(saved: str) -> str:
    """The name a saved tensor has in transformers' model."""
    if saved == "language_model.lm_head.weight":
        return "lm_head.weight"
    name = "model." + saved.replace("language_model.model.", "language_model.").replace("block_sparse_moe", "mlp")
    name = re.sub(r"experts\.\d+\.(w1|w3|gate_proj|up_proj)\.weight", "experts.gate_up_proj", name)
    return re.sub(r"experts\.\d+\.(w2|down_proj)\.weight", "experts.down_proj", name)


def test_weights_come_back_bit_for_bit(cases: dict, tmp_path: Path) -> None:
    for name, (hf, checkpoint, _, _) in cases.items():
        export_hf(checkpoint, tmp_path / name, compare_logits=False)
        before, after = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / name))
        assert before.keys() == after.keys(), name
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), (name, key)
        assert (hf / "config.json").read_bytes() == (tmp_path / name / "config.json").read_bytes(), name
