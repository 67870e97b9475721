#!/usr/bin/env python3
"""Makes datasets and checks them.

    python tools/prepare_data.py shard --input data.json --media images/ --output shards/
    python tools/prepare_data.py index shards/ --tokenizer vicuna/ --template vicuna_v1
    python tools/prepare_data.py lint shards/
    python tools/prepare_data.py lint data.json --media images/ --tokenizer vicuna/ --sequence-length 2048
    python tools/prepare_data.py preview shards/ --tokenizer vicuna/ --output preview.html
    python tools/prepare_data.py info shards/
    python tools/prepare_data.py quarantine runs/mine/quarantine.jsonl --list leave_out.json --from-sample 200000

Exit code 0: all well; 1: problems, each on a line of its own; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava_mcore.data import prepare  # noqa: E402
from llava_mcore.data.conversation import Rendering  # noqa: E402
from llava_mcore.data.errors import DatasetError  # noqa: E402
from llava_mcore.data.index import build_index, is_current  # noqa: E402
from llava_mcore.data.lengths import OPTIONS, Lengths, build_lengths, summary  # noqa: E402
from llava_mcore.data.shards import INDEX_DIR, UNREADABLE_FILE, ShardDataset  # noqa: E402
from llava_mcore.data.storage import open_storage  # noqa: E402
from llava_mcore.data.video import FrameChoice  # noqa: E402

SHOWN = 10  # samples that are named on the screen; a file has them all


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    shard = commands.add_parser("shard", help="LLaVA JSON or JSONL and media -> shards with an index")
    shard.add_argument("--input", required=True, help="LLaVA .json (a list) or .jsonl (an object a line)")
    shard.add_argument("--media", required=True, help="folder that `image`, `video` and `audio` names are relative to")
    shard.add_argument("--output", required=True, help="folder to write; appears only when it is complete")
    shard.add_argument("--samples-per-shard", type=int, default=1000)
    shard.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    shard.add_argument("--skip-bad", action="store_true", help="leave bad samples out instead of failing")

    index = commands.add_parser("index", help="(re)build the index of webdataset shards, and the lengths of their texts")
    index.add_argument("folder", help="the dataset; its index goes there")
    index.add_argument("--root", help="where the shards are, if not in the folder: any URL that fsspec opens")
    index.add_argument("--tokenizer", help="also tokenise every text: a run is planned from the lengths")
    index.add_argument("--template", choices=prepare.template_names(), default="vicuna_v1", help="that the run will use")
    index.add_argument("--system-prompt", help="as data.system_prompt of the run")
    index.add_argument("--image-start-token", default="", help="as data.image_start_token of the run")
    index.add_argument("--image-end-token", default="", help="as data.image_end_token of the run")
    index.add_argument("--video-time-instruction", action="store_true", help="as data.video_time_instruction of the run")
    frames = FrameChoice()
    by = index.add_argument("--video-frames-by", choices=["uniform", "time", "fps"], default=frames.policy)
    by.help = "as data.video_frames_by of the run; this and the next two count where times are told only"
    index.add_argument("--video-frames", type=int, default=frames.frames, help="as data.video_frames of the run")
    index.add_argument("--video-fps", type=float, default=frames.fps, help="as data.video_fps of the run")
    index.add_argument("--processes", type=int, help="processes that share the work (default: one a core)")
    index.add_argument("--force", action="store_true", help="build the index anew even if no shard has changed")

    info = commands.add_parser("info", help="say what a dataset of shards holds")
    info.add_argument("folder")

    preview = commands.add_parser("preview", help="an HTML page of samples as the model will see them")
    preview.add_argument("folder")
    preview.add_argument("--output", required=True, help="file to write")
    preview.add_argument("--tokenizer", required=True)
    preview.add_argument("--samples", type=int, default=20, help="how many, spread evenly over the dataset")
    preview.add_argument(
        "--settings",
        nargs="+",
        metavar="key=value",
        default=["experiment=finetune_llava_7b"],
        help="of the run: experiment=NAME, data.template=..., ... (default: %(default)s)",
    )

    quarantine = commands.add_parser("quarantine", help="make a list of samples to leave out from a run's quarantine log")
    quarantine.add_argument("log", help="quarantine.jsonl of a run")
    quarantine.add_argument("--list", required=True, help="list to begin or to add a version to (data.quarantine)")
    quarantine.add_argument("--from-sample", type=int, default=0, help="position of the order from which they are left out")

    lint = commands.add_parser("lint", help="say what is wrong with a dataset, sample by sample")
    lint.add_argument("source", help="a folder of shards, or a LLaVA .json or .jsonl")
    lint.add_argument("--media", help="folder that `image` names are relative to (for a JSON)")
    lint.add_argument("--tokenizer", help="also check lengths with this tokenizer")
    lint.add_argument("--template", choices=prepare.template_names(), default="vicuna_v1")
    lint.add_argument("--sequence-length", type=int, default=2048, help="tokens of a stream")
    lint.add_argument("--image-tokens", type=int, default=576, help="embeddings one picture becomes")
    arguments = parser.parse_args(argv)
    if getattr(arguments, "samples_per_shard", 1) < 1:
        parser.error("--samples-per-shard must be at least 1")
    if arguments.command == "lint" and not Path(arguments.source).is_dir() and not arguments.media:
        parser.error("lint of a JSON needs --media, the folder of its pictures")
    return arguments


def bar(total: int, unit: str):  # type: ignore[no-untyped-def]
    """A progress bar on standard error."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, unit_scale=unit == "B", dynamic_ncols=True)


