"""The published layouts: whose names have which prefixes, and what their config.json says, told in the words of llava-hf's.

``llava``, ``llava_next``, ``llava_next_video`` and ``llava_onevision`` are transformers' classes, in all generations of their key
names, ``original`` is LLaVA's own code (``model.mm_projector.0.weight``, with or without the tower), ``decoder`` a language model
alone. No torch.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_mcore.conversion import hf_config, visual
from llava_mcore.conversion.families import (
    DEFAULT_NAMING,
    OUR_MODULE,
    ConversionError,
    Naming,
    Plan,
    Tensor,
    families,
    plan,
)
from llava_mcore.settings.schema import ModelSettings

Config = dict[str, Any]
CLASSES = hf_config.CLASSES
CONFIG = "config.json"

PREFIXES: dict[str, tuple[str, ...]] = {
    "vision_tower": (
        "vision_tower.",
        "vision_tower.vision_model.",
        "model.vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.vision_tower.",  # original
        "model.vision_tower.vision_tower.vision_model.",
        "vision_model.",  # a tower alone
        "",
    ),
    "projector": ("multi_modal_projector.", "model.multi_modal_projector.", "model.mm_projector."),
    "language_model": ("language_model.model.", "model.language_model.", "model."),
    "head": ("language_model.", ""),
    "learned_tokens": ("", "model."),
}
# The prefixes of modules that stand alone.
ALONE = {"decoder": {"language_model": "model.", "head": ""}}
# The original layout numbers the projector's layers, the activation counted.
PROJECTOR_NAMES = {"model.mm_projector.": {"linear_1.": "0.", "linear_2.": "2."}}
# One vector between rows of tiles; a model of single tiles carries it along.
NEWLINE = ("image_newline", "model.image_newline")

# What transformers assumes where a config.json leaves it out and LlavaConfig assumes otherwise
# (configuration_llava_next_video.py, configuration_llava_onevision.py).
ASSUMED: dict[str, Config] = {
    "llava": {},
    "llava_next": {},
    "llava_next_video": {"image_token_index": 32001},
    "llava_onevision": {
        "image_token_index": 151646,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}


@dataclass(frozen=True)
class Source:
    """A published model: where its files are.

    Attributes:
        path: its folder.
        tower: a folder with the vision tower, where ``path`` holds none.
        projector: a folder or file with the projector, where ``path`` holds none.
        vocab_size: rows the vocabulary is to have (None: as many as there are, or as its tokenizer needs).
    """

    path: Path
    tower: Path | None = None
    projector: Path | None = None
    vocab_size: int | None = None


def source(
    path: str | Path, tower: str | Path | None = None, projector: str | Path | None = None, vocab_size: int | None = None
) -> Source:
    """A :class:`Source` from paths of any kind."""
    return Source(Path(path), Path(tower) if tower else None, Path(projector) if projector else None, vocab_size)


@dataclass(frozen=True)
class Layout:
    """How a published model is written down.

    Attributes:
        kind: a key of ``CLASSES``, "original" or "decoder".
        config: its config.json in the words of llava-hf's.
        rows: of its vocabulary as published.
    """

    kind: str
    config: Config
    rows: int


def read_json(file: Path) -> Config:
    """A JSON object, or an error that names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{file}: missing") from None
    except ValueError as error:
        raise ConversionError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{file}: holds no JSON object")
    return value


def kind_of(config: Config, where: Path) -> str:
    """Which layout a config.json belongs to.

    Raises:
        ConversionError: with what is known and what a new one takes.
    """
    model_type, names = config.get("model_type"), config.get("architectures") or []
    if any(key.startswith("mm_") for key in config):
        return "original"
    if model_type in CLASSES and (not names or CLASSES[model_type] in names):
        return str(model_type)
    decoders = [family.model_type for family in hf_config.DECODERS.values()]
    if model_type in decoders and not any("Llava" in name for name in names):
        return "decoder"
    raise ConversionError(
        f"{where}: unknown architecture {', '.join(names) or 'none'} (model_type {model_type!r}); known: "
        f"{', '.join(CLASSES.values())}, the original LLaVA layout, and decoders of type {', '.join(decoders)}. A new decoder or "
        f"tower is an entry in llava_mcore/settings/families.py"
    )


