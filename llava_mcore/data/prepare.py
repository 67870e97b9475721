"""Making datasets and checking them: the logic behind ``tools/prepare_data.py``. No torch except while shards are written."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_mcore.data.audio import decode_sound
from llava_mcore.data.conversation import Medium, Rendering, check_conversation, encode_sample
from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.image import open_rgb, picture_info
from llava_mcore.data.index import build_index
from llava_mcore.data.probe import AUDIOS, PICTURES, VIDEOS, probe
from llava_mcore.data.quarantine import append_version
from llava_mcore.data.sample import media_of
from llava_mcore.data.shards import AUDIO, FAMILIES, INDEX_DIR, KINDS, PICTURE, VIDEO, ShardDataset, ShardWriter, family
from llava_mcore.data.shards import EXTENSIONS as EXTENSIONS_READ
from llava_mcore.data.templates import CHAT_TEMPLATE, TEMPLATES
from llava_mcore.data.tokenizer import Tokenizer
from llava_mcore.data.video import FrameChoice, decode_frames

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

Progress = Callable[[int], None]
Encoded = tuple[str, bytes]
FRAMES = FrameChoice()  # of a video, as lint counts and decodes them
MEDIA_FIELDS: dict[str, Literal["picture", "video", "sound"]] = {"image": "picture", "video": "video", "audio": "sound"}


@dataclass(frozen=True)
class Problem:
    """One bad sample."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class BadSamplesError(DatasetError):
    """Samples that keep a dataset from being made."""

    def __init__(self, problems: list[Problem], total: int) -> None:
        self.problems = problems
        listed = "\n".join(f"  {problem}" for problem in problems)
        super().__init__(
            f"{len(problems)} of {total} samples are bad; nothing was written. "
            f"Mend them, or leave them out with --skip-bad:\n{listed}"
        )


@dataclass
class Report:
    """What was found in a dataset."""

    samples: int = 0
    media: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        """Notes a bad sample."""
        self.problems.append(Problem(where, reason))

    def counts(self) -> Counter[str]:
        """Problems by kind: the reason without its numbers and names."""
        kinds: Counter[str] = Counter()
        for problem in self.problems:
            kinds[problem.reason.split(":")[0].split("(")[0].strip()] += 1
        return kinds


@dataclass(frozen=True)
class TokenCheck:
    """What ``lint`` needs to know to say that a sample is too long."""

    tokenizer: Tokenizer
    template: str
    sequence_length: int
    image_tokens: int

    def check(self, conversations: Any, media: Sequence[Medium]) -> None:
        """Raises SampleError if the sample will not enter a stream whole, or teaches nothing."""
        tokens = encode_sample(
            conversations,
            self.tokenizer,
            Rendering(self.template),
            media=[replace(medium, embeddings=medium.embeddings * self.image_tokens) for medium in media],
            image_token_id=-1,  # in no text
        )
        if len(tokens.input_ids) > self.sequence_length:
            raise SampleError(f"too long: {len(tokens.input_ids)} tokens, but a stream holds {self.sequence_length}")
        if not (tokens.labels >= 0).any():
            raise SampleError("nothing in it is learned: no token of an answer is supervised")


def read_records(path: str | Path) -> list[Any]:
    """The samples of a LLaVA JSON (one list) or JSONL (one object a line) file.

    Raises:
        DatasetError: the file is missing or broken; names the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read {path} ({error})") from error
    if path.suffix == ".jsonl":
        records = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except ValueError as error:
                    raise DatasetError(f"{path}, line {number} is not JSON ({error})") from error
        return records
    try:
        records = json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON ({error}); one object a line needs a name that ends in .jsonl") from error
    if not isinstance(records, list):
        raise DatasetError(f"{path} holds no list of samples")
    return records


def _where(number: int, record: Any) -> str:
    name = record.get("id") if isinstance(record, dict) else None
    return f"sample {number}" + (f" (id {name!r})" if name is not None else "")


def _media_names(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Field and file of what a record names under ``image``, ``video`` and ``audio``: none, one, or a list each."""
    found = []
    for name in MEDIA_FIELDS:
        value = record.get(name)
        files = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(file, str) and file for file in files):
            raise SampleError(f"`{name}` is neither a file name nor a list of them: {value!r}")
        found += [(name, file) for file in files]
    return found


