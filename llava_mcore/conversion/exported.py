"""What an export holds besides the tensors that the model builds, and what its config.json describes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from llava_mcore.conversion import layouts
from llava_mcore.conversion.families import ConversionError
from llava_mcore.conversion.layouts import CONFIG, NEWLINE
from llava_mcore.conversion.views import UNUSED, CheckpointView
from llava_mcore.conversion.weights import Info
from llava_mcore.settings.schema import ModelSettings
from llava_mcore.training import checkpoint_folder as folder


@dataclass(frozen=True)
class Form:
    """The tensors of an export.

    Attributes:
        model: what its config.json describes.
        scratch: whether that config is written from the settings, not taken from a source.
        infos: every tensor, in the order of the files.
        kept: what the source held and the model does not build.
        made: norms that change nothing, for names that transformers' class has and this model has not.
        view: the checkpoint.
    """

    model: ModelSettings
    scratch: bool
    infos: dict[str, Info]
    kept: dict[str, Info]
    made: dict[str, torch.Tensor]
    view: CheckpointView

    def loose(self) -> dict[str, Callable[[], torch.Tensor]]:
        """What the model does not build, read or made when called."""
        kept = {name: partial(self.view.read_unused, name) for name in self.kept}
        return {**kept, **{name: partial(_itself, tensor) for name, tensor in self.made.items()}}


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def form_of(view: CheckpointView) -> Form:
    """What exporting a checkpoint in the layout it is seen in will write.

    Raises:
        ConversionError: something that the source held did not come along, or has no place in the layout.
    """
    if view.asked == "decoder":
        return Form(view.settings, True, _built(view), {}, {}, view)
    _require_expressible(view)
    has_config = (view.path / folder.HF / CONFIG).is_file()
    imported_as = view.source.get("kind", "llava")
    newline = sorted(set(NEWLINE) & view.unused().keys())
    if not view.published and newline:
        raise ConversionError(
            f"{view.path}: holds {newline[0]}, which the class of its settings cannot express; export it as it was imported "
            f"(--layout source)"
        )
    scratch = not has_config or (not view.published and imported_as != view.layout)
    kept, model = view.unused(), view.settings
    if view.published:
        kept = {name: info for name, info in kept.items() if name not in view.source.get("elsewhere", ())}
    missing = sorted(view.plan.unused.keys() - kept.keys() - set(view.source.get("absent", ())))
    made: dict[str, torch.Tensor] = {}
    if missing and not scratch and "vision_tower" in view.modules:
        raise ConversionError(
            f"{view.path / folder.HF / UNUSED}: lacks {', '.join(missing[:5])} ({len(missing)} such), which "
            f"{CONFIG} calls for; import the source again, or remove {folder.HF}/ to export without them"
        )
    if scratch and view.plan.unused.keys() - kept.keys():
        model, made = as_scratch(view.settings), _identity(view)
        kept = {}
    extra = {name: Info(tuple(tensor.shape), tensor.dtype, "") for name, tensor in made.items()}
    infos = {**_built(view), **kept, **extra}
    return Form(model, scratch, infos, kept, made, view)


def _built(view: CheckpointView) -> dict[str, Info]:
    """The published tensors of what the model builds and the layout holds."""
    infos: dict[str, Info] = {}
    for entry in view.plan.tensors:
        if entry.module not in view.modules:
            continue
        for name, shape in zip(entry.names, entry.part_shapes, strict=True):
            infos[name] = Info(shape, view.info(entry).dtype, "")
            if view.tied_head and name == view.embedding:
                infos[view.tied_head] = infos[name]
    return infos


def _require_expressible(view: CheckpointView) -> None:
    """Refuses what LLaVA's classes in transformers would silently leave out: they hand every patch to the decoder."""
    model = view.settings
    chosen = {
        "model.projector.token_merging": model.projector.token_merging,
        "model.projector.pooling": model.projector.pooling,
        "model.vision.token_merging": model.vision.token_merging,
    }
    for name in (name for name, value in chosen.items() if value is not None):
        every = model.vision.side**2
        raise ConversionError(
            f"{view.path}: {name} makes {model.embeddings_per_image} embeddings of a picture, and transformers' classes, which "
            f"know no such thing, would make {every}. Answer with it here (llava_mcore.evaluation), or train on from this "
            f"checkpoint (train.init_from) with {name}=null and export that one"
        )


def as_scratch(model: ModelSettings) -> ModelSettings:
    """The same model with no tower layer after the selected one."""
    model = copy.deepcopy(model)
    model.vision.num_layers, model.vision.select_layer = model.vision.used_layers, -1
    return model


def _identity(view: CheckpointView) -> dict[str, torch.Tensor]:
    dtype = next(view.info(entry).dtype for entry in view.plan.tensors if entry.module == "vision_tower")
    return {
        name: torch.ones(shape, dtype=dtype) if name.endswith(".weight") else torch.zeros(shape, dtype=dtype)
        for name, shape in layouts.planned(as_scratch(view.settings), view.naming).unused.items()
    }
