"""save_pretrained -> import -> export -> from_pretrained: the same names, the same bits, the same logits."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
import yaml
from conversion_material import VARIANTS, assert_same, edit_json, export_hf, import_hf, logits, make_model, rewrite, tensors
from transformers import LlavaForConditionalGeneration

from llava_mcore.conversion import views
from llava_mcore.conversion.convert import compare_paths
from llava_mcore.conversion.describe import describe, inspect
from llava_mcore.conversion.hf_config import same_model
from llava_mcore.training import checkpoint_folder as folder


def load(path: Path) -> LlavaForConditionalGeneration:
    """The model as transformers loads it, nothing missing and nothing left over."""
    model, info = LlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_bits_names_and_logits(saved: dict[str, Path], tmp_path: Path, name: str) -> None:
    report = import_hf(saved[name], tmp_path / "checkpoint")
    assert report is not None and report.ok
    back = export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert back is not None and back.ok
    assert_same(tensors(tmp_path / "back"), tensors(saved[name]))
    assert report.tensors >= len(tensors(saved[name]))
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (saved[name] / file).read_bytes()
    before, after = logits(load(saved[name])), logits(load(tmp_path / "back"))
    assert before.abs().max() > 0 and torch.equal(before, after)


def published(name: str) -> str:
    """Names of llava-hf/llava-1.5-7b-hf as it is published."""
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1) if name.startswith("vision_tower.") else name


def v4_52(name: str) -> str:
    """Names that transformers 4.52 had in memory."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    name = name.replace("language_model.model.", "language_model.", 1)
    return "model." + published(name)


def v4_52_short(name: str) -> str:
    """The same with the tower's names of transformers 5."""
    return v4_52(name).replace("vision_model.", "")


@pytest.mark.parametrize("rename", [published, v4_52, v4_52_short])
@pytest.mark.parametrize("name", ["groups2", "groups3_tied_full"])
def test_older_names(saved: dict[str, Path], tmp_path: Path, rename, name: str) -> None:
    old = rewrite(
        shutil.copytree(saved[name], tmp_path / "old"), lambda content: {rename(key): value for key, value in content.items()}
    )
    import_hf(old, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), tensors(old))
    assert torch.equal(logits(load(tmp_path / "back")), logits(load(saved[name])))
    # The weights do not depend on how the source named them.
    assert compare_paths(tmp_path / "checkpoint", saved[name]).ok
    assert compare_paths(old, saved[name]).ok


def test_buffers_of_old_versions_come_back(saved: dict[str, Path], tmp_path: Path) -> None:
    def add(content: dict[str, torch.Tensor]) -> None:
        content["vision_tower.embeddings.position_ids"] = torch.arange(17)[None]
        content["language_model.model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.rand(4)

    old = rewrite(shutil.copytree(saved["groups2"], tmp_path / "old"), add)
    import_hf(old, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), tensors(old))


def test_stored_tied_head_comes_back(saved: dict[str, Path], tmp_path: Path) -> None:
    def add(content: dict[str, torch.Tensor]) -> None:
        content["language_model.lm_head.weight"] = content["language_model.model.embed_tokens.weight"].clone()

    old = rewrite(shutil.copytree(saved["groups3_tied_full"], tmp_path / "old"), add)
    import_hf(old, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), tensors(old))


def test_shards(saved: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    LlavaForConditionalGeneration.from_pretrained(saved["groups2"]).save_pretrained(source, max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    import_hf(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back", max_shard_bytes=40_000)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 50_000 for file in files)
    assert_same(tensors(tmp_path / "back"), tensors(saved["groups2"]))
    ours, theirs = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (tmp_path / "back", source))
    assert ours["metadata"] == theirs["metadata"] and ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert torch.equal(logits(load(tmp_path / "back")), logits(load(saved["groups2"])))


def test_dtype(saved: dict[str, Path], tmp_path: Path) -> None:
    import_hf(saved["groups2"], tmp_path / "half", dtype="bfloat16")
    report = export_hf(tmp_path / "half", tmp_path / "back")
    assert report is not None and {kind for line in report.lines.values() for kind in line.dtypes} == {"bfloat16"}
    assert_same(tensors(tmp_path / "back"), {k: v.bfloat16() for k, v in tensors(saved["groups2"]).items()})
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
    assert load(tmp_path / "back").dtype == torch.bfloat16
    import_hf(saved["groups2"], tmp_path / "full")
    export_hf(tmp_path / "full", tmp_path / "cast", dtype="bfloat16")
    assert_same(tensors(tmp_path / "cast"), tensors(tmp_path / "back"))


def test_not_a_number_is_kept(saved: dict[str, Path], tmp_path: Path) -> None:
    def spoil(content: dict[str, torch.Tensor]) -> None:
        content["language_model.model.norm.weight"][:3] = torch.tensor([float("nan"), -0.0, float("inf")])

    source = rewrite(shutil.copytree(saved["groups2"], tmp_path / "source"), spoil)
    import_hf(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), tensors(source))


def test_folder_of_a_checkpoint(saved: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(saved["groups2"], tmp_path / "source")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "preprocessor_config.json").write_text('{"size": 28}')
    checkpoint = tmp_path / "checkpoint"
    import_hf(source, checkpoint)
    meta = folder.read_meta(folder.require_checkpoint(checkpoint))
    assert (meta["format"], meta["step"], meta["contents"]) == (1, 0, ["model"])
    assert sorted(path.name for path in checkpoint.iterdir()) == ["hf", "meta.json", "settings.yaml", "tokenizer", "weights"]
    assert (checkpoint / "tokenizer/tokenizer_config.json").is_file()
    model = folder.read_model_settings(checkpoint)
    assert (model.language.query_groups, model.language.vocab_size, model.vision.used_layers) == (2, 101, 2)
    assert model.image_token_id == 100 and model.language.rotary_base == 5000.0
    # What a trainer does: its own checkpoint, with the sidecars carried along.
    (tmp_path / "trained").mkdir()
    folder.copy_sidecars(checkpoint, tmp_path / "trained")
    for name in ("meta.json", "settings.yaml"):
        shutil.copy(checkpoint / name, tmp_path / "trained" / name)
    shutil.copytree(checkpoint / "weights", tmp_path / "trained/weights")
    export_hf(tmp_path / "trained", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), tensors(source))
    assert {path.name for path in source.iterdir()} == {path.name for path in (tmp_path / "back").iterdir()}


