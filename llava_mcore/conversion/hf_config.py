"""config.json of transformers' LLaVA to and from this project's model settings. No torch.

``settings.families`` says which entry means which setting; what cannot be expressed is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llava_mcore.conversion import visual
from llava_mcore.conversion.families import ConversionError
from llava_mcore.settings.families import DECODERS, TOWERS, Family
from llava_mcore.settings.schema import ROPE_SCALING, LanguageSettings, ModelSettings, VisionSettings

Config = dict[str, Any]

CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}


# Settings that follow from others, or that weights do not depend on.
NOT_OF_MODEL = ("num_query_groups", "kv_channels", "router_aux_loss")
# Not of config.json: ``anyres`` and ``video`` as a class has them, put beside its entries by ``layouts``.
VISUAL = "visual"
# Names of "longrope" in older config.json of Phi-3.
OLD_ROPE_TYPES = ("su", "yarn")
# Entries of rope_parameters that no calculation reads.
ROPE_IGNORED = ("finetuned",)
# Where config.json has no vision_config at all, transformers' LlavaConfig puts this in its place.
LLAVA_TOWER: Config = {
    "model_type": "clip_vision_model",
    "intermediate_size": 4096,
    "hidden_size": 1024,
    "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
ONLY = {
    "projector_hidden_act": (None, "gelu"),
    "multimodal_projector_bias": (None, True),
    "quantization_config": (None,),
}
# What vision_feature_select_strategy keeps, by whether the tower has a class token: "default" drops the first feature whatever
# it is, so a tower without a class token would lose a patch.
FEATURES = {True: {"default": "patch", "full": "cls_patch"}, False: {"full": "patch"}}


def to_settings(config: Config, where: str | Path = "config.json") -> ModelSettings:
    """The model that a config.json describes.

    Raises:
        ConversionError: naming an unknown architecture with the known ones, or all entries this project cannot express.
    """
    _require_llava(config, where)
    text = config.get("text_config") or {}
    vision = config.get("vision_config") or LLAVA_TOWER
    text_name, decoder = _family(text, "text_config", "llama", DECODERS, where)
    vision_name, tower = _family(vision, "vision_config", "clip_vision_model", TOWERS, where)
    problems = _unsupported(config, ONLY, "") + _unsupported(text, decoder.only, "text_config.")
    problems += _unsupported(vision, tower.only, "vision_config.")
    rope, rope_problems = _rope(text, decoder)
    problems += rope_problems
    layer = config.get("vision_feature_layer", -2)
    feature = config.get("vision_feature_select_strategy", "default")
    features = FEATURES[tower.fixed["class_token"]]
    if not isinstance(layer, int):
        problems.append(f"vision_feature_layer={layer}: only one layer can be selected")
    if feature not in features:
        problems.append(f"vision_feature_select_strategy={feature!r} (known for {vision_name}: {', '.join(features)})")
    if problems:
        raise ConversionError(f"{where}: not supported: " + "; ".join(problems))

    vision_fields = _values(vision, tower)
    if layer >= 0:  # counted from the front: hidden state 0 is the one before the first layer
        layer -= vision_fields["num_layers"] + 1
    values = {
        "vision": {"family": vision_name, **vision_fields, "select_layer": layer, "select_feature": features[feature]},
        "projector": {"type": "mlp2x_gelu"},
        "language": {"family": text_name, **_values(text, decoder), **rope, "tie_word_embeddings": _tied(config)},
        "image_token_id": _image_token(config),
        **config.get(VISUAL, {}),
        "init_std": text.get("initializer_range", 0.02),
    }
    try:
        model = TypeAdapter(ModelSettings).validate_python(values)
    except ValidationError as error:
        says = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConversionError(f"{where}: {says}") from None
    # Newer configs spell out what follows from the other numbers; the settings say null there.
    language = model.language
    if language.kv_channels is not None and language.kv_channels * language.num_attention_heads == language.hidden_size:
        language.kv_channels = None
    if language.num_query_groups == language.num_attention_heads:
        language.num_query_groups = None
    return model


def from_settings(model: ModelSettings, *, bos_id: int | None, eos_id: int | None, pad_id: int | None = None) -> Config:
    """A config.json for a model that was never a Hugging Face one."""
    vision, language = model.vision, model.language
    tower, decoder = TOWERS[vision.family], DECODERS[language.family]
    kind = visual.class_of(model)
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        **visual.entries(model, kind),
        "image_token_index": model.image_token_id,
        "image_seq_length": model.embeddings_per_image,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.select_layer,
        "vision_feature_select_strategy": _strategy(vision),
        "tie_word_embeddings": language.tie_word_embeddings,
        "vision_config": {
            "model_type": tower.model_type,
            **_entries(vision, tower),
            **tower.constants,
            "projection_dim": vision.hidden_size,
        },
        "text_config": {
            "model_type": decoder.model_type,
            **_entries(language, decoder),
            **decoder.constants,
            "num_key_value_heads": language.query_groups,
            "head_dim": language.head_dim,
            **_rope_entries(language),
            "initializer_range": model.init_std,
            "tie_word_embeddings": language.tie_word_embeddings,
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "pad_token_id": pad_id,
        },
    }


def updated(config: Config, model: ModelSettings) -> Config:
    """The source's config.json, with only those entries changed in which the model differs from it."""
    before = to_settings(config)
    new = copy.deepcopy(config)
    if same_model(model, before):
        return new
    text, vision = new.setdefault("text_config", {}), new.setdefault("vision_config", copy.deepcopy(LLAVA_TOWER))
    for settings, old, entries, family in (
        (model.language, before.language, text, DECODERS[before.language.family]),
        (model.vision, before.vision, vision, TOWERS[before.vision.family]),
    ):
        for setting, entry in family.entries.items():
            if getattr(settings, setting) != getattr(old, setting):
                entries[entry] = getattr(settings, setting)
    if _rope_entries(model.language) != _rope_entries(before.language):
        text.pop("original_max_position_embeddings", None)
        text.update(_rope_entries(model.language))
    if model.language.tie_word_embeddings != before.language.tie_word_embeddings:
        new["tie_word_embeddings"] = text["tie_word_embeddings"] = model.language.tie_word_embeddings
    if model.image_token_id != before.image_token_id:
        new.pop("image_token_id", None)
        new["image_token_index"] = model.image_token_id
    if model.vision.select_feature != before.vision.select_feature:
        new["vision_feature_select_strategy"] = _strategy(model.vision)
    if model.vision.select_layer != before.vision.select_layer:
        new["vision_feature_layer"] = model.vision.select_layer
    return new


