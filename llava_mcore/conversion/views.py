"""Both kinds of checkpoint seen alike: a plan of tensors, and the published parts of each, read one entry at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from llava_mcore.conversion import fusions, layouts, visual
from llava_mcore.conversion.distributed import DistributedReader
from llava_mcore.conversion.families import DEFAULT_NAMING, OUR_MODULE, ConversionError, Naming, Plan, Tensor
from llava_mcore.conversion.hf_config import to_settings
from llava_mcore.conversion.layouts import CONFIG, NEWLINE, PREFIXES, Source, read_json
from llava_mcore.conversion.weights import Info, Reader, SafetensorsReader, open_weights
from llava_mcore.settings.schema import ModelSettings
from llava_mcore.training import checkpoint_folder as folder

GENERATION_CONFIG = "generation_config.json"
# Carried from a Hugging Face folder to <checkpoint>/hf and back.
HF_FILES = (
    CONFIG,
    GENERATION_CONFIG,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
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

HINTS = {
    "vision_tower": "; name a folder that holds it with --tower FOLDER",
    "language_model": "; a projector alone is imported with --projector beside its decoder and --tower",
}
MADE_SEED = 1234  # of a projector that the source does not have: where training would start as well


class View(Protocol):
    """What conversion and verification ask of a checkpoint of either kind."""

    path: Path
    kind: str
    settings: ModelSettings
    naming: Naming
    plan: Plan

    def info(self, tensor: Tensor) -> Info:
        """Shape of the whole, type and file of an entry."""

    def parts(self, tensor: Tensor) -> list[torch.Tensor]:
        """The published parts of an entry."""

    def whole(self, tensor: Tensor) -> torch.Tensor:
        """An entry as one tensor of ours."""

    def unused(self) -> dict[str, Info]:
        """Published tensors that the model does not build, under their names in this checkpoint."""

    def read_unused(self, name: str) -> torch.Tensor:
        """One of them."""

    def close(self) -> None:
        """Closes the files."""


class HuggingFaceView:
    """A published model, every name and shape checked against its config.json.

    Args:
        source: its folder, or more where the model lies in several.

    Raises:
        ConversionError: naming everything that is missing, unexpected or of a wrong shape.
    """

    kind = "Hugging Face"

    def __init__(self, source: Source | str | Path) -> None:
        self.source = source if isinstance(source, Source) else Source(Path(source))
        self.path = self.source.path
        if not self.path.is_dir():
            raise ConversionError(f"{self.path}: no such folder")
        self.config = read_json(self.path / CONFIG)
        self.layout = layouts.recognise(self.source)
        self.settings = to_settings(self.layout.config, self.path / CONFIG)
        self._readers: list[Reader] = []
        self._infos: dict[str, Info] = {}
        self._homes: dict[str, Reader] = {}
        self.left_out: list[str] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._add(open_weights(self.path), "")
        self._own_names = set(self._infos)
        tower = self.source.tower
        if tower is None and self.layout.kind == "original":
            tower = layouts.tower_folder(self.source, str(self.config.get("mm_vision_tower", "")))
        held = any("vision_tower." in name for name in self._own_names)  # the folder of a tower then only says its sizes
        if tower is not None and not held:
            reader = open_weights(tower)
            inner = any(name.startswith("vision_model.") for name in reader.infos)  # with the rest of CLIP beside it
            self._add(reader, "vision_model." if inner else "")
        if self.source.projector is not None:
            self._add(open_weights(self.source.projector), PREFIXES["projector"])
        made = ("projector",) if self.layout.kind == "decoder" else ()
        found = layouts.find_naming(self._infos, self.settings, str(self.path), made, HINTS)
        self.made = {module for module in made if module not in found}
        self.naming: Naming = {**DEFAULT_NAMING, **found}
        self.plan = layouts.planned(self.settings, self.naming, self.layout.rows)
        # Modules that lie in the source's own folder; what came from elsewhere is not written back there.
        self.own = sorted({t.module for t in self.plan.tensors if t.names[0] in self._own_names})
        carried = NEWLINE if not self.settings.geometry.has_newline else ()
        newline = {name: (self.settings.language.hidden_size,) for name in carried if name in self._infos}
        self._optional = {**self.plan.unused, **newline}
        self.tied_head = self._tied_head()
        self._unused = {
            name: info for name, info in self._infos.items() if name in self._optional or self.plan.buffers.fullmatch(name)
        }
        self._check()

    def _add(self, reader: Reader, prefixes: str | tuple[str, ...]) -> None:
        """The tensors of one folder, of which those under none of ``prefixes`` belong to something else."""
        self._readers.append(reader)
        for name, info in reader.infos.items():
            if not name.startswith(prefixes):
                self.left_out.append(f"{name} in {info.file}")
                continue
            if name in self._infos:
                raise ConversionError(f"two tensors for one name: {name} in {self._infos[name].file} and in {info.file}")
            self._infos[name] = info
            self._homes[name] = reader

    def _tied_head(self) -> str | None:
        """The name of a head that is stored although the model ties it to the embedding."""
        if not self.settings.language.tie_word_embeddings:
            return None
        names = [f"{prefix}lm_head.weight" for prefix in PREFIXES["head"] if f"{prefix}lm_head.weight" in self._infos]
        if not names:
            return None
        embedding = f"{self.naming['language_model']}embed_tokens.weight"
        if embedding in self._infos and not torch.equal(self._read(names[0]), self._read(embedding)):
            raise ConversionError(
                f"{self._infos[names[0]].file}: {names[0]} differs from {embedding}, "
                f"but {CONFIG} ties them (tie_word_embeddings); set it to false if the head is its own"
            )
        return names[0]

    def _check(self) -> None:
        found = self._infos
        expected = {
            name: shape
            for tensor in self.plan.tensors
            if tensor.module not in self.made
            for name, shape in zip(tensor.names, tensor.part_shapes, strict=True)
        }
        problems = [f"missing {name}" for name in expected if name not in found]
        for name, info in found.items():
            shape = expected.get(name, self._optional.get(name))
            if shape is not None and shape != info.shape:
                problems.append(f"{name} in {Path(info.file).name} has shape {list(info.shape)}, {CONFIG} says {list(shape)}")
            if shape is None and name not in self._unused and name != self.tied_head:
                problems.append(f"unexpected {name} in {Path(info.file).name}")
        if problems:
            raise ConversionError(f"{self.path}: its tensors are not those of its {CONFIG}:\n  {_listed(problems)}")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the decoder's embedding, for what has to be made."""
        return self._infos[f"{self.naming['language_model']}embed_tokens.weight"].dtype

    def _read(self, name: str) -> torch.Tensor:
        return self._homes[name].read(name)

    def info(self, tensor: Tensor) -> Info:
        """Shape of the whole, type and file of an entry."""
        if tensor.module in self.made:
            return Info(tensor.shape, self.dtype, "made here")
        first = self._infos[tensor.names[0]]
        return Info(tensor.shape, first.dtype, first.file)

    def parts(self, tensor: Tensor) -> list[torch.Tensor]:
        """The published parts of an entry; a module that the source lacks is drawn as training would draw it."""
        if tensor.module in self.made:
            from llava_mcore.models.initialize import draw  # only now: it brings Megatron-Core, which takes seconds to import

            return fusions.split(draw(tensor.ours, tensor.shape, self.settings, MADE_SEED).to(self.dtype), tensor)
        return [self._read(name) for name in tensor.names]

    def whole(self, tensor: Tensor) -> torch.Tensor:
        """An entry as one tensor of ours."""
        return self.joined(self.parts(tensor), tensor)

    def joined(self, parts: list[torch.Tensor], tensor: Tensor) -> torch.Tensor:
        """Our tensor from its published parts; rows that a vocabulary has gained are the mean of the old, as LLaVA makes them."""
        whole = fusions.join(parts, tensor)
        old, new = tensor.part_shapes[0][0], self.settings.language.vocab_size
        if tensor.fusion == "vocab" and old < new:
            whole[old:new] = mean_row(parts[0])
        return whole

    def unused(self) -> dict[str, Info]:
        """Tensors that the model does not build."""
        return self._unused

    def read_unused(self, name: str) -> torch.Tensor:
        """One of them."""
        return self._read(name)

    def carried_name(self, name: str) -> str:
        """What one of them is called in a checkpoint: as here, unless the model is put together from several folders."""
        return layouts.in_default_naming(name, self.naming) if self.layout.kind == "decoder" else name

    def about(self) -> dict[str, Any]:
        """What an export needs to know to write this source again (``hf/source.json``)."""
        absent = sorted(self.plan.unused.keys() - self._unused.keys())
        known: dict[str, Any] = {"naming": dict(self.naming), "tied_head": self.tied_head, "absent": absent}
        if self.layout.kind != "llava":
            known["kind"] = self.layout.kind
        if self.own != sorted({tensor.module for tensor in self.plan.tensors}):
            known["modules"] = self.own
            known["elsewhere"] = sorted(name for name in self._unused if name not in self._own_names)
        if self.layout.kind == "original" and self.source.vocab_size is None:
            # A row was added for <image>; the tokenizer's own tokens stay.
            rows = max(self.layout.rows, layouts.tokens_of(self.path))
            known["rows"] = rows
        return known

    def close(self) -> None:
        """Closes the files."""
        for reader in self._readers:
            reader.close()


