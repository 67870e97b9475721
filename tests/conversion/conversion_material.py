"""Tiny LLaVA models with random weights, of awkward sizes, saved by transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_mcore.conversion import convert

IMAGE_TOKEN = 100
# Logits are compared in a process of their own, which takes its time: where a test is not about them, they are left out.
import_hf = partial(convert.import_hf, compare_logits=False)
export_hf = partial(convert.export_hf, compare_logits=False)
# name -> (what differs from the sizes below)
VARIANTS: dict[str, dict] = {
    "groups2": {},
    "groups3_tied_full": {
        "groups": 3, "tied": True, "layers": 1, "tower_layers": 5, "select": -1, "strategy": "full",
    },
    "mqa_wide_heads_bf16": {
        "heads": 5, "groups": 1, "hidden": 40, "head_dim": 12, "tower_layers": 4, "select": -3, "dtype": torch.bfloat16,
    },
}  # fmt: skip


def make_model(
    *, heads: int = 6, groups: int = 2, hidden: int = 48, head_dim: int | None = None, layers: int = 3, tied: bool = False,
    tower_layers: int = 3, select: int = -2, strategy: str = "default", dtype: torch.dtype = torch.float32, seed: int = 0,
) -> LlavaForConditionalGeneration:  # fmt: skip
    """A model in which no two tensors are alike: norms and biases are random too."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=tower_layers, num_attention_heads=3,
            image_size=28, patch_size=7,
        ),
        text_config=LlamaConfig(
            hidden_size=hidden, intermediate_size=72, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=head_dim, vocab_size=101, max_position_embeddings=128, tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        ),
        image_token_index=IMAGE_TOKEN, vision_feature_layer=select, vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return model.to(dtype)


def logits(model: LlavaForConditionalGeneration) -> torch.Tensor:
    """Logits on one picture and a prompt; one thread adds in one order."""
    torch.manual_seed(7)
    count = 17 if model.config.vision_feature_select_strategy == "full" else 16
    ids = torch.tensor([[1, 5, *[IMAGE_TOKEN] * count, 9, 42, 7]])
    pixels = torch.randn(1, 3, 28, 28).to(model.dtype)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, read by safetensors' own loader."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, types, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]) -> Path:
    """Changes the tensors of a folder with one file."""
    file = folder / "model.safetensors"
    content = load_file(file)
    changed = change(content)
    save_file({k: v.contiguous() for k, v in (changed or content).items()}, file, {"format": "pt"})
    return folder


def edit_json(file: Path, change: Callable[[dict], None]) -> None:
    """Changes a JSON file in place."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))