def recognise(source: Source) -> Layout:
    """The layout of a published model, from the config.json of its folder and of its tower's.

    Raises:
        ConversionError: naming what is unknown or missing.
    """
    where = source.path / CONFIG
    config = read_json(where)
    kind = kind_of(config, where)
    if kind in CLASSES:
        if source.tower or source.projector:
            raise ConversionError(f"{source.path}: holds a tower and a projector of its own; leave out --tower and --projector")
        told = as_llava(config, kind, where)
    else:
        told = _from_parts(config, kind, source)
    text: Config = told.get("text_config") or {}
    rows = text.get("vocab_size", hf_config.to_settings(told, where).language.vocab_size if kind in CLASSES else None)
    if not isinstance(rows, int):
        raise ConversionError(f"{where}: vocab_size is {rows!r}; it must be said")
    wanted = max(rows, source.vocab_size or 0, tokens_of(source.path) if source.vocab_size is None else 0)
    if source.vocab_size is not None and source.vocab_size < rows:
        raise ConversionError(f"vocab_size {source.vocab_size} is smaller than the {rows} rows of {source.path}; rows only grow")
    if kind not in CLASSES:
        # The original model marks pictures with no token of the vocabulary; here it is one of its own, the first new one.
        told["image_token_index"] = _image_token(source.path, rows)
        wanted = max(wanted, told["image_token_index"] + 1)
    if wanted != rows:
        told["text_config"] = {**text, "vocab_size": wanted}
    return Layout(kind, told, rows)


def as_llava(config: Config, kind: str, where: Path | str = CONFIG) -> Config:
    """A config.json of transformers' classes as LlavaConfig would have it, with our settings of pictures and clips.

    Raises:
        ConversionError: these cannot be expressed.
    """
    told = {**ASSUMED[kind], **copy.deepcopy(config)}
    if "image_token_id" in told and "image_token_id" in config:
        told.pop("image_token_index", None)
    geometry = {hf_config.VISUAL: visual.of_class(config, kind, where)}
    return {**told, "model_type": "llava", "architectures": [CLASSES["llava"]], **geometry}


def updated(config: Config, kind: str, model: ModelSettings) -> Config:
    """The source's config.json with only those entries changed in which the model differs from it."""
    if kind == "original":
        # Its decoder's entries lie at the top.
        told: Config = {"model_type": "llava", "text_config": _text_of(config), "image_token_index": 0}
        before = hf_config.to_settings(told)
        grown = replace(copy.deepcopy(before), language=replace(model.language, vocab_size=before.language.vocab_size))
        after: Config = hf_config.updated(told, grown)["text_config"]
        return {**config, **{key: value for key, value in after.items() if value != told["text_config"].get(key)}}
    told = as_llava(config, kind)
    after = hf_config.updated(told, model)
    if not visual.same(model, hf_config.to_settings(told)):
        after |= visual.entries(model, kind)
    after.pop(hf_config.VISUAL)
    changed = {key: value for key, value in after.items() if value != told.get(key)}
    kept = {key: value for key, value in config.items() if key in after or key not in told}
    return {**kept, **changed}


def _text_of(config: Config) -> Config:
    """The decoder's part of an original config.json."""
    text = {key: value for key, value in config.items() if not key.startswith(("mm_", "image_", "vision_"))}
    kind = str(text.get("model_type", "llama")).removeprefix("llava_")
    text["model_type"] = {"llava": "llama", "qwen": "qwen2"}.get(kind, kind)
    text.pop("architectures", None)
    return text


def _from_parts(config: Config, kind: str, source: Source) -> Config:
    """An original model, or a decoder, and the tower that belongs to it."""
    mm = dict(config)
    if source.projector is not None and source.projector.is_dir() and (source.projector / CONFIG).is_file():
        mm = {**read_json(source.projector / CONFIG), **{key: value for key, value in config.items() if key.startswith("mm_")}}
    projector = mm.get("mm_projector_type", "mlp2x_gelu")
    if projector != "mlp2x_gelu":
        raise ConversionError(f"{source.path / CONFIG}: mm_projector_type is {projector!r}; known is 'mlp2x_gelu'")
    tower = _tower_config(source, str(mm.get("mm_vision_tower", mm.get("vision_tower", ""))))
    strategies = hf_config.strategies(tower.get("model_type"))
    feature = mm.get("mm_vision_select_feature", "patch")
    if feature not in strategies:
        raise ConversionError(f"{source.path / CONFIG}: mm_vision_select_feature is {feature!r}; known: {', '.join(strategies)}")
    text = _text_of(config) if kind == "original" else dict(config)
    return {
        "model_type": "llava",
        "architectures": [CLASSES["llava"]],
        "text_config": text,
        "vision_config": tower,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": mm.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": strategies[feature],
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        hf_config.VISUAL: visual.of_original(config, tower["image_size"], source.path / CONFIG) if kind == "original" else {},
    }