def test_describe_and_inspect(saved: dict[str, Path], tmp_path: Path) -> None:
    import_hf(saved["groups2"], tmp_path / "checkpoint", verify=False)
    text = describe(saved["groups2"])
    assert all(name in text for name in tensors(saved["groups2"]))
    assert "language_model.decoder.layers.2.mlp.linear_fc1.weight" in describe(tmp_path / "checkpoint")
    one, other = inspect(saved["groups2"]), inspect(tmp_path / "checkpoint")
    assert one["model"] == other["model"] and one["bytes"] == other["bytes"] and other["meta"]["step"] == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_trained_from_scratch(saved: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Without hf/ the config is written from the settings, and the tower ends at the selected layer."""
    checkpoint = tmp_path / "checkpoint"
    import_hf(saved[name], checkpoint)
    shutil.rmtree(checkpoint / "hf")
    export_hf(checkpoint, tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["vision_feature_layer"] == -1
    assert config["vision_config"]["num_hidden_layers"] == folder.read_model_settings(checkpoint).vision.used_layers
    assert torch.equal(logits(load(tmp_path / "back")), logits(load(saved[name])))
    # What was exported can be imported again and is the same model.
    import_hf(tmp_path / "back", tmp_path / "again")
    assert compare_paths(tmp_path / "again", tmp_path / "back").ok


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_scratch_files(saved: dict[str, Path], tmp_path: Path, mode: str) -> None:
    """Special ids and the preprocessing come from the tokenizer and the data settings."""
    import numpy as np
    from material import make_tokenizer
    from PIL import Image
    from transformers import AutoImageProcessor, AutoProcessor, GenerationConfig

    from llava_mcore.data.image import preprocess

    checkpoint = tmp_path / "checkpoint"
    import_hf(saved["groups2"], checkpoint)
    shutil.rmtree(checkpoint / "hf")
    make_tokenizer(checkpoint / "tokenizer")
    settings = folder.read_settings(checkpoint)
    settings["model"]["image_token_id"] = 3
    settings["data"] = {"image_mode": mode, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (checkpoint / "settings.yaml").write_text(yaml.safe_dump(settings))
    export_hf(checkpoint, tmp_path / "back")
    generation = GenerationConfig.from_pretrained(tmp_path / "back")
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    assert load(tmp_path / "back").config.text_config.eos_token_id == 2
    assert (tmp_path / "back/tokenizer.model").read_bytes() == (checkpoint / "tokenizer/tokenizer.model").read_bytes()

    # One picture in a prompt takes as many tokens as the model wants, and the model takes what the processor gives.
    assistant = AutoProcessor.from_pretrained(tmp_path / "back")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 37, 3), dtype=np.uint8))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "back", backend="pil")
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    ours = preprocess(image, mode, 28, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    inputs = assistant(images=image, text="What is <image> here?", return_tensors="pt")
    assert int((inputs["input_ids"] == 3).sum()) == 16
    assert load(tmp_path / "back")(**inputs).logits.isfinite().all()


def test_changed_settings_reach_the_config(saved: dict[str, Path], tmp_path: Path) -> None:
    """Training may lengthen the context of an imported model: its config.json follows, and nothing else changes."""
    checkpoint = tmp_path / "checkpoint"
    import_hf(saved["groups2"], checkpoint)
    model = folder.read_model_settings(checkpoint)
    model.language.max_position_embeddings, model.language.rotary_base = 256, 7000.0
    folder.write_model_settings(checkpoint, model)
    export_hf(checkpoint, tmp_path / "back")
    before, after = (json.loads((path / "config.json").read_text()) for path in (saved["groups2"], tmp_path / "back"))
    text = before["text_config"]
    text["max_position_embeddings"], text["rope_theta"], text["rope_parameters"]["rope_theta"] = 256, 7000.0, 7000.0
    assert after == before
    with closing(views.HuggingFaceView(tmp_path / "back")) as view:
        assert same_model(view.settings, model)


def test_published_config_leaves_out_defaults(saved: dict[str, Path], tmp_path: Path) -> None:
    """A config.json that says only what differs from transformers' defaults means the same model."""
    from transformers import LlavaConfig

    torch.manual_seed(0)
    source = tmp_path / "source"
    make_model(select=-2).save_pretrained(source)
    edit_json(source / "config.json", lambda config: [config.pop(k) for k in ("vision_feature_layer", "projector_hidden_act")])
    edit_json(source / "config.json", lambda config: config["text_config"].pop("model_type"))
    assert LlavaConfig.from_pretrained(source).vision_feature_layer == -2
    import_hf(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()
