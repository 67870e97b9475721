"""Both kinds of checkpoint seen alike: a plan of tensors, and the published parts of each, read one entry at a time."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from llava_mcore.conversion import fusions, hf_config
from llava_mcore.conversion.families import (
    DEFAULT_NAMING,
    ConversionError,
    Naming,
    Plan,
    Tensor,
    plan,
)
from llava_mcore.conversion.layouts import PREFIXES, find_naming
from llava_mcore.conversion.weights import DistributedReader, Info, SafetensorsReader
from llava_mcore.settings.schema import ModelSettings
from llava_mcore.training import checkpoint_folder as folder

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# Carried from a Hugging Face folder to <checkpoint>/hf and back.
HF_FILES = (
    CONFIG,
    GENERATION_CONFIG,
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
# Carried to <checkpoint>/tokenizer and back.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
UNUSED = "unused.safetensors"
SOURCE = "source.json"

BATCH_BYTES = 1 << 28  # tensors of a distributed checkpoint are read together up to this size


class View(Protocol):
    """What conversion and verification ask of a checkpoint of either kind."""

    path: Path
    kind: str
    settings: ModelSettings
    naming: Naming
    plan: Plan

    def info(self, tensor: Tensor) -> Info:
        """Shape of the whole, type and file of an entry."""

    def parts(self) -> Iterator[tuple[Tensor, list[torch.Tensor]]]:
        """Every entry of the plan with its published parts."""

    def unused(self) -> dict[str, Info]:
        """Published tensors that the model does not build, under their names in this checkpoint."""

    def read_unused(self, name: str) -> torch.Tensor:
        """One of them."""

    def close(self) -> None:
        """Closes the files."""


def read_json(file: Path) -> dict[str, Any]:
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


class HuggingFaceView:
    """A folder that ``save_pretrained`` wrote, every name and shape checked against its config.json.

    Args:
        path: the folder.

    Raises:
        ConversionError: naming everything that is missing, unexpected or of a wrong shape.
    """

    kind = "Hugging Face"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ConversionError(f"{self.path}: no such folder")
        self.config = read_json(self.path / CONFIG)
        self.settings = hf_config.to_settings(self.config, self.path / CONFIG)
        self.weights = SafetensorsReader(self.path)
        try:
            names = self.weights.infos
            self.naming: Naming = find_naming(names, self.settings, str(self.path))
            self.plan = plan(self.settings, self.naming)
            self.tied_head = self._tied_head()
            self._unused = {
                name: info for name, info in names.items() if name in self.plan.unused or self.plan.buffers.fullmatch(name)
            }
            self._check()
        except BaseException:
            self.close()
            raise

    def _tied_head(self) -> str | None:
        """The name of a head that is stored although the model ties it to the embedding."""
        if not self.settings.language.tie_word_embeddings:
            return None
        names = [f"{prefix}lm_head.weight" for prefix in PREFIXES["head"] if f"{prefix}lm_head.weight" in self.weights.infos]
        if not names:
            return None
        embedding = f"{self.naming['language_model']}embed_tokens.weight"
        if not torch.equal(self.weights.read(names[0]), self.weights.read(embedding)):
            raise ConversionError(
                f"{self.weights.infos[names[0]].file}: {names[0]} differs from {embedding}, "
                f"but {CONFIG} ties them (tie_word_embeddings); set it to false if the head is its own"
            )
        return names[0]

    def _check(self) -> None:
        found, expected = self.weights.infos, self.plan.names
        problems = [f"missing {name}" for name in expected if name not in found]
        for name, info in found.items():
            shape = expected.get(name, self.plan.unused.get(name))
            if shape is not None and shape != info.shape:
                problems.append(f"{name} in {Path(info.file).name} has shape {list(info.shape)}, {CONFIG} says {list(shape)}")
            if shape is None and name not in self._unused and name != self.tied_head:
                problems.append(f"unexpected {name} in {Path(info.file).name}")
        if problems:
            listed = "\n  ".join(problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else []))
            raise ConversionError(f"{self.path}: its tensors are not those of its {CONFIG}:\n  {listed}")

    def info(self, tensor: Tensor) -> Info:
        """Shape of the whole, type and file of an entry."""
        first = self.weights.infos[tensor.names[0]]
        return Info(tensor.shape, first.dtype, first.file)

    def parts(self) -> Iterator[tuple[Tensor, list[torch.Tensor]]]:
        """Every entry of the plan with its published parts."""
        for tensor in self.plan.tensors:
            yield tensor, [self.weights.read(name) for name in tensor.names]

    def joined(self, wanted: Container[str] | None = None) -> Iterator[tuple[Tensor, torch.Tensor]]:
        """Every entry of the plan (or those with a key in ``wanted``) as one tensor of ours."""
        for tensor in self.plan.tensors:
            if wanted is None or tensor.ours in wanted:
                yield tensor, fusions.join([self.weights.read(name) for name in tensor.names], tensor)

    def unused(self) -> dict[str, Info]:
        """Tensors that the model does not build."""
        return self._unused

    def read_unused(self, name: str) -> torch.Tensor:
        """One of them."""
        return self.weights.read(name)

    def close(self) -> None:
        """Closes the files."""
        self.weights.close()


class CheckpointView:
    """A checkpoint of this project; its optimizer, if any, is not touched.

    Args:
        path: the folder.

    Raises:
        CheckpointError, ConversionError: naming what is missing or does not fit its settings.yaml.
    """

    kind = "distributed"

    def __init__(self, path: str | Path) -> None:
        self.path = folder.require_checkpoint(path)
        self.meta = folder.read_meta(path)
        self.settings = folder.read_model_settings(path)
        source = self.path / folder.HF / SOURCE
        self.source = read_json(source) if source.is_file() else {}
        self.naming: Naming = {**DEFAULT_NAMING, **self.source.get("naming", {})}
        self.plan = plan(self.settings, self.naming)
        self.weights = DistributedReader(self.path / folder.WEIGHTS)
        self._check()
        unused = self.path / folder.HF / UNUSED
        self._unused = SafetensorsReader(unused) if unused.is_file() else None

    @property
    def tied_head(self) -> str | None:
        """The name under which the source stored the tied head as well."""
        name: str | None = self.source.get("tied_head")
        return name

    def _check(self) -> None:
        found, expected = self.weights.infos, {tensor.ours: tensor.shape for tensor in self.plan.tensors}
        problems = [f"missing {key}" for key in expected if key not in found]
        problems += [f"unexpected {key}" for key in found if key not in expected]
        problems += [
            f"{key} has shape {list(found[key].shape)}, {folder.SETTINGS} says {list(shape)}"
            for key, shape in expected.items()
            if key in found and found[key].shape != shape
        ]
        if problems:
            listed = "\n  ".join(problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else []))
            raise ConversionError(f"{self.weights.path}: its tensors are not those of {folder.SETTINGS}:\n  {listed}")

    def info(self, tensor: Tensor) -> Info:
        """Shape, type and folder of an entry."""
        return self.weights.infos[tensor.ours]

    def joined(self) -> Iterator[tuple[Tensor, torch.Tensor]]:
        """Every entry of the plan as one tensor of ours."""
        for batch in _batches(self.plan.tensors, self.weights.infos):
            loaded = self.weights.read(tensor.ours for tensor in batch)
            for tensor in batch:
                yield tensor, loaded.pop(tensor.ours)

    def parts(self) -> Iterator[tuple[Tensor, list[torch.Tensor]]]:
        """Every entry of the plan with its published parts."""
        for tensor, whole in self.joined():
            yield tensor, fusions.split(whole, tensor)

    def unused(self) -> dict[str, Info]:
        """Tensors of the source that the model does not build."""
        return self._unused.infos if self._unused else {}

    def read_unused(self, name: str) -> torch.Tensor:
        """One of them."""
        assert self._unused is not None
        return self._unused.read(name)

    def close(self) -> None:
        """Closes the files."""
        if self._unused:
            self._unused.close()


def _batches(tensors: tuple[Tensor, ...], infos: dict[str, Info]) -> Iterator[list[Tensor]]:
    batch: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if batch and filled + infos[tensor.ours].nbytes > BATCH_BYTES:
            yield batch
            batch, filled = [], 0
        batch.append(tensor)
        filled += infos[tensor.ours].nbytes
    if batch:
        yield batch


def open_view(path: str | Path) -> HuggingFaceView | CheckpointView:
    """A checkpoint of either kind.

    Raises:
        ConversionError: if the folder is neither.
    """
    if (Path(path) / folder.META).is_file():
        return CheckpointView(path)
    if folder.is_hf(path):
        return HuggingFaceView(path)
    raise ConversionError(f"{path}: neither a Hugging Face folder ({CONFIG}) nor a checkpoint of this project ({folder.META})")
