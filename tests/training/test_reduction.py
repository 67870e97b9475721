"""Merging and pooling in whole runs: a schedule, going on from other weights, export, and what it all costs."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from ranks import ranks
from runs import MODEL, KeptRuns, Material

from llava_mcore.conversion.convert import export_hf
from llava_mcore.conversion.families import ConversionError
from llava_mcore.data.loader import StreamLoader
from llava_mcore.data.plan import Planner
from llava_mcore.data.shards import ShardDataset
from llava_mcore.data.sources import open_blend
from llava_mcore.data.tokenizer import load_tokenizer
from llava_mcore.evaluation.inference import Inference
from llava_mcore.settings.compose import SettingsError, compose, dump_yaml
from llava_mcore.settings.schema import Settings, TokenMerging
from llava_mcore.training import checkpoint_folder, prices
from llava_mcore.training.observe.flops import FlopsCounter
from llava_mcore.training.prices import layer_activations

ROOT = Path(__file__).resolve().parents[2]
TINY = ["experiment=quickstart"]
SCHEDULE = {"token_merging": {"ratio": 0.75, "schedule_steps": 4}}
EACH = [16, 16, 13, 9, 4, 4]  # 12 (1 - cos(pi/2 step/4)) of 16 patches are merged, rounded down


def of(material: Material, folder: Path, projector: dict[str, Any], **train: Any) -> Settings:
    model = {**MODEL, "projector": {**MODEL["projector"], **projector}}  # type: ignore[dict-item]
    return material.settings(folder, model=model, train=train)


def test_a_schedule_resumes_where_it_was(runs_material: Material, tmp_path: Path) -> None:
    """Stopped in the middle of its rise, and at another layout too."""
    whole = runs.train("1", of(runs_material, tmp_path / "whole", SCHEDULE))
    runs.train("1", of(runs_material, tmp_path / "half", SCHEDULE, stop_after=2))
    runs.assert_same(runs.train("1", of(runs_material, tmp_path / "half", SCHEDULE)), whole)
    runs.assert_close(runs.train("TP2", of(runs_material, tmp_path / "tp2", SCHEDULE)), whole)


@pytest.mark.parametrize(("window", "expected"), [(0, EACH), (14, [16, 16, 13, 13, 4, 4]), (28, [16, 16, 16, 16, 4, 4])])
def test_the_loader_follows_the_schedule(runs_material: Material, tmp_path: Path, window: int, expected: list[int]) -> None:
    """A window of several steps, whose streams are packed together, has as many as its first step."""
    settings = of(runs_material, tmp_path, SCHEDULE)
    model = settings.model
    data = replace(settings.data, packing_window=window)
    tokenizer = load_tokenizer(data.tokenizer or "")
    planner = Planner(
        open_blend(data, tokenizer, 1, 7),
        data,
        model.geometry,
        seed=1,
        global_batch_size=7,
        total_samples=7 * len(EACH),
        schedule=model.geometry_at,
    )
    loader = StreamLoader(planner, tokenizer, data, model.image_token_id, rank=0, size=1, micro_batch_size=1)
    for step, each in zip(loader, expected, strict=True):
        assert step.pictures > 0 and step.visual_tokens == each * step.pictures
        for batch in step.batches:
            assert len(batch.image_index_E) == each * len(batch.pixel_values_NCHW)
            assert (batch.input_ids_T == model.image_token_id).sum() == len(batch.image_index_E)


def test_weights_go_from_one_way_to_another(kept: KeptRuns, runs_material: Material, tmp_path: Path) -> None:
    """Merging and pooling have no weights; a pixel shuffle has a wider projector, and says so."""
    kept.whole("1")
    source = str(checkpoint_folder.newest(kept.root / "whole-1-float32"))
    one = {"steps": 1, "init_from": source, "lr": 1e-9}
    for number, projector in enumerate(({"token_merging": {"ratio": 0.5}}, {"pooling": {"kind": "max"}})):
        started = runs.train("1", of(runs_material, tmp_path / str(number), projector, **one))
        assert runs.largest_difference(started.weights, kept.whole("1").weights) < 1e-5
    wider = of(runs_material, tmp_path / "wider", {"pooling": {"kind": "pixel_shuffle"}}, **one)
    ((kind, says),) = ranks(1).run(runs.refused, wider)
    assert kind == "CheckpointError" and "model.projector.pooling.kind: None in the checkpoint, 'pixel_shuffle' here" in says


def answers(settings: Settings, checkpoint: Path) -> list[str]:
    """On a rank: what a trained model says of the first samples."""
    inference = Inference(settings, checkpoint)
    dataset = ShardDataset(settings.data.path or "")
    prompts = [inference.prompt(dataset, index) for index in range(4)]
    each = settings.model.embeddings_per_image
    for prompt in prompts:
        assert (prompt.input_ids_L == settings.model.image_token_id).sum() == each * len(prompt.pixels_nCHW)
    return inference.answer(prompts, 3)


def test_a_trained_model_answers(runs_material: Material, tmp_path: Path) -> None:
    """With as many embeddings as at the end of its schedule, whatever the layout."""
    settings = of(runs_material, tmp_path / "run", SCHEDULE, lr=0.01)
    runs.train("1", settings)
    checkpoint = checkpoint_folder.newest(tmp_path / "run")
    (alone,) = ranks(1).run(answers, settings, checkpoint)
    assert len(alone) == 4
    assert ranks(2).run(answers, runs.on("TP2", settings), checkpoint) == [alone, alone]


def answered(settings: Settings, positions: int | None, tokens: int) -> tuple[int, str]:
    """On a rank: tokens of the first prompt, and what a random model says to it, of a decoder of so many positions."""
    if positions is not None:
        language = replace(settings.model.language, max_position_embeddings=positions)
        settings = replace(settings, model=replace(settings.model, language=language))
    inference = Inference(settings, None)
    prompt = inference.prompt(ShardDataset(settings.data.path or ""), 0)
    assert len(prompt.pixels_nCHW) == 1
    return len(prompt.input_ids_L), inference.answer([prompt], tokens)[0]


def test_an_answer_ends_with_the_positions(runs_material: Material, tmp_path: Path) -> None:
    settings = of(runs_material, tmp_path, {"pooling": {"kind": "max"}})
    ((length, two),) = ranks(1).run(answered, settings, None, 2)
    beside = 16 - 4
    short = replace(settings, data=replace(settings.data, sequence_length=length + beside))
    ((_, found),) = ranks(1).run(answered, short, length + beside + 1, 5)
    assert two and found == two != ranks(1).run(answered, settings, None, 5)[0][1]


@pytest.mark.parametrize(
    ("projector", "says"),
    [
        ({"token_merging": {"ratio": 0.5}}, "model.projector.token_merging makes 8 embeddings of a picture"),
        ({"pooling": {"kind": "pixel_shuffle"}}, "model.projector.pooling makes 4 embeddings of a picture"),
    ],
)
def test_export_says_what_transformers_lacks(
    runs_material: Material, tmp_path: Path, projector: dict[str, Any], says: str
) -> None:
    runs.train("1", of(runs_material, tmp_path / "run", projector, steps=1))
    with pytest.raises(ConversionError, match=f"{says}.* would make 16.*=null and export that one"):
        export_hf(checkpoint_folder.newest(tmp_path / "run") or "", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- settings ----


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.projector.token_merging={ratio: 1.0}"], "ratio=1.0: should be less than 1"),
        (["model.projector.token_merging={ratio: -0.1}"], "ratio=-0.1: should be greater than or equal to 0"),
        (
            ["model.projector.token_merging={ratio: 0.9}"],
            "leaves 2 of 16 patches, but each of the 4 windows of 2 x 2 keeps one; use",
        ),
        (["model.projector.token_merging={ratio: 0.5, window: 5}"], "window 5 is larger than the picture's 4 x 4 patches"),
        (["model.projector.token_merging={ratio: 0.5, window: 1}"], "window=1: should be greater than or equal to 2"),
        (
            ["model.projector.pooling={kind: max, stride: 3}"],
            "stride 3 does not divide the picture's 4 x 4 patches; use one of 2, 4",
        ),
        (
            ["model.projector.token_merging={ratio: 0.2, scope: window}"],
            "ratio 0.2 merges none of the 4 patches of a window; use at least 0.25",
        ),
        (
            ["model.projector.token_merging={ratio: 0.5, scope: window, order: blocks}"],
            "order=blocks needs token_merging.scope=picture",
        ),
        (
            ["model.vision.image_size=35", "model.projector.token_merging={ratio: 0.5, scope: window}"],
            "window 2 does not divide the picture's 5 x 5 patches; use one of 5 or token_merging.scope=picture",
        ),
        (["model.projector.pooling={kind: pixel_shuffle, where: after}"], "set pooling.where=before"),
        (["model.projector.pooling={kind: max}", "model.projector.token_merging={ratio: 0.5}"], "exclude each other"),
        (
            ["model.projector.pooling={kind: max}", "model.anyres={grids: [[1, 2]]}"],
            "projector.pooling would take the grid of features from anyres",
        ),
        (
            ["model.vision.token_merging={tokens: 2}", "model.video.pool=average"],
            "vision.token_merging would take the grid of features from video.pool other than none; change one of them",
        ),
        (
            ["model.vision.token_merging={tokens: 2}", "model.video.newline=grid", "model.anyres.merge=spatial"],
            "the grid of features from anyres.merge other than flat and video.newline=grid",
        ),
        (["model.projector.pooling={kind: max}", "model.vision.select_feature=cls_patch"], "set vision.select_feature=patch"),
        (["model.projector.pooling={kind: max}", "model.vision.token_merging={tokens: 2}"], "no grid of patches"),
        (["model.vision.token_merging={tokens: 0}"], "tokens=0: should be greater than 0"),
        (
            ["model.vision.token_merging={tokens: 2}", "precision.fp8=hybrid", "precision.fp8_modules=[vision_tower]"],
            "leave vision_tower out",
        ),
        (
            [
                "data.sequence_length=12",
                "model.language.max_position_embeddings=16",
                "model.projector.token_merging={ratio: 0.5}",
            ],
            "max_position_embeddings 16 has no room for the positions of one picture's 16 patches; set positions=counted",
        ),
        (["model.projector.pooling={kind: max, positions: middle}"], "positions=middle: should be 'kept' or 'counted'"),
        (
            ["data.sequence_length=16", "model.projector.token_merging={ratio: 0.5, schedule_steps: 9}"],
            "one picture of 16 embeddings",
        ),
    ],
)
def test_bad_settings_say_what_to_change(overrides: list[str], says: str) -> None:
    with pytest.raises(SettingsError) as error:
        compose([*TINY, *overrides])
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("side", "ratio", "window", "each"),
    [(24, 0.5, 2, 288), (24, 0.75, 2, 144), (27, 0.5, 2, 365), (27, 0.768, 2, 170), (10, 0.29, 2, 71), (24, 0.0, 2, 576)],
)
def test_embeddings_of_a_picture(side: int, ratio: float, window: int, each: int) -> None:
    """Ratios are decimal: 0.29 of 100 are 29."""
    merging = f"model.projector.token_merging={{ratio: {ratio}, window: {window}}}"
    model = compose(["experiment=finetune_llava_7b", f"model.vision.image_size={14 * side}", merging]).model
    assert model.embeddings_per_image == model.embeddings_at(0) == each
    assert TokenMerging(ratio=0.45, window=3, scope="window").kept(27) == 81 * 5


def test_the_schedule_is_a_quarter_of_a_cosine() -> None:
    model = compose(["experiment=finetune_llava_7b", "model.projector.token_merging={ratio: 0.5, schedule_steps: 4000}"]).model
    found = [model.embeddings_at(step) for step in (0, 1000, 2000, 3999, 4000, 9000)]
    assert found == [576, 576 - 21, 576 - 84, 576 - 287, 288, 288]
    each = np.array([model.embeddings_at(step) for step in range(0, 5000, 50)])
    assert (np.diff(each) <= 0).all()


# ---- the price ----


def test_flops_follow_the_embeddings() -> None:
    """What is saved of each module, by hand, for a tower of 16 patches and a class token and 4 layers."""
    plain, shuffled, before, merging = (
        compose([*TINY, *overrides])
        for overrides in (
            [],
            ["model.projector.pooling={kind: pixel_shuffle}"],
            ["model.projector.pooling={kind: max}"],
            ["model.vision.token_merging={tokens: 3}"],
        )
    )
    width, ffn, decoder = 96, 384, 128
    forward = [FlopsCounter(settings).forward([30], 1) for settings in (plain, shuffled, before, merging)]
    assert forward[0]["projector"] == 2 * 16 * (width * decoder + decoder**2)
    assert forward[1]["projector"] == 2 * 4 * (4 * width * decoder + decoder**2)
    assert forward[2]["projector"] == 2 * 4 * (width * decoder + decoder**2)
    tower = 2 * 16 * 3 * 7**2 * width
    for tokens, left in ((17, 14), (14, 11), (11, 8), (8, 5)):
        tower += 2 * tokens * 4 * width**2 + 4 * width * tokens**2 + 2 * left * 2 * width * ffn
    assert forward[3]["vision_tower"] == tower and merging.model.embeddings_per_image == 4
    assert forward[0]["vision_tower"] == forward[1]["vision_tower"] > tower


def test_estimate_lists_every_mode() -> None:
    base = ["experiment=finetune_llava_7b", "model.projector.token_merging={ratio: 0.1}"]
    settings = compose(base)
    found, refused = prices.of_picture(settings, 1344, 1008, text=64)
    tokens = {price.name: price.tokens for price in found}
    assert tokens["as set"] == 519 and tokens["model.projector.token_merging=null"] == 576 and not refused
    assert tokens["model.projector.token_merging={ratio: 0.5}"] == 288
    for kind in ("average", "pixel_shuffle"):
        assert tokens[f"model.projector.token_merging=null model.projector.pooling={{kind: {kind}}}"] == 144
    for price in found:
        other = compose([*base[:1], *_last([*base[1:], *(re.split(" (?=model)", price.name) if price.name != "as set" else [])])])
        geometry = other.model.geometry
        shape = geometry.picture(1344, 1008, several=False)
        flops = FlopsCounter(other).breakdown([geometry.embeddings(shape) + 64], geometry.tiles(shape))
        assert (price.tokens, price.decoder) == (geometry.embeddings(shape), flops["language_model"]), price.name
    recomputed = compose(["experiment=finetune_llava_7b", "train.recompute=full"])
    assert prices.of_picture(recomputed, 336, 336, 64)[0][0].memory < found[0].memory / 9


def _last(overrides: list[str]) -> list[str]:
    """Of overrides of one setting the last."""
    return list({text.split("=", 1)[0]: text for text in overrides}.values())


def test_activations_are_what_torch_keeps() -> None:
    """Of one more layer, for two sizes; a CPU keeps 4 widths more, and two scales a token."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import _step
    import train_step

    from llava_mcore.parallel import groups as process_groups
    from llava_mcore.platform import device

    device.start()
    for width in (64, 128):
        kept = []
        for layers in (1, 2):
            settings = _step.settings_of(width, 160, layers, 4, 200, (64, 2, 4), ["vision_tower"])
            settings.model.language.num_query_groups = 2
            sample = _step.make_sample(settings.model, 48, True, np.random.default_rng(0))
            ours = _step.Ours(settings, process_groups.build(settings.parallel))
            kept.append(train_step._kept(ours, [sample], settings.model.vision.image_size)[0] / len(sample) / 4)
            process_groups.destroy()
        assert kept[1] - kept[0] == pytest.approx(layer_activations(settings.model.language) + 4 * width, rel=0.01)
    device.stop()


def test_estimate_reads_a_run(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/estimate.py"), "tokens", "--image", "1344x1008", "--config"]
    shown = []
    settings = compose(["experiment=finetune_llava_7b", "model.projector.pooling={kind: max}"])
    (tmp_path / "settings.yaml").write_text(dump_yaml(settings))
    for arguments in (["finetune_llava_7b", "model.projector.pooling={kind: max}"], [str(tmp_path / "settings.yaml")]):
        shown.append(subprocess.run([*command, *arguments], capture_output=True, text=True, check=True).stdout)
    assert shown[0] == shown[1] and "1344x1008 pixels" in shown[0] and re.search("^as set +1 +144 ", shown[0], re.M)
    (tmp_path / "list.yaml").write_text("- 1")
    for arguments, says in (
        (["finetune_llava_7b", "--text", "many"], "'many' is no number of tokens"),
        (["finetune_lava_7b"], "did you mean finetune_llava_7b"),
        ([str(tmp_path / "list.yaml")], "holds no settings"),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and says in done.stderr, done.stderr
