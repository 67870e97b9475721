"""config.json and settings: the tables against transformers' own defaults, and the published models."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, LlavaConfig

from llava_mcore.conversion import hf_config
from llava_mcore.settings.compose import compose
from llava_mcore.settings.families import DECODERS, TOWERS

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
import family_models  # noqa: E402


@pytest.mark.parametrize(("known", "name"), [(known, name) for known in (DECODERS, TOWERS) for name in known])
def test_defaults_are_transformers(known: dict, name: str) -> None:
    """What a published config.json leaves out, and that its other constants are those we insist on."""
    family = known[name]
    theirs = CONFIG_MAPPING[family.model_type]()
    for key, value in family.defaults.items():
        if key in ("rope_theta", "partial_rotary_factor"):
            assert theirs.rope_parameters.get(key, 1.0) == value, key
        elif value is None:  # left out, and computed where it is needed
            heads = theirs.num_attention_heads
            assert getattr(theirs, key, None) in (None, heads, theirs.hidden_size // heads), key
        else:
            assert getattr(theirs, key) == value, key
    for key, allowed in family.only.items():
        found = getattr(theirs, key, None)
        assert set(found if isinstance(found, list) else [found]) <= set(allowed), key


@pytest.mark.parametrize("name", family_models.ALL)
def test_a_config_of_our_own_is_the_same_model(name: str, tmp_path: Path) -> None:
    """From settings to a config.json as transformers reads and writes it, and back to the same settings."""
    model = hf_config.to_settings(family_models.config(name).to_dict())
    (tmp_path / "config.json").write_text(json.dumps(hf_config.from_settings(model, bos_id=1, eos_id=2)))
    again = LlavaConfig.from_pretrained(tmp_path)
    theirs = family_models.config(name)
    assert again.text_config.rope_parameters == theirs.text_config.rope_parameters
    assert hf_config.same_model(hf_config.to_settings(again.to_dict()), model)
    longer = replace(model, language=replace(model.language, max_position_embeddings=512, rotary_base=7e5))
    changed = hf_config.updated(json.loads((tmp_path / "config.json").read_text()), longer)
    assert hf_config.same_model(hf_config.to_settings(changed), longer) and not hf_config.same_model(model, longer)


def test_a_config_without_parts() -> None:
    filled = LlavaConfig().to_dict()
    assert {key: filled["vision_config"][key] for key in hf_config.LLAVA_TOWER} == hf_config.LLAVA_TOWER
    bare = {"model_type": "llava", "image_token_index": 9}  # the default is outside the default vocabulary
    full = json.loads(LlavaConfig(image_token_index=9).to_json_string(use_diff=False))
    assert hf_config.to_settings(bare) == hf_config.to_settings(full)


def published(size: str) -> dict:
    """config.json of llava-hf/llava-1.5-*-hf in the parts that matter: what equals a default is left out."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    if size == "13b":
        wide = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
        text |= wide | {"num_attention_heads": 40, "num_key_value_heads": 40}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "torch_dtype": "float16",
        "text_config": text,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
    }


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_shipped_models_are_the_published_ones(size: str) -> None:
    ours = compose([f"experiment=pretrain_llava_{size}"]).model
    assert hf_config.same_model(hf_config.to_settings(published(size)), ours)


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_config_from_settings(size: str, tmp_path: Path) -> None:
    """transformers reads what is written as the same model, and writes it back as the same model."""
    model = hf_config.to_settings(published(size))
    (tmp_path / "config.json").write_text(json.dumps(hf_config.from_settings(model, bos_id=1, eos_id=2)))
    loaded = LlavaConfig.from_pretrained(tmp_path)
    assert loaded.image_token_id == 32000 and loaded.text_config.bos_token_id == 1 and loaded.image_seq_length == 576
    loaded.save_pretrained(tmp_path / "again")
    again = hf_config.to_settings(json.loads((tmp_path / "again/config.json").read_text()))
    assert hf_config.same_model(again, model)


def test_older_entries() -> None:
    config = published("7b")
    config["text_config"]["rope_theta"] = 1e6
    config["image_token_id"] = config.pop("image_token_index")
    config["vision_feature_layer"] = 22
    model = hf_config.to_settings(config)
    assert (model.language.rotary_base, model.image_token_id, model.vision.select_layer) == (1e6, 32000, -3)
    assert model.vision.used_layers == 22


def test_only_what_differs_is_changed() -> None:
    config = published("7b")
    model = hf_config.to_settings(config)
    assert hf_config.updated(config, model) == config
    model.vision.select_feature, model.vision.select_layer, model.image_token_id = "cls_patch", -1, 7
    model.language.tie_word_embeddings = True
    changed = hf_config.updated(config, model)
    assert hf_config.same_model(hf_config.to_settings(changed), model)
    assert config == published("7b")
    assert changed["vision_config"] == config["vision_config"]
    assert hf_config.set_dtype(config, "bfloat16")["torch_dtype"] == "bfloat16"
