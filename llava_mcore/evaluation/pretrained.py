"""A model ready for use from a checkpoint of this project or from a published one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_mcore.conversion.convert import load_hf_into
from llava_mcore.conversion.hf_config import to_settings
from llava_mcore.conversion.layouts import CONFIG, Source, recognise
from llava_mcore.models import llava
from llava_mcore.parallel import groups as process_groups
from llava_mcore.parallel.groups import Groups
from llava_mcore.platform import device
from llava_mcore.settings import compose
from llava_mcore.settings.compose import SettingsError
from llava_mcore.settings.layouts import layout_problems
from llava_mcore.settings.schema import ModelSettings, ParallelSettings
from llava_mcore.training import checkpoint_folder
from llava_mcore.training.checkpoint import load_model, model_state


class LlavaModel(llava.LlavaModel):
    """The model with the weights of a checkpoint; see :class:`llava_mcore.models.llava.LlavaModel` for how it is called."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        parallel: ParallelSettings | Mapping[str, Any] | None = None,
        *,
        dtype: str = "float32",
        groups: Groups | None = None,
    ) -> LlavaModel:
        """Builds this rank's part of a model and loads its weights; collective.

        Args:
            path: a checkpoint of this project, the output folder of a run (its newest checkpoint), or a published LLaVA.
            parallel: the layout, as settings or as ``{"tensor": 2}``; None: one process. ``virtual_pipeline`` is 1.
            dtype: "float32" or "bfloat16", of weights and activations.
            groups: process groups of this layout; None: they are built here, once in a process.

        Returns:
            the model in evaluation mode, on this rank's device; ``model.settings``, ``model.parallel`` and ``model.groups`` say
            what it is.

        Raises:
            SettingsError: the layout does not fit the model or the number of processes.
            CheckpointError, ConversionError: naming what is missing or wrong in ``path``.
        """
        path = checkpoint_folder.newest(path) or Path(path)
        published = not (path / checkpoint_folder.META).is_file() and checkpoint_folder.is_hf(path)
        if published:
            settings = to_settings(recognise(Source(path)).config, path / CONFIG)
        else:
            settings = checkpoint_folder.read_model_settings(checkpoint_folder.require_checkpoint(path))
        layout = _layout(settings, parallel)
        place = device.start(layout.timeout_minutes)
        groups = process_groups.build(layout) if groups is None else groups
        model = cls(settings, layout, dtype, groups).to(place.device).eval()
        parts = llava.ModelParts([model])
        if published:
            load_hf_into(model_state(parts, groups), path)
        else:
            load_model(path, parts, groups)
        return model


def _layout(model: ModelSettings, parallel: ParallelSettings | Mapping[str, Any] | None) -> ParallelSettings:
    """The layout, checked against the model and the number of processes."""
    values = asdict(parallel) if isinstance(parallel, ParallelSettings) else dict(parallel or {})
    stored = {
        "model": asdict(model),
        "data": {"sequence_length": model.language.max_position_embeddings},
        "train": {"lr": 1.0},  # nothing is trained; it is only required
        "parallel": values,
    }
    settings = compose.from_stored(stored, [])
    problems = layout_problems(settings, device.world_size())
    if settings.parallel.virtual_pipeline > 1:
        problems.append("parallel.virtual_pipeline must be 1 to load one model; a checkpoint loads at any layout")
    if problems:
        raise SettingsError(problems)
    return settings.parallel
