#!/usr/bin/env python3
"""Makes datasets and checks them.

    python tools/prepare_data.py shard --input data.json --media images/ --output shards/
    python tools/prepare_data.py index shards/
    python tools/prepare_data.py lint shards/
    python tools/prepare_data.py lint data.json --media images/ --tokenizer vicuna/ --sequence-length 2048

Exit code 0: all well; 1: problems, each on a line of its own; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava_mcore.data import prepare  # noqa: E402
from llava_mcore.data.errors import DatasetError  # noqa: E402
from llava_mcore.data.shards import ShardDataset, build_index  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    shard = commands.add_parser("shard", help="LLaVA JSON or JSONL and pictures -> shards with an index")
    shard.add_argument("--input", required=True, help="LLaVA .json (a list) or .jsonl (an object a line)")
    shard.add_argument("--media", required=True, help="folder that `image` names are relative to")
    shard.add_argument("--output", required=True, help="folder to write; appears only when it is complete")
    shard.add_argument("--samples-per-shard", type=int, default=1000)
    shard.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    shard.add_argument("--skip-bad", action="store_true", help="leave bad samples out instead of failing")

    index = commands.add_parser("index", help="(re)build the index of a folder of webdataset shards")
    index.add_argument("folder")

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
    print(f"{arguments.output}: {report.samples} samples, {report.pictures} pictures, {len(report.problems)} bad left out")
    return 0


def run_index(arguments: argparse.Namespace) -> int:
    """The command ``index``."""
    total = sum(path.stat().st_size for path in Path(arguments.folder).glob("*.tar"))
    with bar(total, "B") as progress:
        build_index(arguments.folder, progress.update)
    dataset = ShardDataset(arguments.folder)
    print(f"{arguments.folder}: {len(dataset)} samples in {len(dataset.shards)} shards")
    if dataset.ignored_members:
        listed = ", ".join(f"{count} x .{name}" for name, count in sorted(dataset.ignored_members.items()))
        print(f"members of kinds that are not read: {listed}")
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
    print(f"{report.samples} samples, {report.pictures} pictures, {len(report.problems)} problems")
    for kind, count in report.counts().most_common():
        print(f"  {count:8d}  {kind}")
    return 1 if report.problems else 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = parse(argv)
    commands = {"shard": run_shard, "index": run_index, "lint": run_lint}
    try:
        return commands[arguments.command](arguments)
    except DatasetError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
