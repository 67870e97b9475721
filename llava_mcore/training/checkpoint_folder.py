"""What a checkpoint folder of this project holds, and how it is read, written and published. No torch, no megatron.

<checkpoint>/meta.json        format, step, what is inside, who wrote it
<checkpoint>/settings.yaml    the composed settings; after an import only the ``model`` group
<checkpoint>/weights/         Megatron-Core's distributed checkpoint
<checkpoint>/tokenizer/       the tokenizer's files, if known
<checkpoint>/hf/              what Hugging Face needs back and the model does not hold, if known
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from llava_mcore import __version__
from llava_mcore.settings.schema import ModelSettings

FORMAT = 1
META = "meta.json"
SETTINGS = "settings.yaml"
WEIGHTS = "weights"
TOKENIZER = "tokenizer"
HF = "hf"

# In the output folder of a run: its checkpoints, and a file that names the newest.
CHECKPOINTS = "checkpoints"
LATEST = "latest"

SIDECARS = (TOKENIZER, HF)

# Written by Megatron-Core when, and only when, all of weights/ is on disk.
WEIGHTS_COMPLETE = "metadata.json"


class CheckpointError(ValueError):
    """A folder is not the checkpoint it should be; the message names the path and the fix."""


def require_checkpoint(path: str | Path) -> Path:
    """The path of a complete checkpoint of this project.

    Raises:
        CheckpointError: naming everything that is missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    missing = [name for name in (META, SETTINGS, f"{WEIGHTS}/{WEIGHTS_COMPLETE}") if not (folder / name).is_file()]
    if missing:
        hint = "; it is a Hugging Face folder, convert it with tools/convert_checkpoint.py import" if is_hf(folder) else ""
        raise CheckpointError(f"{folder}: not a complete checkpoint of this project, it has no {', '.join(missing)}{hint}")
    return folder


def newest(run: str | Path) -> Path | None:
    """The newest complete checkpoint in the output folder of a run, or None if it has none yet."""
    pointer = Path(run) / CHECKPOINTS / LATEST
    if not pointer.is_file():
        return None
    return require_checkpoint(pointer.parent / pointer.read_text(encoding="utf-8").strip())


def is_hf(path: str | Path) -> bool:
    """Whether a folder looks like one that ``save_pretrained`` wrote."""
    return (Path(path) / "config.json").is_file()


def read_meta(path: str | Path) -> dict[str, Any]:
    """``meta.json`` of a checkpoint, its format checked."""
    file = Path(path) / META
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; the folder is not a checkpoint of this project") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else meta
        raise CheckpointError(f"{file}: checkpoint format {found!r}; this version reads format {FORMAT}")
    return meta


def write_meta(path: str | Path, *, step: int, contents: list[str], **more: Any) -> None:
    """Writes ``meta.json``.

    Args:
        path: the checkpoint folder.
        step: optimizer steps behind the weights.
        contents: ``["model"]`` or ``["model", "optimizer"]``.
        more: further entries.
    """
    meta = {"format": FORMAT, "step": step, "contents": contents, "created_by": f"llava_mcore {__version__}", **more}
    (Path(path) / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def read_settings(path: str | Path) -> dict[str, Any]:
    """``settings.yaml`` of a checkpoint as a plain dict, not validated."""
    file = Path(path) / SETTINGS
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; the folder is not a checkpoint of this project") from None
    except yaml.YAMLError as error:
        raise CheckpointError(f"{file}: not readable as YAML ({error})") from None
    if not isinstance(settings, dict) or "model" not in settings:
        raise CheckpointError(f"{file}: has no group model")
    return settings


def read_model_settings(path: str | Path) -> ModelSettings:
    """The model a checkpoint belongs to.

    Raises:
        CheckpointError: listing every setting that does not fit the schema.
    """
    values = read_settings(path)["model"]
    try:
        return TypeAdapter(ModelSettings).validate_python(values)
    except ValidationError as error:
        problems = [f"model.{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise CheckpointError(f"{Path(path) / SETTINGS}: " + "; ".join(problems)) from None


def write_model_settings(path: str | Path, model: ModelSettings) -> None:
    """Writes a ``settings.yaml`` that holds the ``model`` group alone, as an import does."""
    text = yaml.safe_dump({"model": asdict(model)}, sort_keys=False)
    (Path(path) / SETTINGS).write_text(text, encoding="utf-8")


def copy_sidecars(source: str | Path, target: str | Path) -> None:
    """Carries tokenizer/ and hf/ from one checkpoint to another; what the source lacks is left out."""
    for name in SIDECARS:
        if (Path(source) / name).is_dir():
            shutil.copytree(Path(source) / name, Path(target) / name, dirs_exist_ok=True)


@contextmanager
def published(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that takes its final name only when the block ends without an error.

    A killed run leaves ``.<name>.partial`` beside the target, which the next run removes; the final name never holds half a
    folder. For one process.

    Args:
        out: the final folder.
        overwrite: replace an existing one that looks like a checkpoint; anything else is never deleted.
    """
    out = Path(os.path.abspath(out))
    if out.exists():
        _require_replaceable(out, overwrite)
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    out.parent.mkdir(parents=True, exist_ok=True)
    _restore(old, out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync(partial)
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _restore(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync_path(out.parent)


def _restore(old: Path, out: Path) -> None:
    """Undoes a replacement that ended between its two renames."""
    if not old.exists():
        return
    if out.exists():
        shutil.rmtree(old)
    else:
        old.rename(out)


def _require_replaceable(out: Path, overwrite: bool) -> None:
    if not out.is_dir():
        raise CheckpointError(f"{out}: exists and is not a folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{out}: exists; name another folder or pass --overwrite (overwrite=True)")
    if not (out / META).is_file() and not is_hf(out):
        raise CheckpointError(f"{out}: holds neither {META} nor config.json, so it is not a checkpoint and is not overwritten")


def sync(folder: Path) -> None:
    """Forces every file and folder below ``folder`` to disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync_path(Path(root) / name)
        sync_path(Path(root))


def sync_path(path: Path) -> None:
    """Forces one file, or the names in one folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