def same_model(one: ModelSettings, other: ModelSettings) -> bool:
    """Whether two settings describe one model, whatever is left to derive; the initialisation does not count."""

    def essence(model: ModelSettings) -> tuple[Any, ...]:
        language = model.language
        fields = {k: v for k, v in asdict(language).items() if k not in NOT_OF_MODEL}
        derived = (language.query_groups, language.head_dim)
        return fields, derived, asdict(model.vision), asdict(model.projector), model.image_token_id

    return essence(one) == essence(other) and visual.same(one, other)


def set_dtype(config: Config, dtype: str) -> Config:
    """The config with its type of weights named; an equal one is returned unchanged."""
    new = copy.deepcopy(config)
    for part in (new, new.get("text_config") or {}, new.get("vision_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) is not None:
                part[key] = dtype
    if "torch_dtype" not in new:
        new["dtype"] = dtype
    return new


PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_next_video": "LlavaNextVideoProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
}


def preprocessor(model: ModelSettings, data: Mapping[str, Any]) -> Config:
    """A preprocessor_config.json for the pictures a model was trained on.

    Args:
        model: tower and tiles.
        data: ``image_mode``, ``image_mean`` and ``image_std`` of the data settings.
    """
    vision = model.vision
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": vision.image_size, "width": vision.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data["image_mean"]),
        "image_std": list(data["image_std"]),
    }
    if model.anyres is not None:
        kind = visual.class_of(model)
        name = "LlavaOnevisionImageProcessor" if kind == "llava_onevision" else "LlavaNextImageProcessor"
        pinpoints = visual.entries(model, kind)["image_grid_pinpoints"]
        side = {"height": vision.image_size, "width": vision.image_size}
        config |= {"image_processor_type": name, "image_grid_pinpoints": pinpoints, "do_pad": True, "size": side}
    elif data["image_mode"] == "stretch":
        config |= {"size": {"height": vision.image_size, "width": vision.image_size}, "do_center_crop": False}
    elif data["image_mode"] == "pad":  # CLIP's processor cannot pad; LLaVA's does, with the mean colour as here
        config |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return config


def processor_at(processor: Config, old: int, new: int) -> Config:
    """A source's preprocessor_config.json for pictures of ``new`` instead of ``old`` pixels a side."""

    def at(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: at(inner) for key, inner in value.items()}
        return new if value == old else value

    return {**processor, **{key: at(processor[key]) for key in ("size", "crop_size") if key in processor}}


def _require_llava(config: Config, where: str | Path) -> None:
    kind = config.get("model_type")
    names = config.get("architectures") or []
    if kind != "llava" or (names and "LlavaForConditionalGeneration" not in names):
        hint = ""
        if "mm_vision_tower" in config or "mm_projector_type" in config:
            hint = "; this is the original LLaVA layout, convert it to llava-hf's with transformers' own script first"
        raise ConversionError(
            f"{where}: unknown architecture {', '.join(names) or 'none'} (model_type {kind!r}); "
            f"known: LlavaForConditionalGeneration (model_type 'llava'){hint}"
        )


