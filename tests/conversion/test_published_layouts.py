"""Every published layout: in, out, the same bits. And what only some of them have: bin files, towers apart, deltas, new rows."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conversion_material import IMAGE_TOKEN, assert_same, edit_json, export_hf, import_hf, make_model, rewrite, tensors
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
)

from llava_mcore.conversion import convert, views
from llava_mcore.conversion.convert import compare_paths
from llava_mcore.conversion.deltas import apply_delta, make_delta
from llava_mcore.conversion.describe import describe
from llava_mcore.conversion.families import ConversionError
from llava_mcore.training import checkpoint_folder as folder

TOWER = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
TEXT = {
    "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "vocab_size": 101, "max_position_embeddings": 128,
}  # fmt: skip


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """No two tensors are alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    return model


def embeddings(path: Path, name: str = "language_model.embedding.word_embeddings.weight") -> torch.Tensor:
    """A table of a checkpoint, padding included."""
    with closing(views.CheckpointView(path)) as view:
        return view.weights.read(name)


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A vision tower alone, as openai publishes CLIP's, with the text model beside it."""
    torch.manual_seed(3)
    model = randomised(CLIPVisionModel(CLIPVisionConfig(**TOWER)))
    model.save_pretrained(tmp_path / "tower")
    return rewrite(
        tmp_path / "tower",
        lambda content: (
            {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in content.items()}
            | {"text_model.embeddings.position_ids": torch.arange(7)[None], "logit_scale": torch.ones(())}
        ),
    )


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A language model alone."""
    torch.manual_seed(4)
    randomised(LlamaForCausalLM(LlamaConfig(**TEXT))).save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


def original(source: Path, out: Path, *, with_tower: bool) -> Path:
    """A llava-hf folder as LLaVA's own code saves it (v1.5 leaves out the tower, v1.6 has it and a newline)."""
    out.mkdir()
    content = {}
    for name, tensor in tensors(source).items():
        if name.startswith("vision_tower."):
            if not with_tower:
                continue
            name = "model.vision_tower.vision_tower.vision_model." + name.removeprefix("vision_tower.")
        name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        name = name.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        name = name.replace("language_model.model.", "model.").replace("language_model.lm_head", "lm_head")
        content[name] = tensor
    if with_tower:
        content["model.image_newline"] = torch.randn(48)
    names = sorted(content)
    shards = {f"pytorch_model-0000{n}-of-00002.bin": names[n - 1 :: 2] for n in (1, 2)}
    for file, held in shards.items():
        torch.save({name: content[name] for name in held}, out / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    text = json.loads((source / "config.json").read_text())["text_config"]
    config = {key: text[key] for key in TEXT} | {"rope_theta": 5000.0, "rms_norm_eps": text["rms_norm_eps"]}
    config |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "tie_word_embeddings": False}
    config |= {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 24, "mm_vision_select_layer": -2}
    config |= {"mm_vision_select_feature": "patch", "mm_vision_tower": "../tower", "image_aspect_ratio": "pad"}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def bins(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of bin files, by torch's own loader."""
    return {name: tensor for file in sorted(path.glob("*.bin")) for name, tensor in torch.load(file).items()}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LlavaNextConfig, LlavaNextForConditionalGeneration),
        (LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration),
        (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
    ],
)
def test_next_and_onevision(config, kind, tmp_path: Path) -> None:
    """They are imported with their tiles, answer alike, and come back down to the last bit and byte."""
    torch.manual_seed(0)
    ids = {"image_token_index": 100, "video_token_index": 99} if "Onevision" in kind.__name__ else {"image_token_index": 100}
    tower = SiglipVisionConfig(**TOWER, vision_use_head=False) if "Onevision" in kind.__name__ else CLIPVisionConfig(**TOWER)
    tiles = [[28, 56], [56, 28], [84, 28]]
    full = config(vision_config=tower, text_config=LlamaConfig(**TEXT), image_grid_pinpoints=tiles, **ids)
    randomised(kind(full)).save_pretrained(tmp_path / "source")
    report = convert.import_hf(tmp_path / "source", tmp_path / "checkpoint")
    assert report is not None and str(report.logits).startswith("match on one picture")
    for layout in ("source", "llava-hf"):
        back = tmp_path / f"as_{layout}"
        export_hf(tmp_path / "checkpoint", back, layout=layout)
        assert "image_newline" in tensors(back)
        assert_same(tensors(back), tensors(tmp_path / "source"))
        assert (back / "config.json").read_bytes() == (tmp_path / "source/config.json").read_bytes()
        kind.from_pretrained(back)
    assert folder.read_model_settings(tmp_path / "checkpoint").anyres.grids == [(1, 2), (2, 1), (3, 1)]


