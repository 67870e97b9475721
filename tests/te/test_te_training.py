"""Training runs in bfloat16 and FP8 with the layers of Transformer Engine: FP8 follows bfloat16, and a run that was stopped and
started again is, to the last bit, the run that was not. Real but for the kernels; see te_on_cpu.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "training"), str(HERE.parent / "models")]

import runs  # noqa: E402
from runs import Material, Result  # noqa: E402
from te_on_cpu import BLACKWELL, HOPPER, needs_te  # noqa: E402

from llava_mcore.conversion import distributed  # noqa: E402
from llava_mcore.settings.schema import PrecisionSettings, Settings  # noqa: E402
from llava_mcore.training import checkpoint_folder  # noqa: E402
from llava_mcore.training.observe import read_metrics  # noqa: E402
from llava_mcore.training.trainer import Trainer  # noqa: E402

pytestmark = needs_te

# Sizes that every recipe takes.
MODEL = {
    "vision": {**runs.MODEL["vision"], "hidden_size": 64, "ffn_hidden_size": 128},  # type: ignore[dict-item]
    "language": {**runs.MODEL["language"], "hidden_size": 128, "ffn_hidden_size": 256, "max_position_embeddings": 512},  # type: ignore[dict-item]
}
EXPERTS = {**MODEL, "language": {**MODEL["language"], "family": "mixtral", "num_experts": 4}}
EVERYWHERE = {"fp8_modules": ["language_model", "projector", "vision_tower"]}
IN_FP8 = {"fp8": "hybrid", "fp8_param_gather": True}

# Name to (ranks and what they are prepared by, layout, precision).
CASES: dict[str, tuple[tuple[int, tuple], dict[str, Any], dict[str, Any]]] = {
    "bfloat16": ((1, HOPPER), {}, {}),
    "tensorwise": ((1, HOPPER), {}, {"fp8": "hybrid", "fp8_first_last_bf16": 1}),
    "mxfp8": ((1, BLACKWELL), {}, {"fp8": "e4m3", "fp8_recipe": "mxfp8"}),
    "delayed, TP2": ((2, HOPPER), {"tensor": 2}, {"fp8": "hybrid", "fp8_recipe": "delayed"}),
    "every module, TP2 encoder split": (
        (2, HOPPER),
        {"tensor": 2, "encoder": "tensor_parallel"},
        {"fp8": "hybrid", **EVERYWHERE},
    ),
    "tensorwise, TP2 overlapped": ((2, HOPPER), {"tensor": 2, "tp_comm_overlap": True}, {"fp8": "hybrid"}),
    "tensorwise, CP2 p2p": ((2, HOPPER), {"context": 2, "context_exchange": "p2p"}, {"fp8": "hybrid"}),
    "weights, every module": ((1, HOPPER), {}, {**IN_FP8, **EVERYWHERE}),
    "weights, delayed, DP2 overlap": (
        (2, HOPPER),
        {"overlap_grad_reduce": True, "overlap_param_gather": True},
        {**IN_FP8, "fp8_recipe": "delayed"},
    ),
    "weights, blockwise, DP2": ((2, HOPPER), {}, {**IN_FP8, "fp8": "e4m3", "fp8_recipe": "blockwise"}),
    "weights of experts, EP2": ((2, HOPPER), {"expert": 2}, IN_FP8),
}
FP8_LOSS = 0.01  # FP8 has 3 or 4 bits; measured: 0.2 %


def settings(material: Material, case: str, folder: Path, **train: Any) -> Settings:
    _, parallel, precision = CASES[case]
    run = material.settings(
        folder,
        model=EXPERTS if "experts" in case else MODEL,
        data={"sequence_length": 512},
        train={"dtype": "bfloat16", **train},
        parallel=parallel,
    )
    return replace(run, precision=PrecisionSettings(backend="transformer_engine", **precision))


def values(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What this rank's weights stand for."""
    from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

    return {
        name: (dequantize_fp8_tensor(weight) if is_float8tensor(weight) else weight).detach().clone()
        for name, weight in trainer.model.named_parameters()
    }


def fit(run: Settings) -> dict[str, torch.Tensor]:
    """On a rank: a whole run; its last weights."""
    import te_on_cpu

    te_on_cpu.forget()
    trainer = Trainer(run)
    trainer.fit()
    return values(trainer)


def trained(case: str, run: Settings) -> Result:
    """The run at its layout."""
    answers = ranks(*CASES[case][0]).run(fit, run)
    lines = read_metrics(run.train.output_dir)
    weights = {f"{name} on rank {rank}": value for rank, answer in enumerate(answers) for name, value in answer.items()}
    return Result([line["loss"] for line in lines], [line["grad_norm"] for line in lines], weights)


