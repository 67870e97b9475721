"""What lies beside the weights of a published model: config, generation config, tokenizer, processor. Carried, or written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llava_mcore.conversion import hf_config, layouts, visual
from llava_mcore.conversion.exported import Form
from llava_mcore.conversion.families import DEFAULT_NAMING, ConversionError
from llava_mcore.conversion.layouts import CLASSES, CONFIG, read_json
from llava_mcore.conversion.views import GENERATION_CONFIG, HF_FILES, SOURCE, TOKENIZER_FILES, CheckpointView, HuggingFaceView
from llava_mcore.training import checkpoint_folder as folder

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
IMAGE = "<image>"


def carry(view: HuggingFaceView, partial: Path) -> None:
    """tokenizer/ and hf/ of a checkpoint: the source's files, and how it named its tensors."""
    hf = partial / folder.HF
    _copy(view.path, partial / folder.TOKENIZER, TOKENIZER_FILES)
    _copy(view.path, hf, HF_FILES)
    hf.mkdir(exist_ok=True)
    about = view.about()
    if view.layout.kind == "decoder":
        # Put together from several folders: there is no config.json of the whole to give back.
        ids = special_ids(view.path)
        config = hf_config.from_settings(view.settings, **ids)
        _write_json(hf / CONFIG, hf_config.set_dtype(config, str(view.dtype).removeprefix("torch.")))
        absent = [layouts.in_default_naming(name, view.naming) for name in about["absent"]]
        about = {"naming": dict(DEFAULT_NAMING), "tied_head": None, "absent": absent}
    if view.source.tower is not None and not (hf / PREPROCESSOR).is_file():
        _copy(view.source.tower, hf, [PREPROCESSOR])
    _write_json(hf / SOURCE, about)


def write(view: CheckpointView, form: Form, partial: Path, dtype: torch.dtype) -> None:
    """config.json and what lies beside it, for an export."""
    name = str(dtype).removeprefix("torch.")
    _copy(view.path / folder.TOKENIZER, partial, TOKENIZER_FILES)
    if view.asked == "decoder":
        _write_decoder(view, partial, name)
        return
    _copy(view.path / folder.HF, partial, HF_FILES)
    if form.scratch:
        _write_scratch(view, form, partial, name)
    if form.scratch or view.meta.get("architecture") == "decoder":  # no source of the whole model had a processor to carry
        _write_processor(view, partial)
    if form.scratch:
        return
    before = read_json(partial / CONFIG)
    config = layouts.updated(before, view.layout, view.settings)
    if config.get("dtype", config.get("torch_dtype", name)) != name:
        config = hf_config.set_dtype(config, name)
    if config != before:
        _write_json(partial / CONFIG, config)
    old, new = ((value.get("vision_config") or hf_config.LLAVA_TOWER).get("image_size") for value in (before, config))
    if old and new and old != new and (partial / PREPROCESSOR).is_file():
        _write_json(partial / PREPROCESSOR, hf_config.processor_at(read_json(partial / PREPROCESSOR), old, new))


def require_same_model(view: CheckpointView, form: Form, partial: Path) -> None:
    """Refuses a config.json that describes another model than was exported."""
    if view.layout not in CLASSES:
        return
    config = read_json(partial / CONFIG)
    told = hf_config.to_settings(layouts.as_llava(config, view.layout), partial / CONFIG)
    if not hf_config.same_model(told, form.model):
        raise ConversionError(f"{partial / CONFIG} would describe another model than {view.path}")


def _write_decoder(view: CheckpointView, partial: Path, dtype: str) -> None:
    """config.json and generation config of the language model alone."""
    ids = special_ids(view.path / folder.TOKENIZER)
    config = hf_config.from_settings(view.settings, **ids)
    text = {"tie_word_embeddings": config["tie_word_embeddings"], **config["text_config"]}
    _write_json(partial / CONFIG, hf_config.set_dtype(text, dtype))
    _write_json(partial / GENERATION_CONFIG, {"bos_token_id": ids["bos_id"], "eos_token_id": ids["eos_id"]})


def _write_scratch(view: CheckpointView, form: Form, partial: Path, dtype: str) -> None:
    ids = special_ids(view.path / folder.TOKENIZER)
    config = hf_config.from_settings(form.model, **ids)
    _write_json(partial / CONFIG, hf_config.set_dtype(config, dtype))
    _write_json(partial / GENERATION_CONFIG, {"bos_token_id": ids["bos_id"], "eos_token_id": ids["eos_id"]})


def _write_processor(view: CheckpointView, partial: Path) -> None:
    """What AutoProcessor needs: the preprocessing, how many embeddings a picture takes, and the token that stands for them."""
    model = view.settings
    data = folder.read_settings(view.path).get("data") or {}
    if {"image_mean", "image_std", "image_mode"} <= data.keys():
        _write_json(partial / PREPROCESSOR, hf_config.preprocessor(model, data))
    if not any((partial / name).is_file() for name in TOKENIZERS):
        return
    from llava_mcore.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(partial)
    config = read_json(partial / TOKENIZER_CONFIG) if (partial / TOKENIZER_CONFIG).is_file() else {}
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast" if (partial / TOKENIZERS[0]).is_file() else "LlamaTokenizer")
    if tokenizer.token_id(IMAGE) != model.image_token_id:
        if model.image_token_id < tokenizer.vocab_size:
            return  # pictures stand at a piece of another name; a processor could not tell them from text
        flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        config.setdefault("added_tokens_decoder", {})[str(model.image_token_id)] = {"content": IMAGE, **flags}
    _write_json(partial / TOKENIZER_CONFIG, config)
    kind = visual.class_of(model)
    processor = {
        "processor_class": hf_config.PROCESSORS[kind],
        "image_token": IMAGE,
        "patch_size": model.vision.patch_size,
        "vision_feature_select_strategy": hf_config.from_settings(model, bos_id=None, eos_id=None)[
            "vision_feature_select_strategy"
        ],
        "num_additional_image_tokens": int(model.vision.family == "clip"),  # the class token
    }
    if kind == "llava_onevision":
        processor |= {"num_image_tokens": model.embeddings_per_image, **visual.entries(model, kind)}
        processor.pop("image_grid_pinpoints")
    _write_json(partial / PROCESSOR, processor)


def special_ids(tokenizer: Path) -> dict[str, int | None]:
    """The tokenizer's begin and end of sequence; None for each where there is no tokenizer."""
    if not any((tokenizer / name).is_file() for name in TOKENIZERS):
        return {"bos_id": None, "eos_id": None}
    from llava_mcore.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return {"bos_id": loaded.bos_id, "eos_id": loaded.eos_id}


def _copy(source: Path, target: Path, names: Iterable[str]) -> None:
    present = [name for name in names if (source / name).is_file()]
    if present:
        target.mkdir(parents=True, exist_ok=True)
    for name in present:
        shutil.copyfile(source / name, target / name)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