@pytest.mark.parametrize("with_tower", [False, True], ids=["v1.5", "v1.6"])
def test_original(saved: dict[str, Path], tower: Path, tmp_path: Path, with_tower: bool) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    make_model(layers=2).save_pretrained(base)
    source = original(base, tmp_path / "source", with_tower=with_tower)
    if with_tower:  # its config names a tower that is not there as weights
        (tower / "model.safetensors").unlink()
        edit_json(source / "config.json", lambda config: config.update(mm_vision_tower="openai/some-tower"))
    import_hf(source, tmp_path / "checkpoint", tower=tower) if not with_tower else None
    if with_tower:
        with pytest.raises(ConversionError, match="--tower FOLDER"):
            import_hf(source, tmp_path / "checkpoint")
        edit_json(source / "config.json", lambda config: config.update(mm_vision_tower="../tower"))
        import_hf(source, tmp_path / "checkpoint")
    model = folder.read_model_settings(tmp_path / "checkpoint")
    # The original has no token for pictures: one row is added, the mean of the others, and left out again.
    assert (model.image_token_id, model.language.vocab_size) == (101, 102)
    table, old = embeddings(tmp_path / "checkpoint"), bins(source)["model.embed_tokens.weight"]
    assert torch.equal(table[:101], old) and not table[102:].any()
    torch.testing.assert_close(table[101], old.double().mean(dim=0).float())
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), bins(source))
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())
    if with_tower:
        with pytest.raises(ConversionError, match="image_newline.*--layout source"):
            export_hf(tmp_path / "checkpoint", tmp_path / "llava", layout="llava-hf")
        return
    convert.export_hf(tmp_path / "checkpoint", tmp_path / "llava", layout="llava-hf")
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").config.image_token_id == 101
    theirs = tensors(tmp_path / "llava")
    assert torch.equal(theirs["language_model.model.embed_tokens.weight"], table[:102])
    assert torch.equal(theirs["multi_modal_projector.linear_2.weight"], bins(source)["model.mm_projector.2.weight"])


def test_tower_and_decoder(tower: Path, decoder: Path, tmp_path: Path) -> None:
    """A first phase 1: tower and decoder from two folders, a projector as training from scratch starts it, or a given one."""
    with pytest.raises(ConversionError, match="--tower FOLDER"):
        import_hf(decoder, tmp_path / "none")
    report = convert.import_hf(decoder, tmp_path / "checkpoint", tower=tower)
    assert report is not None and "match on 12 tokens" in str(report.logits)
    assert "text_model.embeddings.position_ids" in describe(views.Source(decoder, tower))
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    theirs = tensors(tmp_path / "back")
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "back")
    for name, tensor in load_file(decoder / "model.safetensors").items():
        mine = theirs[f"language_model.{name}"]
        assert torch.equal(mine[: len(tensor)], tensor) and len(mine) in (len(tensor), 102)
    for name, tensor in load_file(tower / "model.safetensors").items():
        if name.startswith("vision_model."):
            assert torch.equal(theirs[name.replace("vision_model.", "vision_tower.")], tensor)
    projector = theirs["multi_modal_projector.linear_1.weight"]
    assert projector.abs().max() <= 24**-0.5 and projector.std() > 0.1
    given = {f"model.mm_projector.{n}.{k}": torch.randn(s) for n, k, s in
             [(0, "weight", (48, 24)), (0, "bias", (48,)), (2, "weight", (48, 48)), (2, "bias", (48,))]}  # fmt: skip
    torch.save(given, tmp_path / "mm_projector.bin")
    import_hf(decoder, tmp_path / "given", tower=tower, projector=tmp_path / "mm_projector.bin")
    export_hf(tmp_path / "given", tmp_path / "again")
    assert torch.equal(tensors(tmp_path / "again")["multi_modal_projector.linear_1.bias"], given["model.mm_projector.0.bias"])


@pytest.mark.parametrize("name", ["groups2", "groups3_tied_full"])
def test_decoder_out(saved: dict[str, Path], tmp_path: Path, name: str) -> None:
    """The language model alone answers text as the whole does, and can be put together with a tower again."""
    import_hf(saved[name], tmp_path / "checkpoint")
    report = convert.export_hf(
        tmp_path / "checkpoint", tmp_path / "decoder", layout="decoder", compare_logits=name == "groups3_tied_full"
    )
    assert report is not None and (name == "groups2" or "match on 12 tokens" in str(report.logits))
    theirs, whole = tensors(tmp_path / "decoder"), tensors(saved[name])
    assert_same(theirs, {k.removeprefix("language_model."): v for k, v in whole.items() if k.startswith("language_model.")})