@pytest.fixture(scope="module")
def runs_material(shards: Path, tokenizer: Path) -> Material:
    return Material(shards, tokenizer)


@pytest.fixture(scope="module")
def plain(runs_material: Material, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """In bfloat16, with torch's layers."""
    run = settings(runs_material, "bfloat16", tmp_path_factory.mktemp("plain"))
    return runs.train("1", replace(run, precision=PrecisionSettings(backend="torch")))


@pytest.mark.parametrize("case", CASES)
def test_learns_as_in_bfloat16_and_resumes_bit_identical(
    runs_material: Material, tmp_path: Path, plain: Result, case: str
) -> None:
    whole = trained(case, settings(runs_material, case, tmp_path / "whole"))
    assert whole.losses[-1] < whole.losses[0] - 0.5
    if "experts" not in case:
        assert whole.losses == pytest.approx(plain.losses, rel=FP8_LOSS) and whole.losses != plain.losses
    trained(case, settings(runs_material, case, tmp_path / "stopped", stop_after=runs.STEPS // 2))
    runs.assert_same(trained(case, settings(runs_material, case, tmp_path / "stopped")), whole)


def scales(run: Settings) -> list[list[float]]:
    """On a rank, at the start of a run: the scales of each of its modules that multiplies in FP8."""
    import te_on_cpu

    te_on_cpu.forget()
    found = [
        module.fp8_meta["scaling_fwd"]
        for module in Trainer(run).model.modules()
        if "scaling_fwd" in getattr(module, "fp8_meta", {})
    ]
    return [state.scale.tolist() + state.amax_history.flatten().tolist() for state in found]


def test_delayed_scaling_goes_on_at_another_layout(runs_material: Material, tmp_path: Path) -> None:
    case = "delayed, TP2"
    run = settings(runs_material, case, tmp_path / "run", stop_after=2)
    trained(case, run)
    here, _ = ranks(2, HOPPER).run(scales, run)
    first, second = ranks(2, HOPPER).run(scales, replace(run, parallel=replace(run.parallel, tensor=1, pipeline=2)))
    assert len(here) == 4 * 4 and all(state[0] != 1.0 for state in here)
    assert first and second and sorted(first + second) == sorted(here)


def at_start(run: Settings) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """On a rank, at the start of a run: what the weights stand for, and the copies that the optimizer trains."""
    if run.precision.backend == "transformer_engine":
        import te_on_cpu

        te_on_cpu.forget()
    trainer = Trainer(run)
    trained_ = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return values(trainer), {name: weight.main_param.clone() for name, weight in trained_.items()}


def given(run: Settings) -> dict[str, torch.Tensor]:
    """The weights that the run starts from, with torch's layers."""
    run = replace(run, precision=PrecisionSettings(backend="torch"), train=replace(run.train, resume=False))
    ((found, _),) = ranks(1).run(at_start, run)
    return found


def test_the_optimizer_starts_from_what_the_weights_were_given(runs_material: Material, tmp_path: Path) -> None:
    run = settings(runs_material, "weights, every module", tmp_path / "run")
    ((found, copies),) = ranks(1, HOPPER).run(at_start, run)
    expected = given(run)
    quantized = [name for name in found if name in expected and not torch.equal(found[name], expected[name])]
    assert len(quantized) > 20
    for name in quantized:
        assert torch.equal(copies[name], expected[name].float().flatten()), name
        assert (found[name] - expected[name]).abs().max() < 0.07 * expected[name].abs().max(), name  # e4m3 has 3 bits


@pytest.mark.parametrize("freeze", [[], ["vision_tower"]], ids=["all trained", "tower frozen"])
def test_checkpoints_hold_what_was_trained_and_not_its_fp8(
    runs_material: Material, tmp_path: Path, freeze: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = "weights, every module"
    run = settings(runs_material, case, tmp_path / "run", stop_after=2, freeze=freeze)
    trained(case, run)
    monkeypatch.setattr(distributed, "OUR_PREFIXES", ("",))  # the optimizer's too
    reader = distributed.DistributedReader(checkpoint_folder.newest(tmp_path / "run") / checkpoint_folder.WEIGHTS)  # type: ignore[operator]
    copy = "optimizer.state.param."
    names = [name for name in reader.infos if copy + name in reader.infos]
    assert any(name.startswith("vision_tower") for name in names) == (not freeze) and len(names) > 40 // (1 + len(freeze))
    for name in names:
        assert torch.equal(reader.read(name), reader.read(copy + name).bfloat16()), name
    first = {name.removeprefix("0."): weight for name, weight in given(run).items()}
    frozen = [name for name in first if name in reader.infos and name.startswith(tuple(freeze))]
    assert len(frozen) > 20 if freeze else not frozen
    for name in frozen:
        assert torch.equal(reader.read(name), first[name]), name