class CheckpointView:
    """A checkpoint of this project; its optimizer, if any, is not touched.

    Args:
        path: the folder.
        layout: "source": in the names of the source it was imported from; "llava-hf": in those that transformers writes today;
            "decoder": its language model alone, likewise.

    Raises:
        CheckpointError, ConversionError: naming what is missing or does not fit its settings.yaml.
    """

    kind = "distributed"

    def __init__(self, path: str | Path, layout: str = "source") -> None:
        self.path = folder.require_checkpoint(path)
        self.meta = folder.read_meta(path)
        self.settings = folder.read_model_settings(path)
        source = self.path / folder.HF / SOURCE
        self.source = read_json(source) if source.is_file() else {}
        self.stored_naming: Naming = {**DEFAULT_NAMING, **self.source.get("naming", {})}
        self.asked, self.published = layout, layout == "source"
        self.naming: Naming = self.stored_naming if self.published else {**DEFAULT_NAMING, **layouts.ALONE.get(layout, {})}
        self.plan = layouts.planned(self.settings, self.naming, self.source.get("rows") if self.published else None)
        self.weights = DistributedReader(self.path / folder.WEIGHTS)
        self._check()
        unused = self.path / folder.HF / UNUSED
        self._unused = SafetensorsReader({unused: None}) if unused.is_file() else None
        self._unused_names = {self._unused_name(name): name for name in (self._unused.infos if self._unused else ())}

    @property
    def layout(self) -> str:
        """The kind of layout it is seen in."""
        if self.asked == "decoder":
            return self.asked
        return str(self.source.get("kind", "llava")) if self.published else visual.class_of(self.settings)

    @property
    def tied_head(self) -> str | None:
        """The name under which the source stored the tied head as well."""
        name: str | None = self.source.get("tied_head") if self.published else None
        return name

    @property
    def embedding(self) -> str:
        """The published name of the token embedding."""
        return next(tensor.names[0] for tensor in self.plan.tensors if tensor.ours.endswith("word_embeddings.weight"))

    @property
    def modules(self) -> set[str]:
        """The modules that the layout it is seen in holds."""
        every = set(layouts.ALONE.get(self.asked, OUR_MODULE)) & set(OUR_MODULE.values())
        return set(self.source.get("modules", every)) if self.published else every

    def _unused_name(self, name: str) -> str:
        return name if self.published else layouts.in_default_naming(name, self.stored_naming)

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
            raise ConversionError(f"{self.weights.path}: its tensors are not those of {folder.SETTINGS}:\n  {_listed(problems)}")

    def info(self, tensor: Tensor) -> Info:
        """Shape, type and folder of an entry."""
        return self.weights.infos[tensor.ours]

    def whole(self, tensor: Tensor) -> torch.Tensor:
        """An entry as one tensor of ours."""
        return self.weights.read(tensor.ours)

    def parts(self, tensor: Tensor) -> list[torch.Tensor]:
        """The published parts of an entry."""
        return fusions.split(self.whole(tensor), tensor)

    def unused(self) -> dict[str, Info]:
        """Tensors of the source that the model does not build."""
        if self._unused is None or self.asked in layouts.ALONE:
            return {}
        return {name: self._unused.infos[stored] for name, stored in self._unused_names.items()}

    def read_unused(self, name: str) -> torch.Tensor:
        """One of them."""
        assert self._unused is not None
        return self._unused.read(self._unused_names[name])

    def close(self) -> None:
        """Closes the files."""
        self.weights.close()
        if self._unused:
            self._unused.close()


def mean_row(table: torch.Tensor) -> torch.Tensor:
    """The mean of the rows of a table [V, H], summed in float64, in the table's type."""
    total = torch.zeros(table.shape[1], dtype=torch.float64)
    for rows in table.split(512):
        total += rows.sum(dim=0, dtype=torch.float64)
    return (total / table.shape[0]).to(table.dtype)


def _listed(problems: list[str]) -> str:
    return "\n  ".join(problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else []))


def open_view(source: Source | str | Path) -> HuggingFaceView | CheckpointView:
    """A checkpoint of either kind.

    Raises:
        ConversionError: if the folder is neither.
    """
    source = source if isinstance(source, Source) else Source(Path(source))
    if (source.path / folder.META).is_file():
        return CheckpointView(source.path)
    if folder.is_hf(source.path):
        return HuggingFaceView(source)
    raise ConversionError(f"{source.path}: neither a published model ({CONFIG}) nor a checkpoint of this project ({folder.META})")
