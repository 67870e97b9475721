"""The published layouts: which prefixes each module's names have had. No torch."""

from __future__ import annotations

from collections.abc import Collection

from llava_mcore.conversion.families import DEFAULT_NAMING, OUR_MODULE, ConversionError, Naming, families
from llava_mcore.settings.schema import ModelSettings

PREFIXES: dict[str, tuple[str, ...]] = {
    "vision_tower": ("vision_tower.", "vision_tower.vision_model.", "model.vision_tower.", "model.vision_tower.vision_model."),
    "projector": ("multi_modal_projector.", "model.multi_modal_projector."),
    "language_model": ("language_model.model.", "model.language_model."),
    "head": ("language_model.", ""),
}


def find_naming(names: Collection[str], model: ModelSettings, where: str) -> dict[str, str]:
    """Which generation of key names a checkpoint uses, found for each module by itself.

    Raises:
        ConversionError: if a module is not there under any known name, or under two of them.
    """
    naming = dict(DEFAULT_NAMING)
    problems = []
    for module, family in families(model).items():
        found = [prefix for prefix in PREFIXES[module] if prefix + family.anchor in names]
        if len(found) == 1:
            naming[module] = found[0]
        elif found:
            problems.append("two tensors for one name: " + " and ".join(prefix + family.anchor for prefix in found))
        else:
            problems.append(
                f"no {OUR_MODULE[module]}: none of " + ", ".join(prefix + family.anchor for prefix in PREFIXES[module])
            )
    if problems:
        raise ConversionError(f"{where}: " + "; ".join(problems))
    return naming


def in_default_naming(name: str, naming: Naming) -> str:
    """A published name as today's ``save_pretrained`` writes it, so that checkpoints of two generations can be compared."""
    for module in sorted(naming, key=lambda module: -len(naming[module])):
        if name.startswith(naming[module]):
            return DEFAULT_NAMING[module] + name.removeprefix(naming[module])
    return name
