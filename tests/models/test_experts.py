"""A mixture of experts over every kind of layout against one process, its checkpoint at another layout, its balancing loss."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from ranks import ranks

sys.path.insert(0, str(Path(__file__).parent))

import oracle  # noqa: E402
import ours  # noqa: E402
from test_layouts import batches, difference, settings  # noqa: E402

from llava_mcore.data.loader import Batch  # noqa: E402
from llava_mcore.evaluation.inference import Inference  # noqa: E402
from llava_mcore.models.initialize import initialize  # noqa: E402
from llava_mcore.parallel import groups as process_groups  # noqa: E402
from llava_mcore.settings.compose import SettingsError  # noqa: E402
from llava_mcore.settings.schema import Settings  # noqa: E402
from llava_mcore.training.checkpoint import model_state, sharding_metadata  # noqa: E402
from llava_mcore.training.engine import distribute, forward_backward  # noqa: E402
from llava_mcore.training.optimizer import trained_parameters  # noqa: E402

STEPS = 3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, {"expert": 2}),
    "EP2 overlap": (2, {"expert": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "TP2": (2, {"tensor": 2}),
    "CP2 EP2": (2, {"context": 2, "expert": 2}),
    "TP2 EP2": (4, {"tensor": 2, "expert": 2}),
    "PP2 EP2": (4, {"pipeline": 2, "expert": 2}),
    "EP2 DP2": (4, {"expert": 2}),
}
TOLERANCE = 1e-5


def experts(parallel: dict[str, Any], **language: Any) -> Settings:
    """The tiny model of ``test_layouts`` with four experts a layer, of which a token sees two."""
    base = settings({})
    sizes = {"family": "mixtral", "num_experts": 4, "experts_per_token": 2, "tie_word_embeddings": False, **language}
    model = replace(base.model, language=replace(base.model.language, **sizes))
    return replace(base, model=model, parallel=replace(base.parallel, **parallel), train=replace(base.train, steps=STEPS))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    (result,) = ranks(1).run(ours.train, experts({}), batches(), STEPS)
    return {**result, "gradients": ours.assemble(result["gradients"]), "weights": ours.assemble(result["weights"])}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_process(alone: dict[str, Any], layout: str) -> None:
    size, parallel = LAYOUTS[layout]
    results = ranks(size).run(ours.train, experts(parallel), batches(), STEPS)
    worst = {"loss": 0.0, "norm": 0.0, "gradients": 0.0, "weights": 0.0}
    for result in results:
        if result["last"]:
            worst["loss"] = max(worst["loss"], difference(result["losses"], alone["losses"]))
        worst["norm"] = max(worst["norm"], difference(result["norms"], alone["norms"]))
    largest = max(float(tensor.abs().max()) for tensor in alone["gradients"].values())
    for what, floor in (("gradients", 1e-3 * largest), ("weights", 1e-3)):
        whole = ours.assemble([shard for result in results for shard in result[what]])
        assert whole.keys() == alone[what].keys()
        for name, tensor in whole.items():
            expected = alone[what][name]
            worst[what] = max(worst[what], float((tensor - expected).abs().max() / expected.abs().max().clamp(min=floor)))
    print(f"\n{layout} ({size}): " + ", ".join(f"{what} {value:.1e}" for what, value in worst.items()))
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("recompute", [{"recompute": "full"}, {"recompute": "selective", "recompute_modules": ["mlp"]}])
def test_recompute_changes_no_bit(alone: dict[str, Any], recompute: dict[str, Any]) -> None:
    run = experts({})
    run = replace(run, train=replace(run.train, **recompute))
    (again,) = ranks(1).run(ours.train, run, batches(), STEPS)
    assert again["losses"] == alone["losses"] and again["norms"] == alone["norms"]


def save(run: Settings, folder: Path) -> tuple[list[tuple], tuple[int, int]]:
    """On a rank: a random model saved from one layout; its shards and its numbers of parameters."""
    model, groups = _random(run)
    dist_checkpointing.save(model_state(model, groups), str(folder))
    return ours.shards(model, groups, {p: p.data for p in model.parameters()}), trained_parameters(model, groups)


def load(run: Settings, folder: Path) -> list[tuple]:
    """On a rank: the same loaded at another."""
    model, groups = _random(replace(run, train=replace(run.train, seed=7)))
    for part, state in zip(model, dist_checkpointing.load(model_state(model, groups), str(folder)).values(), strict=True):
        part.load_state_dict(state, strict=False)
    return ours.shards(model, groups, {p: p.data for p in model.parameters()})


def _random(run: Settings) -> Any:
    model, _, groups = ours.build(run.model, vars(run.parallel))
    initialize(model, run.train.seed, sharding_metadata(groups))
    return model, groups


def test_a_checkpoint_knows_no_expert_parallelism(tmp_path: Path) -> None:
    saved = ranks(2).run(save, experts({"expert": 2}), tmp_path)
    whole = ours.assemble([shard for shards, _ in saved for shard in shards])
    assert {counts for _, counts in saved} == {(sum(map(torch.numel, whole.values())),) * 2}
    for parallel in ({"tensor": 2}, {"pipeline": 2}):
        loaded = ours.assemble([shard for shards in ranks(2).run(load, experts(parallel), tmp_path) for shard in shards])
        assert loaded.keys() == whole.keys() and all(torch.equal(loaded[name], whole[name]) for name in whole)


def router_gradient(run: Settings, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """On a rank: the gradient of the first router's weights, these weights, and the tokens [T, H] it saw."""
    model, groups = _random(run)
    router = model[0].language_model.decoder.layers[0].mlp.router
    seen: list[torch.Tensor] = []
    router.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()[:, 0]))
    ddp = distribute(model, run.parallel, groups)
    ddp[0].zero_grad_buffer()
    forward_backward(ddp, [batch], groups, ours.CPU, force_all_reduce=True)
    result = router.weight.main_grad.clone(), router.weight.detach().clone(), seen[0]
    process_groups.destroy()
    return result


def test_balancing_loss_is_that_of_switch_transformers() -> None:
    """Its gradient, by transformers' own function. A mean over tokens as the loss is: weighed by tokens per labelled token."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    (batch,) = oracle.pack(oracle.make_samples(), [[0, 1, 3]])
    weight = 0.03
    (without,) = ranks(1).run(router_gradient, experts({}, num_layers=1), batch)
    (with_it,) = ranks(1).run(router_gradient, experts({}, num_layers=1, router_aux_loss=weight), batch)
    matrix = without[1].requires_grad_()
    theirs = load_balancing_loss_func((torch.nn.functional.linear(without[2], matrix),), 4, 2) / 2  # they add up the chosen two
    theirs.backward()
    expected = matrix.grad * weight * len(batch.labels_T) / batch.loss_tokens
    assert expected.abs().max() > 0
    assert torch.allclose(with_it[0] - without[0], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


def test_replicas_that_share_experts_do_not_generate() -> None:
    """They would wait for each other for ever, as each answers at its own pace."""
    with pytest.raises(SettingsError, match="parallel.expert must be 1 to generate"):
        Inference(experts({"expert": 2}), None)
