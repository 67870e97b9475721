"""config.json of transformers' LLaVA to and from this project's model settings. No torch.

The tables below say which entry means which setting; what cannot be expressed is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llava_mcore.conversion.families import ConversionError
from llava_mcore.settings.schema import LanguageSettings, ModelSettings, VisionSettings

Config = dict[str, Any]


@dataclass(frozen=True)
class ConfigFamily:
    """One published architecture of a tower or decoder.

    Args:
        model_type: its name in config.json.
        fields: setting -> entry, where they carry the same value.
        defaults: what transformers assumes where an entry is left out, as published files do.
        only: entries that must have one of these values, and what it would take otherwise.
    """

    model_type: str
    fields: dict[str, str]
    defaults: Config
    only: dict[str, tuple[Any, ...]]


TOWERS = {
    "clip": ConfigFamily(
        model_type="clip_vision_model",
        fields={
            "image_size": "image_size",
            "patch_size": "patch_size",
            "hidden_size": "hidden_size",
            "ffn_hidden_size": "intermediate_size",
            "num_layers": "num_hidden_layers",
            "num_attention_heads": "num_attention_heads",
            "norm_eps": "layer_norm_eps",
        },
        defaults={
            "image_size": 224,
            "patch_size": 32,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "layer_norm_eps": 1e-5,
        },
        only={"hidden_act": (None, "quick_gelu"), "num_channels": (None, 3)},
    )
}
DECODERS = {
    "llama": ConfigFamily(
        model_type="llama",
        fields={
            "hidden_size": "hidden_size",
            "ffn_hidden_size": "intermediate_size",
            "num_layers": "num_hidden_layers",
            "num_attention_heads": "num_attention_heads",
            "num_query_groups": "num_key_value_heads",
            "kv_channels": "head_dim",
            "vocab_size": "vocab_size",
            "max_position_embeddings": "max_position_embeddings",
            "norm_eps": "rms_norm_eps",
        },
        defaults={
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "head_dim": None,
            "vocab_size": 32000,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
        },
        only={
            "hidden_act": (None, "silu"),
            "attention_bias": (None, False),
            "mlp_bias": (None, False),
            "sliding_window": (None,),
            "partial_rotary_factor": (None, 1.0),
        },
    )
}
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
FEATURES = {"default": "patch", "full": "cls_patch"}
ROPE_TYPES = (None, "default")


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
    rope, rope_problems = _rope(text)
    problems += rope_problems
    layer = config.get("vision_feature_layer", -2)
    feature = config.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int):
        problems.append(f"vision_feature_layer={layer}: only one layer can be selected")
    if feature not in FEATURES:
        problems.append(f"vision_feature_select_strategy={feature!r}: known are {', '.join(FEATURES)}")
    if problems:
        raise ConversionError(f"{where}: not supported: " + "; ".join(problems))

    vision_fields = _values(vision, tower)
    language_fields = _values(text, decoder)
    if layer >= 0:  # counted from the front: hidden state 0 is the one before the first layer
        layer -= vision_fields["num_layers"] + 1
    language_fields["rotary_base"] = rope
    language_fields["tie_word_embeddings"] = _tied(config)
    values = {
        "vision": {"family": vision_name, **vision_fields, "select_layer": layer, "select_feature": FEATURES[feature]},
        "projector": {"type": "mlp2x_gelu"},
        "language": {"family": text_name, **language_fields},
        "image_token_id": _image_token(config),
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
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": model.image_token_id,
        "image_seq_length": vision.embeddings_per_image,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.select_layer,
        "vision_feature_select_strategy": {v: k for k, v in FEATURES.items()}[vision.select_feature],
        "tie_word_embeddings": language.tie_word_embeddings,
        "vision_config": {
            "model_type": TOWERS[vision.family].model_type,
            **_entries(vision, TOWERS[vision.family]),
            "hidden_act": "quick_gelu",
            "num_channels": 3,
            "projection_dim": vision.hidden_size,
        },
        "text_config": {
            "model_type": DECODERS[language.family].model_type,
            **_entries(language, DECODERS[language.family]),
            "num_key_value_heads": language.query_groups,
            "head_dim": language.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": language.rotary_base},
            "rope_theta": language.rotary_base,  # read by transformers before 5.0
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
        for setting, entry in family.fields.items():
            if getattr(settings, setting) != getattr(old, setting):
                entries[entry] = getattr(settings, setting)
    if model.language.rotary_base != before.language.rotary_base:
        text["rope_theta"] = model.language.rotary_base
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": model.language.rotary_base}
    if model.language.tie_word_embeddings != before.language.tie_word_embeddings:
        new["tie_word_embeddings"] = text["tie_word_embeddings"] = model.language.tie_word_embeddings
    if model.image_token_id != before.image_token_id:
        new.pop("image_token_id", None)
        new["image_token_index"] = model.image_token_id
    if model.vision.select_feature != before.vision.select_feature:
        new["vision_feature_select_strategy"] = {v: k for k, v in FEATURES.items()}[model.vision.select_feature]
    if model.vision.select_layer != before.vision.select_layer:
        new["vision_feature_layer"] = model.vision.select_layer
    return new


def same_model(one: ModelSettings, other: ModelSettings) -> bool:
    """Whether two settings describe one model, whatever is left to derive; the initialisation does not count."""

    def essence(model: ModelSettings) -> tuple[Any, ...]:
        language = model.language
        fields = {k: v for k, v in asdict(language).items() if k not in ("num_query_groups", "kv_channels")}
        derived = (language.query_groups, language.head_dim)
        return fields, derived, asdict(model.vision), asdict(model.projector), model.image_token_id

    return essence(one) == essence(other)


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


def preprocessor(vision: VisionSettings, data: Mapping[str, Any]) -> Config:
    """A preprocessor_config.json for the pictures a model was trained on.

    Args:
        vision: the tower.
        data: ``image_mode``, ``image_mean`` and ``image_std`` of the data settings.
    """
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
    if data["image_mode"] == "pad":  # CLIP's processor cannot pad; LLaVA's does, with the mean colour as here
        config |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return config


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


def _family(part: Config, name: str, assumed: str, known: dict[str, ConfigFamily], where: str | Path) -> tuple[str, ConfigFamily]:
    kind = part.get("model_type", assumed)
    for key, family in known.items():
        if family.model_type == kind:
            return key, family
    raise ConversionError(
        f"{where}: {name}.model_type {kind!r} is unknown; known: {', '.join(f.model_type for f in known.values())}. "
        f"A new one is an entry in llava_mcore/conversion/families.py and one in hf_config.py"
    )


def _unsupported(part: Config, only: dict[str, tuple[Any, ...]], prefix: str) -> list[str]:
    found = []
    for key, allowed in only.items():
        if part.get(key) not in allowed:
            values = " or ".join(repr(value) for value in allowed if value is not None) or "null"
            found.append(f"{prefix}{key}={part[key]!r} (must be {values})")
    return found


def _rope(text: Config) -> tuple[float, list[str]]:
    """The rotary base, from transformers 5's ``rope_parameters`` or 4's ``rope_theta`` and ``rope_scaling``."""
    problems = []
    parameters = text.get("rope_parameters") or {}
    scaling = text.get("rope_scaling") or {}
    for name, entry in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        kind = entry.get("rope_type", entry.get("type"))
        if kind not in ROPE_TYPES:
            problems.append(f"text_config.{name} of type {kind!r} (rope scaling is not supported)")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"text_config.rope_parameters.partial_rotary_factor={parameters['partial_rotary_factor']} (must be 1.0)")
    base = parameters.get("rope_theta") or text.get("rope_theta") or 10000.0
    return float(base), problems


def _values(part: Config, family: ConfigFamily) -> Config:
    return {setting: part.get(entry, family.defaults[entry]) for setting, entry in family.fields.items()}


def _entries(settings: LanguageSettings | VisionSettings, family: ConfigFamily) -> Config:
    return {entry: getattr(settings, setting) for setting, entry in family.fields.items()}


def _tied(config: Config) -> bool:
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False))


def _image_token(config: Config) -> int:
    for key in ("image_token_index", "image_token_id"):
        if config.get(key) is not None:
            return int(config[key])
    return 32000