def test_vocabulary_grows(saved: dict[str, Path], tmp_path: Path) -> None:
    """Asked for, or because tokens were added to the tokenizer; an export keeps the rows, its config knows them."""
    source = shutil.copytree(saved["groups2"], tmp_path / "source")
    (source / "added_tokens.json").write_text(json.dumps({"<new>": 102, "<newer>": 103}))
    import_hf(source, tmp_path / "checkpoint")
    table, old = embeddings(tmp_path / "checkpoint"), tensors(source)["language_model.model.embed_tokens.weight"]
    head = embeddings(tmp_path / "checkpoint", "language_model.output_layer.weight")
    assert table.shape[0] == 128 and not table[104:].any() and not head[104:].any()
    for row in (101, 102, 103):
        torch.testing.assert_close(table[row], old.double().mean(dim=0).float())
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").config.text_config.vocab_size == 104
    assert torch.equal(tensors(tmp_path / "back")["language_model.lm_head.weight"], head[:104])
    import_hf(saved["groups2"], tmp_path / "asked", vocab_size=130)
    assert embeddings(tmp_path / "asked").shape[0] == 192
    with pytest.raises(ConversionError, match="leave out --tower"):
        import_hf(saved["groups2"], tmp_path / "towers", tower=saved["groups2"])
    with pytest.raises(ConversionError, match="vocab_size 100 is smaller than the 101 rows"):
        import_hf(saved["groups2"], tmp_path / "less", vocab_size=100)


def test_bin_files(saved: dict[str, Path], tmp_path: Path) -> None:
    """Views, parameters and a state dict inside a checkpoint are read as torch reads them; damage and traps are not."""
    source = shutil.copytree(saved["groups2"], tmp_path / "source")
    content = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    stored = {**content, name: torch.nn.Parameter(content[name].T.contiguous().T), "steps": 7}
    key, value = (name.replace("q_proj", f"{x}_proj") for x in "kv")
    both = torch.cat([content[key], content[value]])
    stored |= {key: both[: len(content[key])], value: both[len(content[key]) :]}  # one storage for two tensors
    torch.save({"state_dict": stored}, source / "pytorch_model.bin")
    import_hf(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), content)
    whole = (source / "pytorch_model.bin").read_bytes()
    place = whole.index(content["language_model.model.norm.weight"].numpy().tobytes())
    damaged = bytearray(whole)
    damaged[place] ^= 1
    (source / "pytorch_model.bin").write_bytes(damaged)
    with pytest.raises(ConversionError, match="pytorch_model.bin: language_model.model.norm.weight: its bytes do not have"):
        import_hf(source, tmp_path / "out")
    (source / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match="pytorch_model.bin: cut short"):
        import_hf(source, tmp_path / "out")
    torch.save({"a": Path("/")}, source / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="pytorch_model.bin: it calls for pathlib.*not run"):
        import_hf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_index_of_bin_files(saved: dict[str, Path], tower: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_model(layers=2).save_pretrained(base)
    source = original(base, tmp_path / "source", with_tower=False)
    index = source / "pytorch_model.bin.index.json"
    edit_json(index, lambda value: value["weight_map"].update({"strange": "pytorch_model-00001-of-00002.bin"}))
    with pytest.raises(ConversionError, match="00001-of-00002.bin: does not hold strange"):
        import_hf(source, tmp_path / "out", tower=tower)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ConversionError, match=r"names files that are not there: pytorch_model-00002-of-00002.bin"):
        import_hf(source, tmp_path / "out", tower=tower)


def test_deltas(decoder: Path, tower: Path, tmp_path: Path) -> None:
    """Target minus base, new rows and the projector raw; adding it up gives the target up to a rounding."""
    torch.manual_seed(5)
    base = tensors(decoder)
    target = shutil.copytree(decoder, tmp_path / "target")
    content = {name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in base.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        content[name] = torch.cat([content[name], torch.randn(3, 48)])
    content["model.mm_projector.0.weight"] = torch.randn(48, 24)
    save_file(content, target / "model.safetensors", {"format": "pt"})
    assert make_delta(decoder, target, tmp_path / "delta") == len(base)
    delta = tensors(tmp_path / "delta")
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(delta[norm], content[norm] - base[norm])
    assert torch.equal(delta["lm_head.weight"][101:], content["lm_head.weight"][101:])
    assert torch.equal(delta["model.mm_projector.0.weight"], content["model.mm_projector.0.weight"])
    assert apply_delta(decoder, tmp_path / "delta", tmp_path / "applied") == len(base)
    for name, tensor in tensors(tmp_path / "applied").items():
        torch.testing.assert_close(tensor, content[name], rtol=0, atol=1e-6)
    with pytest.raises(ConversionError, match="does not fit"):
        apply_delta(tower, tmp_path / "delta", tmp_path / "none")


def test_two_layouts_compare(saved: dict[str, Path], tmp_path: Path) -> None:
    """Checkpoints of one model in two layouts are compared by what they hold."""
    import_hf(saved["groups2"], tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back", layout="llava-hf")
    assert compare_paths(tmp_path / "back", saved["groups2"]).ok
    assert folder.read_model_settings(tmp_path / "checkpoint").image_token_id == IMAGE_TOKEN