def run_shard(arguments: argparse.Namespace) -> int:
    """The command ``shard``."""
    records = prepare.read_records(arguments.input)
    with bar(len(records), "sample") as progress:
        report = prepare.shard(
            arguments.input,
            arguments.media,
            arguments.output,
            samples_per_shard=arguments.samples_per_shard,
            overwrite=arguments.overwrite,
            skip_bad=arguments.skip_bad,
            records=records,
            progress=progress.update,
        )
    for problem in report.problems:
        print(f"left out: {problem}")
    print(f"{arguments.output}: {report.samples} samples, {report.media} media, {len(report.problems)} bad left out")
    return 0


def run_index(arguments: argparse.Namespace) -> int:
    """The command ``index``."""
    storage = open_storage(arguments.root or arguments.folder)
    total = sum(storage.sizes().values())
    if arguments.force or not is_current(arguments.folder, arguments.root):
        with bar(total, "B") as progress:
            build_index(arguments.folder, progress.update, root=arguments.root, processes=arguments.processes)
    dataset = ShardDataset(arguments.folder)
    print(f"{arguments.folder}: {len(dataset)} samples in {len(dataset.shards)} shards")
    if dataset.ignored_members:
        listed = ", ".join(f"{count} x .{name}" for name, count in sorted(dataset.ignored_members.items()))
        print(f"members of kinds that are not read: {listed}")
    if dataset.unreadable:
        print(f"media that cannot be read: {dataset.unreadable}, named in {dataset.path / INDEX_DIR / UNREADABLE_FILE}")
    if arguments.tokenizer:
        with bar(len(dataset), "sample") as progress:
            frames = FrameChoice(arguments.video_frames_by, arguments.video_frames, arguments.video_fps)
            told = frames if arguments.video_time_instruction else None
            how = Rendering(**{name: getattr(arguments, name) for name in OPTIONS}, frame_times=told)
            lengths = build_lengths(arguments.folder, arguments.tokenizer, how, progress.update, arguments.processes)
        _say_lengths(dataset, lengths)
    return 0


def _say_lengths(dataset: ShardDataset, lengths: Lengths) -> None:
    counts = summary(lengths)
    print(
        f"text of {counts['samples']:,} samples: {counts['tokens']:,} tokens; median {counts['median']}, 90 % {counts['p90']}, "
        f"99 % {counts['p99']}, longest {counts['longest']}; {counts['rejected']} samples make no conversation and are left out"
    )
    for index, reason in list(lengths.rejected.items())[:SHOWN]:
        print(f"  left out: {dataset.name(index)}: {reason}")


def run_info(arguments: argparse.Namespace) -> int:
    """The command ``info``."""
    for line in prepare.describe(ShardDataset(arguments.folder)):
        print(line)
    return 0


def run_preview(arguments: argparse.Namespace) -> int:
    """The command ``preview``."""
    from llava_mcore.data.preview import write_preview
    from llava_mcore.data.tokenizer import load_tokenizer
    from llava_mcore.settings.compose import SettingsError, compose

    try:
        settings = compose(arguments.settings)
    except SettingsError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    shown = write_preview(
        Path(arguments.output), ShardDataset(arguments.folder), load_tokenizer(arguments.tokenizer), settings, arguments.samples
    )
    print(f"{arguments.output}: {shown} samples")
    return 0


def run_quarantine(arguments: argparse.Namespace) -> int:
    """The command ``quarantine``."""
    new = prepare.quarantine(Path(arguments.log), Path(arguments.list), arguments.from_sample)
    print(f"{arguments.list}: {new} samples more, from sample {arguments.from_sample} of the order on; set data.quarantine to it")
    return 0


def run_lint(arguments: argparse.Namespace) -> int:
    """The command ``lint``."""
    check = None
    if arguments.tokenizer:
        from llava_mcore.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(arguments.tokenizer)
        check = prepare.TokenCheck(tokenizer, arguments.template, arguments.sequence_length, arguments.image_tokens)
    if Path(arguments.source).is_dir():
        with bar(len(ShardDataset(arguments.source)), "sample") as progress:
            report = prepare.lint_shards(arguments.source, check, progress.update)
    else:
        records = prepare.read_records(arguments.source)
        with bar(len(records), "sample") as progress:
            report = prepare.lint_json(arguments.source, arguments.media, check, progress.update, records)
    for problem in report.problems:
        print(problem)
    print(f"{report.samples} samples, {report.media} media, {len(report.problems)} problems")
    for kind, count in report.counts().most_common():
        print(f"  {count:8d}  {kind}")
    return 1 if report.problems else 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = parse(argv)
    commands = {
        "shard": run_shard,
        "index": run_index,
        "lint": run_lint,
        "info": run_info,
        "preview": run_preview,
        "quarantine": run_quarantine,
    }
    try:
        return commands[arguments.command](arguments)
    except DatasetError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
