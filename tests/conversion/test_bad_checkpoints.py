"""Every bad input ends in an error that names the file or tensor, and in nothing under the final name."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversion_material import assert_same, edit_json, export_hf, import_hf, make_model, rewrite, tensors

from llava_mcore.conversion import convert, weights
from llava_mcore.conversion.families import ConversionError
from llava_mcore.training import checkpoint_folder as folder
from llava_mcore.training.checkpoint_folder import CheckpointError

Q = "language_model.model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def source(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to spoil, alone in its folder."""
    (tmp_path / "in").mkdir()
    return shutil.copytree(saved["groups2"], tmp_path / "in/source")


@pytest.fixture(scope="module")
def checkpoint(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One import for the tests that only read."""
    path = tmp_path_factory.mktemp("imported") / "checkpoint"
    import_hf(saved["groups2"], path, verify=False)
    return path


def refused(source: Path, *words: str) -> str:
    """The error of an import, in which all words occur; nothing may be left behind."""
    out = source.parents[1] / "out"
    with pytest.raises((ConversionError, CheckpointError)) as error:
        import_hf(source, out / "checkpoint")
    assert all(word in str(error.value) for word in words), error.value
    assert not out.exists() or list(out.iterdir()) == []
    return str(error.value)


def pop(content: dict[str, torch.Tensor]) -> None:
    content.pop(Q)


def add(content: dict[str, torch.Tensor]) -> None:
    content["language_model.model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)


def shorten(content: dict[str, torch.Tensor]) -> None:
    content[Q] = content[Q][:-1]


def double(content: dict[str, torch.Tensor]) -> None:
    content["model.language_model.embed_tokens.weight"] = content["language_model.model.embed_tokens.weight"].clone()


def no_projector(content: dict[str, torch.Tensor]) -> None:
    content.pop("multi_modal_projector.linear_1.weight")


def mixed(content: dict[str, torch.Tensor]) -> None:
    content[Q] = content[Q].half()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (pop, ["missing " + Q]),
        (add, ["unexpected language_model.model.layers.0.self_attn.q_norm.weight", "model.safetensors"]),
        (shorten, [Q, "[47, 48]", "[48, 48]", "model.safetensors"]),
        (double, ["two tensors for one name", "model.language_model.embed_tokens.weight"]),
        (no_projector, ["no projector", "multi_modal_projector.linear_1.weight"]),
        (mixed, [Q, "float16", "--dtype"]),
    ],
)
def test_tensors(source: Path, change: Callable, words: list[str]) -> None:
    refused(rewrite(source, change), *words)


def test_several_problems_come_together(source: Path) -> None:
    message = refused(
        rewrite(rewrite(rewrite(source, add), shorten), lambda c: {k: v for k, v in c.items() if "o_proj" not in k})
    )
    assert "unexpected" in message and "[47, 48]" in message and "layers.2.self_attn.o_proj.weight" in message


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file(source: Path, keep: int) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(source, "model.safetensors", "cut short or damaged")


def test_two_tensors_for_one_name_in_a_file(source: Path) -> None:
    file = source / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    last = "vision_tower.pre_layrnorm.weight"
    header = content[8 : 8 + size].replace(last.encode(), last.replace("weight", "bias").encode().ljust(len(last)), 1)
    header = header.replace(b'pre_layrnorm.bias  "', b'pre_layrnorm.bias"  ')
    file.write_bytes(content[:8] + header + content[8 + size :])
    refused(source, "model.safetensors", "two tensors for one name: vision_tower.pre_layrnorm.bias")


def test_index(source: Path, saved: dict[str, Path]) -> None:
    shutil.rmtree(source)
    from transformers import LlavaForConditionalGeneration

    LlavaForConditionalGeneration.from_pretrained(saved["groups2"]).save_pretrained(source, max_shard_size="100KB")
    index = source / "model.safetensors.index.json"
    good = index.read_text()
    first = sorted(source.glob("*.safetensors"))[0]
    moved = first.rename(source / "elsewhere")
    refused(source, index.name, first.name, "not there")
    moved.rename(first)
    edit_json(index, lambda value: value["weight_map"].update({"strange": first.name}))
    refused(source, first.name, "does not hold strange")
    index.write_text(good)
    held = next(name for name, file in json.loads(good)["weight_map"].items() if file == first.name)
    edit_json(index, lambda value: value["weight_map"].pop(held))
    refused(source, first.name, held, "the index does not place there")
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    refused(source, "../secret.safetensors", "not a file name beside the index")
    index.write_text(good[: len(good) // 2])
    refused(source, index.name, "not an index of weights")
    index.unlink()
    refused(source, "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c.update(model_type="llava_next", architectures=["LlavaNext"]),
            ["LlavaNext", "LlavaForConditionalGeneration"],
        ),
        (
            lambda c: c.update(architectures=["LlavaLlamaForCausalLM"], mm_projector_type="linear"),
            ["mm_projector_type is 'linear'"],
        ),
        (
            lambda c: c["text_config"].update(model_type="gemma"),
            ["text_config.model_type 'gemma'", "known: llama, mistral", "settings/families.py"],
        ),
        (lambda c: c["vision_config"].update(model_type="dinov2"), ["dinov2", "known: clip_vision_model, siglip_vision_model"]),
        (lambda c: c["vision_config"].update(model_type="siglip_vision_model"), ["hidden_act='quick_gelu'", "'default'", "full"]),
        (
            lambda c: c["text_config"]["rope_parameters"].update(rope_type="llama3"),
            ["rope_scaling", "factor is required for type=llama3"],
        ),
        (
            lambda c: c["text_config"].update(rope_scaling={"type": "dynamic", "factor": 2.0}),
            ["'dynamic'", "known for llama: default, linear, llama3, yarn"],
        ),
        (
            lambda c: c["text_config"].update(rope_scaling={"type": "linear", "factor": 2.0, "beta": 3}),
            ["beta for type 'linear'"],
        ),
        (
            lambda c: c["text_config"].update(model_type="qwen2", use_sliding_window=True),
            ["text_config.use_sliding_window=True (must be False)"],
        ),
        (
            lambda c: c["text_config"].update(model_type="qwen3", layer_types=["full_attention", "sliding_attention"]),
            ["layer_types=['full_attention', 'sliding_attention'] (must be 'full_attention')"],
        ),
        (lambda c: c["text_config"].update(sliding_window=64), ["text_config.sliding_window=64"]),
        (lambda c: c["text_config"].update(attention_bias=True), ["text_config.attention_bias=True"]),
        (lambda c: c["vision_config"].update(hidden_act="gelu"), ["vision_config.hidden_act='gelu'", "quick_gelu"]),
        (lambda c: c.update(vision_feature_layer=[-2, -1]), ["vision_feature_layer=[-2, -1]"]),
        (lambda c: c.update(vision_feature_layer=0), ["select_layer"]),
        (lambda c: c.update(multimodal_projector_bias=False), ["multimodal_projector_bias=False"]),
        (lambda c: c.update(quantization_config={"bits": 4}), ["quantization_config"]),
        (lambda c: c.update(image_token_index=101), ["image_token_id 101", "vocabulary of 101"]),
        (lambda c: c["text_config"].update(vocab_size=102), ["[101, 48]", "[102, 48]"]),
        (lambda c: c["text_config"].update(hidden_size=None), ["hidden_size"]),
    ],
)
def test_config(source: Path, change: Callable, words: list[str]) -> None:
    edit_json(source / "config.json", change)
    refused(source, "source", *words)


def test_config_file(source: Path) -> None:
    (source / "config.json").write_text('{"model_type": ')
    refused(source, "config.json", "not readable as JSON")
    (source / "config.json").unlink()
    refused(source, "config.json", "missing")
    shutil.rmtree(source)
    refused(source, "no such folder")


def test_tied_head_that_is_not_tied(tmp_path: Path) -> None:
    source = tmp_path / "in/source"
    make_model().save_pretrained(source)
    edit_json(source / "config.json", lambda config: config.update(tie_word_embeddings=True))
    refused(source, "language_model.lm_head.weight", "tie_word_embeddings")


def test_linear_projector_has_no_hugging_face_form(checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    model = folder.read_model_settings(other)
    model.projector.type = "linear"
    folder.write_model_settings(other, model)
    with pytest.raises(ConversionError, match="projector.type=linear"):
        export_hf(other, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_unused_tensors_must_be_there(checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    (other / "hf/unused.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"unused.safetensors: lacks vision_tower.encoder.layers.2"):
        export_hf(other, tmp_path / "back")


def test_incomplete_checkpoint(checkpoint: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    (other / "weights/metadata.json").unlink()
    (other / "settings.yaml").unlink()
    with pytest.raises(CheckpointError, match="no settings.yaml, weights/metadata.json"):
        export_hf(other, tmp_path / "back")
    with pytest.raises(CheckpointError, match="Hugging Face folder"):
        export_hf(saved["groups2"], tmp_path / "back")
    with pytest.raises(CheckpointError, match="no such"):
        export_hf(tmp_path / "nowhere", tmp_path / "back")


def test_settings_that_do_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    text = (other / "settings.yaml").read_text()
    (other / "settings.yaml").write_text(text.replace("num_layers: 3", "num_layers: -3").replace("family: clip", "famly: clip"))
    with pytest.raises(CheckpointError) as error:
        folder.read_model_settings(other)
    assert "model.vision.famly" in str(error.value) and "model.language.num_layers" in str(error.value)
    (other / "meta.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format 99"):
        folder.read_meta(other)


def test_overwrite(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out/checkpoint"
    import_hf(source, out)
    with pytest.raises(CheckpointError, match="--overwrite"):
        import_hf(source, out)
    # A failed replacement leaves the old one as it was.
    broken = rewrite(shutil.copytree(source, tmp_path / "in/broken"), mixed)
    with pytest.raises(ConversionError):
        import_hf(broken, out, overwrite=True)
    export_hf(out, tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), tensors(source))
    changed = rewrite(shutil.copytree(source, tmp_path / "in/changed"), lambda c: {k: v + 1 for k, v in c.items()})
    import_hf(changed, out, overwrite=True)
    export_hf(out, tmp_path / "back", overwrite=True)
    assert_same(tensors(tmp_path / "back"), tensors(changed))
    assert [path.name for path in out.parent.iterdir()] == ["checkpoint"]


def test_what_is_no_checkpoint_is_never_deleted(source: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("...")
    with pytest.raises(CheckpointError, match="is not overwritten"):
        import_hf(source, precious, overwrite=True)
    assert (precious / "thesis.tex").is_file()
    for out in (source, source / "inside", source.parent):
        with pytest.raises(ConversionError, match="inside|around"):
            import_hf(source, out, overwrite=True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="not a folder"):
        import_hf(source, file, overwrite=True)
    (tmp_path / "empty").mkdir()
    import_hf(source, tmp_path / "empty")


def test_after_a_kill(source: Path, tmp_path: Path) -> None:
    """What a killed run left aside is cleared away; a replacement caught between its renames is undone."""
    out = tmp_path / "out/checkpoint"
    (tmp_path / "out/.checkpoint.partial/weights").mkdir(parents=True)
    (tmp_path / "out/.checkpoint.partial/weights/rubbish").write_text("half")
    import_hf(source, out)
    out.rename(out.with_name(".checkpoint.old"))
    with pytest.raises(ZeroDivisionError), folder.published(out) as partial:
        (partial / "meta.json").write_text("{}")
        raise ZeroDivisionError
    assert folder.read_meta(out)["step"] == 0
    assert [path.name for path in out.parent.iterdir()] == ["checkpoint"]


def test_no_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    refused(source, "bytes are needed and 100 are free")


def test_disk_full_while_writing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.os, "pwrite", full)
    refused(source, "No space left on device", "nothing was left")


def test_more_than_one_process(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(source, "one process")


def test_unknown_dtype(source: Path) -> None:
    with pytest.raises(ConversionError, match="float8.*known: float32"):
        import_hf(source, source.parents[1] / "out", dtype="float8")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_may_not_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    refused(source, "cannot be written", "out")