def _load_medium(media: Path, field: str, name: str) -> Encoded:
    """Extension and bytes of a medium that can be read. Pictures decode; other formats than shards hold become PNG."""
    try:
        data = (media / name).read_bytes()
    except OSError as error:
        what = {"image": "picture", "audio": "sound"}.get(field, field)
        raise SampleError(f"missing {what}: {media / name} ({error.strerror})") from error
    try:
        if field != "image":
            extension = Path(name).suffix.lower().removeprefix(".")
            if extension not in (VIDEOS if field == "video" else AUDIOS):
                known = ", ".join(sorted(VIDEOS if field == "video" else AUDIOS))
                raise SampleError(f"a .{extension} is no {field} of a shard ({known} are)")
            probe(extension, data)
            return extension, data
        kind, _, _ = picture_info(data)
        image = open_rgb(data)
    except SampleError as error:
        raise SampleError(f"{error.reason}: {media / name}") from error
    if kind in EXTENSIONS:
        return EXTENSIONS[kind], data
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return "png", encoded.getvalue()


def _load_sample(record: Any, media: Path) -> list[Encoded] | SampleError:
    try:
        names = _media_names(record) if isinstance(record, dict) else []
        if not isinstance(record, dict):
            raise SampleError("is not an object")
        check_conversation(record.get("conversations"), [Medium(MEDIA_FIELDS[field]) for field, _ in names])
        return [_load_medium(media, field, name) for field, name in names]
    except SampleError as error:
        return error


