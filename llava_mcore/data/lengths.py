"""How long the text of every sample is, for one tokenizer and one template: what a run is planned from without reading anything.

A column beside the index, named by a digest of all it depends on. Samples that make no conversation are found here, before a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_mcore.data.conversation import Rendering, encode_sample
from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.index import run_parallel
from llava_mcore.data.sample import written_media
from llava_mcore.data.shards import AUDIO, INDEX_DIR, ShardDataset
from llava_mcore.data.tokenizer import Tokenizer, load_tokenizer

VERSION = 1
# Of a rendering, what changes lengths, beside the frames whose times are told; prepare_data.py has options for all.
OPTIONS = ("template", "system_prompt", "image_start_token", "image_end_token")
# Fewer samples than this are tokenised before a second process has started.
FEW = 5000


@dataclass(frozen=True)
class Lengths:
    """Lengths of the texts of a dataset."""

    columns: np.ndarray  # [samples, 2] int32: tokens of the text; those of them up to the last medium; 0 for a rejected sample
    rejected: dict[int, str]  # samples that cannot be used, and why
    digest: str

    @property
    def text(self) -> np.ndarray:
        """[samples] int32: tokens without image embeddings, BOS and the like included; 0: rejected."""
        return self.columns[:, 0]

    @property
    def head(self) -> np.ndarray:
        """[samples] int32: those of them that stand before the end of the last medium."""
        return self.columns[:, 1]


def digest_of(dataset: ShardDataset, tokenizer: Tokenizer, how: Rendering) -> str:
    """What names the lengths of a dataset: all they depend on."""
    told = {} if how.frame_times is None else {"frame_times": asdict(how.frame_times)}
    depends = [VERSION, dataset.digest, tokenizer.digest, {name: getattr(how, name) for name in OPTIONS} | told]
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def command_of(path: Path, tokenizer: str, how: Rendering) -> str:
    """What to run to build lengths."""
    plain = Rendering()
    given = [
        f"--{name.replace('_', '-')} {shlex.quote(value)}"
        for name in OPTIONS
        if (value := getattr(how, name)) is not None and (name == "template" or value != getattr(plain, name))
    ]
    if (told := how.frame_times) is not None:
        given += ["--video-time-instruction", f"--video-frames-by {told.policy}", f"--video-frames {told.frames}"]
        given += [f"--video-fps {told.fps:g}"] * (told.policy == "fps")
    return " ".join([f"python tools/prepare_data.py index {path} --tokenizer {tokenizer}", *given])


def _files(dataset: ShardDataset, digest: str) -> tuple[Path, Path]:
    folder = dataset.path / INDEX_DIR
    return folder / f"lengths-{digest[:16]}.npy", folder / f"lengths-{digest[:16]}.json"


def load_lengths(dataset: ShardDataset, tokenizer: Tokenizer, how: Rendering, tokenizer_path: str | None = None) -> Lengths:
    """The lengths of a dataset's texts.

    Args:
        dataset: the dataset.
        tokenizer: that the run uses.
        how: conversations are written, likewise.
        tokenizer_path: how the user named the tokenizer, for the message.

    Raises:
        DatasetError: they were not built yet, with the command that does.
    """
    digest = digest_of(dataset, tokenizer, how)
    column, about = _files(dataset, digest)
    command = command_of(dataset.path, tokenizer_path or "TOKENIZER", how)
    if not column.is_file():
        raise DatasetError(f"{dataset.path} has no text lengths for this tokenizer and template {how.template}; run `{command}`")
    try:
        lengths = np.load(column, mmap_mode="r")
        made = json.loads(about.read_text(encoding="utf-8"))
        reasons = {int(index): reason for index, reason in made["rejected"].items()}
        if lengths.shape != (len(dataset), 2) or lengths.dtype != np.int32:
            raise ValueError(f"{column.name} has shape {lengths.shape} of {lengths.dtype}")
    except (OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise DatasetError(f"the text lengths of {dataset.path} are damaged ({error}); run `{command}`") from error
    return Lengths(lengths, reasons, digest)


def text_length(dataset: ShardDataset, index: int, tokenizer: Tokenizer, how: Rendering) -> tuple[int, int]:
    """Tokens of a sample's text, and of it up to the end of the last medium.

    Raises:
        SampleError: it makes no conversation.
    """
    media = dataset.media(index)
    places = [0 if medium.family == AUDIO else 1 for medium in media]
    tokens = encode_sample(
        dataset.read_record(index).get("conversations"),
        tokenizer,
        how,
        media=written_media(media, places, how),
        image_token_id=-1,  # in no text
    )
    head = int(tokens.image_slots[-1]) + 1 - sum(places) if sum(places) else 0
    return len(tokens.input_ids) - sum(places), head


_work: tuple[ShardDataset, Tokenizer, Rendering, dict[int, str]]


def _start(path: str, tokenizer: str, how: Rendering) -> None:
    global _work
    dataset = ShardDataset(path)
    _work = dataset, load_tokenizer(tokenizer), how, dataset.unreadable_reasons()


def _measure(first: int, last: int, part: Path) -> int:
    """Lengths of samples [first, last) into a file, unless an earlier run did; returns how many samples they are."""
    if part.is_file():
        return last - first
    dataset, tokenizer, how, unreadable = _work
    lengths = np.zeros((last - first, 2), dtype=np.int32)
    rejected: dict[int, str] = {}
    for index in range(first, last):
        try:
            if index in unreadable:
                raise SampleError(unreadable[index])
            lengths[index - first] = text_length(dataset, index, tokenizer, how)
        except SampleError as error:
            rejected[index] = error.reason
    aside = part.with_suffix(".partial.npz")
    np.savez(aside, lengths=lengths, rejected=np.array(json.dumps(rejected)))
    os.replace(aside, part)
    return last - first


def build_lengths(
    path: str | Path,
    tokenizer: str | Path,
    how: Rendering | str,
    progress: Callable[[int], None] | None = None,
    processes: int | None = None,
) -> Lengths:
    """Tokenises every sample of a dataset and keeps how long it is. A run that was killed goes on, shard by shard.

    Args:
        path: the dataset; its index must be there.
        tokenizer: folder or file of the tokenizer.
        how: conversations are written; or the name of a template.
        progress: called with the number of samples just done.
        processes: that share the work; None: one a core, or this one for a few samples.

    Raises:
        DatasetError: the dataset or the tokenizer cannot be read, or no sample can be used.
    """
    how = Rendering(how) if isinstance(how, str) else how
    dataset = ShardDataset(path)
    digest = digest_of(dataset, load_tokenizer(tokenizer), how)
    column, about = _files(dataset, digest)
    if column.is_file():
        if progress is not None:
            progress(len(dataset))
        return load_lengths(dataset, load_tokenizer(tokenizer), how)
    parts = dataset.path / INDEX_DIR / f".{column.stem}.parts"
    parts.mkdir(exist_ok=True)
    edges = np.concatenate([[0], np.cumsum(dataset.shard_sizes)]).tolist()
    jobs = [
        (first, last, parts / f"{number}.npz")
        for number, (first, last) in enumerate(zip(edges, edges[1:], strict=False))
        if last > first
    ]
    if processes is None:
        processes = 1 if len(dataset) < FEW else len(os.sched_getaffinity(0))
    for done in run_parallel(_measure, jobs, min(processes, len(jobs)), _start, str(path), str(tokenizer), how):
        if progress is not None:
            progress(done)
    rejected: dict[str, str] = {}
    lengths = []
    for *_, part in jobs:
        with np.load(part) as stored:
            lengths.append(stored["lengths"])
            rejected |= json.loads(str(stored["rejected"]))
    about.write_text(
        json.dumps({"tokenizer": str(tokenizer), "template": how.template, "rejected": rejected}, indent=1), encoding="utf-8"
    )
    aside = column.with_suffix(".partial.npy")
    np.save(aside, np.concatenate(lengths))
    os.replace(aside, column)  # last: where it is, the rest is
    shutil.rmtree(parts)
    return load_lengths(dataset, load_tokenizer(tokenizer), how)


def summary(lengths: Lengths) -> dict[str, Any]:
    """Counts and quantiles for the eye."""
    used = lengths.text[lengths.text > 0]
    quantiles = np.percentile(used, [50, 90, 99, 100]).astype(int).tolist() if len(used) else [0] * 4
    return {
        "samples": len(used),
        "rejected": len(lengths.rejected),
        "tokens": int(used.sum(dtype=np.int64)),
        **dict(zip(("median", "p90", "p99", "longest"), quantiles, strict=True)),
    }