def _tower_config(source: Source, name: str) -> Config:
    folder = tower_folder(source, name)
    if folder is not None:
        found = read_json(folder / CONFIG)
        return dict(found.get("vision_config") or found)
    if name.endswith("clip-vit-large-patch14-336"):
        return dict(hf_config.LLAVA_TOWER)
    raise ConversionError(
        f"{source.path}: says nothing of its vision tower's sizes{f' ({name})' if name else ''}; name a folder with the tower's "
        f"config.json (--tower FOLDER)"
    )


def tower_folder(source: Source, name: str) -> Path | None:
    """The folder of the tower: the one that was named, or ``mm_vision_tower`` where that is a folder here."""
    if source.tower is not None:
        return source.tower
    if name and (source.path / name / CONFIG).is_file():
        return source.path / name
    return None


def _image_token(folder: Path, rows: int) -> int:
    """The id of ``<image>`` in a tokenizer's added tokens, or the first new row."""
    return _added_tokens(folder).get("<image>", rows)


def tokens_of(folder: Path) -> int:
    """Rows that the tokens added to a tokenizer need: the largest id and one; 0 if none were added."""
    return max(_added_tokens(folder).values(), default=-1) + 1


def _added_tokens(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    if (folder / "added_tokens.json").is_file():
        found |= read_json(folder / "added_tokens.json")
    if (folder / "tokenizer.json").is_file():
        found |= {token["content"]: token["id"] for token in read_json(folder / "tokenizer.json").get("added_tokens") or []}
    return found


def find_naming(
    names: Collection[str], model: ModelSettings, where: str, made: Collection[str] = (), hints: dict[str, str] | None = None
) -> dict[str, str]:
    """Which generation of key names a checkpoint uses, found for each module by itself.

    Args:
        names: of its tensors.
        model: what it is to hold.
        where: what errors name.
        made: modules that may be absent; their prefix is then missing from the answer.
        hints: what to do about a module that is absent.

    Raises:
        ConversionError: if a module is not there under any known name, or under two of them.
    """
    naming = {}
    problems = []
    for module, family in families(model).items():
        found = [prefix for prefix in PREFIXES[module] if _local(prefix, family.anchor) in names]
        if len(found) == 1:
            naming[module] = found[0]
        elif found:
            problems.append("two tensors for one name: " + " and ".join(_local(prefix, family.anchor) for prefix in found))
        elif module not in made:
            tried = ", ".join(_local(prefix, family.anchor) for prefix in PREFIXES[module])
            problems.append(f"no {OUR_MODULE[module]}: none of {tried}{(hints or {}).get(module, '')}")
    if problems:
        raise ConversionError(f"{where}: " + "; ".join(problems))
    return naming


def _local(prefix: str, name: str) -> str:
    """The whole of a name below a prefix."""
    for ours, theirs in PROJECTOR_NAMES.get(prefix, {}).items():
        if name.startswith(ours):
            return prefix + theirs + name.removeprefix(ours)
    return prefix + name


def planned(model: ModelSettings, naming: Naming, rows: int | None = None) -> Plan:
    """``families.plan`` in the names of a layout.

    Args:
        model: sizes.
        naming: the prefix of each module.
        rows: of the published vocabulary (None: all the model has).
    """
    whole = plan(model, {**DEFAULT_NAMING, **naming})
    prefix = naming.get("projector", "")

    def published(tensor: Tensor) -> Tensor:
        names = tensor.names
        if prefix in PROJECTOR_NAMES and tensor.module == "projector":
            names = tuple(_local(prefix, name.removeprefix(prefix)) for name in names)
        shapes = tensor.part_shapes
        if tensor.fusion == "vocab" and rows is not None:
            shapes = tuple((rows, *shape[1:]) for shape in shapes)
        return replace(tensor, names=names, part_shapes=shapes)

    return replace(whole, tensors=tuple(published(tensor) for tensor in whole.tensors))


def in_default_naming(name: str, naming: Naming) -> str:
    """A published name as today's ``save_pretrained`` writes it, so that checkpoints of two layouts can be compared."""
    if name in NEWLINE:
        return NEWLINE[0]
    for module in sorted(naming, key=lambda module: -len(naming[module])):
        prefix = naming[module]
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            for ours, theirs in PROJECTOR_NAMES.get(prefix, {}).items():
                rest = ours + rest.removeprefix(theirs) if rest.startswith(theirs) else rest
            return DEFAULT_NAMING[module] + rest
    return name