def _in_order(pool: ThreadPoolExecutor, work: Callable[..., Any], items: Iterable[tuple[Any, ...]], ahead: int) -> Iterator[Any]:
    """``pool.map`` that runs no further ahead than ``ahead`` items, so that pictures do not pile up in memory."""
    pending: deque[Future[Any]] = deque()
    for item in items:
        pending.append(pool.submit(work, *item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _loaded(records: list[Any], media: Path, progress: Progress | None) -> Iterator[tuple[int, Any, list[Encoded] | SampleError]]:
    """Every record with its media, or what is wrong with it; pictures are decoded in threads."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        results = _in_order(pool, _load_sample, ((record, media) for record in records), 8 * threads)
        for number, (record, result) in enumerate(zip(records, results, strict=True)):
            yield number, record, result
            if progress is not None:
                progress(1)


@contextmanager
def _aside(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write in that takes ``output``'s place at the end, and is gone if there is an error."""
    if output.exists() and not overwrite:
        raise DatasetError(f"{output} exists; choose another --output, or replace it with --overwrite")
    if output.exists() and not output.is_dir():
        raise DatasetError(f"{output} is not a folder")
    aside = output.parent / f".{output.name}.partial"
    aside.mkdir(parents=True, exist_ok=True)
    handle = os.open(aside, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the system however this process ends
        except OSError as error:
            raise DatasetError(f"another process is writing {output} at this moment") from error
        for left in aside.iterdir():  # of a run that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield aside
            old = output.parent / f".{output.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            if output.exists():
                os.replace(output, old)
            os.replace(aside, output)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def shard(
    source: str | Path,
    media: str | Path,
    output: str | Path,
    *,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
    skip_bad: bool = False,
    records: list[Any] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Turns a LLaVA JSON or JSONL and a folder of media into shards with an index.

    Args:
        source: the JSON or JSONL.
        media: pictures, videos and sounds are named relative to it.
        output: the dataset; appears only when it is complete.
        samples_per_shard: samples in each tar.
        overwrite: replace ``output``.
        skip_bad: leave bad samples out instead of failing; the report lists them.
        records: what ``read_records(source)`` gave, if it was read already.
        progress: called with the number of samples just done.

    Raises:
        BadSamplesError: samples are bad; it names them.
        DatasetError: input or output as a whole will not do.
    """
    records = read_records(source) if records is None else records
    media, output = Path(media), Path(output)
    if not records:
        raise DatasetError(f"{source} holds no sample")
    if not media.is_dir():
        raise DatasetError(f"no media folder at {media}")
    report = Report()
    with _aside(output, overwrite) as aside:
        with ShardWriter(aside, samples_per_shard) as writer:
            for number, record, result in _loaded(records, media, progress):
                if isinstance(result, SampleError):
                    report.add(_where(number, record), result.reason)
                    continue
                if not report.problems or skip_bad:  # with an error coming, only the names of the others are wanted
                    writer.write(str(record.get("id", f"{number:09d}")), record, result)
                report.samples += 1
                report.media += len(result)
        if report.problems and (not skip_bad or not report.samples):
            raise BadSamplesError(report.problems, len(records))
        build_index(aside)
    return report


def lint_json(
    source: str | Path,
    media: str | Path,
    check: TokenCheck | None = None,
    progress: Progress | None = None,
    records: list[Any] | None = None,
) -> Report:
    """Reports what is wrong with a LLaVA JSON or JSONL and its media, sample by sample."""
    records = read_records(source) if records is None else records
    media = Path(media)
    report = Report(samples=len(records))
    if not records:
        report.add(str(source), "holds no sample")
    for number, record, result in _loaded(records, media, progress):
        try:
            if isinstance(result, SampleError):
                raise result
            report.media += len(result)
            if check is not None:
                kinds = [family(KINDS[extension]) for extension, _ in result]
                check.check(record["conversations"], media_of(kinds, [int(kind != AUDIO) for kind in kinds]))
        except SampleError as error:
            report.add(_where(number, record), error.reason)
    return report


def lint_shards(folder: str | Path, check: TokenCheck | None = None, progress: Progress | None = None) -> Report:
    """Reports what is wrong with a dataset of shards, sample by sample.

    Raises:
        DatasetError: a shard or the index is damaged.
    """
    dataset = ShardDataset(folder)
    report = Report(samples=len(dataset))

    def look(index: int) -> int | SampleError:
        try:
            record, found = dataset.read_record(index), dataset.media(index)
            kinds = [medium.family for medium in found]
            pictures = [FRAMES.count(medium.frames, medium.fps) if medium.family == VIDEO else 1 for medium in found]
            media = media_of(kinds, pictures)
            check_conversation(record.get("conversations"), media)
            for medium in found:
                _decode(medium.extension, dataset.read_medium(index, medium))
            if check is not None:
                check.check(record["conversations"], [replace(m, embeddings=m.embeddings * (m.kind != "sound")) for m in media])
            return len(found)
        except SampleError as error:
            return error

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        for index, result in enumerate(_in_order(pool, look, ((index,) for index in range(len(dataset))), 8 * threads)):
            if isinstance(result, SampleError):
                report.add(dataset.name(index), result.reason)
            else:
                report.media += result
            if progress is not None:
                progress(1)
    return report


def _decode(extension: str, data: bytes) -> None:
    """Raises SampleError if a medium cannot be decoded; of a video, at the frames that a run would show."""
    if extension in PICTURES:
        open_rgb(data)
    elif extension in VIDEOS:
        decode_frames(data, lambda scan: FRAMES.choose(scan.times, scan.probe.fps, 0))
    else:
        decode_sound(data)


def quarantine(log: Path, listed: Path, from_sample: int) -> int:
    """Adds the samples of a run's quarantine log to a list of those to leave out; returns how many are new.

    Raises:
        DatasetError: the log or the list cannot be read, or a dataset of the log is gone.
    """
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        digests = {name: ShardDataset(name).digest for name in {line["dataset"] for line in lines}}
        samples = [(digests[line["dataset"]], line["shard"], line["key"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{log} is no quarantine log that can be used ({error})") from error
    return append_version(listed, from_sample, samples)


def describe(dataset: ShardDataset) -> list[str]:
    """What a dataset holds, in lines."""
    columns = dataset.columns
    kinds = np.bincount(columns["component_kind"], minlength=len(EXTENSIONS_READ))
    sizes = columns["component_size"].astype(np.int64)
    lines = [f"{dataset.path}: {len(dataset):,} samples in {len(dataset.shards)} shards, {sizes.sum() / 2**30:.3g} GiB"]
    for name, count in zip(EXTENSIONS_READ, kinds.tolist(), strict=True):
        if count:
            lines.append(f"  .{name}: {count:,}")
    shown = (FAMILIES[columns["component_kind"]] == PICTURE) & (columns["component_unreadable"] == 0)
    if shown.any():
        width, height = (np.median(columns[f"component_{side}"][shown]) for side in ("width", "height"))
        lines.append(f"  pictures: median {width:.0f} x {height:.0f} pixels")
    for what, number in (("unreadable media", dataset.unreadable), ("members not read", sum(dataset.ignored_members.values()))):
        if number:
            lines.append(f"  {what}: {number:,}")
    for file in sorted((dataset.path / INDEX_DIR).glob("lengths-*.json")):
        made = json.loads(file.read_text(encoding="utf-8"))
        lines.append(
            f"  text lengths: template {made['template']}, tokenizer {made['tokenizer']}, {len(made['rejected'])} rejected"
        )
    return lines


def template_names() -> list[str]:
    """Templates a conversation can be checked with."""
    return [*TEMPLATES, CHAT_TEMPLATE]