def _family(part: Config, name: str, assumed: str, known: dict[str, Family], where: str | Path) -> tuple[str, Family]:
    kind = part.get("model_type", assumed)
    for key, family in known.items():
        if family.model_type == kind:
            return key, family
    raise ConversionError(
        f"{where}: {name}.model_type {kind!r} is unknown; known: {', '.join(f.model_type for f in known.values())}. "
        f"A new one is an entry in llava_mcore/settings/families.py"
    )


def _unsupported(part: Config, only: Mapping[str, tuple[Any, ...]], prefix: str) -> list[str]:
    found = []
    for key, allowed in only.items():
        value = part.get(key)
        if any(one not in allowed for one in (value if isinstance(value, list) else [value])):
            values = " or ".join(repr(one) for one in allowed if one is not None) or "null"
            found.append(f"{prefix}{key}={value!r} (must be {values})")
    return found


def _rope(text: Config, family: Family) -> tuple[Config, list[str]]:
    """Settings of the rotary embedding, from transformers 5's ``rope_parameters`` or 4's ``rope_theta`` and ``rope_scaling``."""
    entry = dict(text.get("rope_scaling") or text.get("rope_parameters") or {})  # the older one wins in transformers, too
    kind = entry.pop("rope_type", None) or entry.pop("type", None) or "default"
    entry.pop("type", None)
    base = entry.pop("rope_theta", None) or text.get("rope_theta") or family.defaults["rope_theta"]
    settings: Config = {"rotary_base": float(base)}
    share = entry.pop("partial_rotary_factor", None) or text.get("partial_rotary_factor") or 1.0
    problems = []
    if "rotary_percent" in family.entries:
        settings["rotary_percent"] = share
    elif share != 1.0:
        problems.append(f"text_config.rope_parameters.partial_rotary_factor={share} (must be 1.0)")
    if kind in OLD_ROPE_TYPES and "longrope" in family.rope_types:
        kind = "longrope"
    if kind != "default" and kind not in family.rope_types:
        known = ", ".join(("default", *family.rope_types))
        problems.append(f"text_config.rope_parameters of type {kind!r} (known for {family.model_type}: {known})")
    elif kind != "default":
        fields = {name for names in ROPE_SCALING[kind] for name in names}
        unknown = sorted(name for name in entry if name not in fields and name not in ROPE_IGNORED)
        if unknown:
            problems.append(f"text_config.rope_parameters: {', '.join(unknown)} for type {kind!r}")
        if "original_max_position_embeddings" in fields:
            longest = text.get("max_position_embeddings", family.defaults["max_position_embeddings"])
            entry.setdefault("original_max_position_embeddings", longest)
            outside = text.get("original_max_position_embeddings", family.defaults.get("original_max_position_embeddings"))
            if outside is not None:  # it wins in transformers, too
                entry["original_max_position_embeddings"] = outside
        settings["rope_scaling"] = {"type": kind, **{name: value for name, value in entry.items() if name in fields}}
    return settings, problems


def _rope_entries(language: LanguageSettings) -> Config:
    """The rotary embedding as config.json has it, for transformers 5 and those before."""
    scaling: Config = {"type": "default"}
    if language.rope_scaling is not None:
        scaling = {name: value for name, value in asdict(language.rope_scaling).items() if value is not None}
    parameters = {"rope_type": scaling.pop("type"), "rope_theta": language.rotary_base, **scaling}
    entries: Config = {"rope_parameters": parameters, "rope_theta": language.rotary_base}
    if language.rotary_percent != 1.0:
        parameters["partial_rotary_factor"] = entries["partial_rotary_factor"] = language.rotary_percent
    if "original_max_position_embeddings" in scaling:  # Phi-3's config reads it there
        entries["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return entries


def _values(part: Config, family: Family) -> Config:
    def value(entry: str) -> Any:
        return part.get(entry, part.get(family.aliases.get(entry, entry), family.defaults[entry]))

    return {setting: value(entry) for setting, entry in family.entries.items()}


def strategies(model_type: str | None) -> dict[str, str]:
    """What is kept of a tower's features -> ``vision_feature_select_strategy``, by the tower's type in config.json."""
    has_class_token = next((f.fixed["class_token"] for f in TOWERS.values() if f.model_type == model_type), True)
    return {kept: name for name, kept in FEATURES[has_class_token].items()}


def _strategy(vision: VisionSettings) -> str:
    return strategies(TOWERS[vision.family].model_type)[vision.select_feature]


def _entries(settings: LanguageSettings | VisionSettings, family: Family) -> Config:
    return {entry: getattr(settings, setting) for setting, entry in family.entries.items()}


def _tied(config: Config) -> bool:
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False))


def _image_token(config: Config) -> int:
    for key in ("image_token_index", "image_token_id"):
        if config.get(key) is not None:
            return int(config[key])
    return 32000
