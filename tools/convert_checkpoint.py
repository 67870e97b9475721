"""Published models to distributed checkpoints of this project, and back.

python tools/convert_checkpoint.py import  HF_FOLDER CHECKPOINT [--tower FOLDER] [--projector FILE]
python tools/convert_checkpoint.py export  CHECKPOINT HF_FOLDER
python tools/convert_checkpoint.py verify  ONE OTHER
python tools/convert_checkpoint.py inspect FOLDER
python tools/convert_checkpoint.py delta   apply BASE DELTA OUT
python tools/convert_checkpoint.py delta   make BASE TARGET OUT
"""

from __future__ import annotations

import argparse
import sys
import warnings
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_mcore.conversion.layouts import Source

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    says = "a published model becomes a checkpoint that loads at any layout"
    command = commands.add_parser("import", help=says, description=says)
    command.add_argument("source", metavar="HF_FOLDER", help="LLaVA, LLaVA-NeXT, LLaVA-OneVision, original LLaVA, or a decoder")
    command.add_argument("out", metavar="CHECKPOINT")
    command.add_argument("--tower", metavar="FOLDER", help="the vision tower, where HF_FOLDER holds none")
    command.add_argument(
        "--projector", metavar="FILE", help="mm_projector.bin or a folder with it (default: random, to be trained)"
    )
    command.add_argument("--vocab-size", type=int, metavar="N", help="rows of the vocabulary; new ones are the mean of the old")
    _conversion(command)
    says = "a checkpoint becomes a published model again"
    command = commands.add_parser("export", help=says, description=says)
    command.add_argument("source", metavar="CHECKPOINT")
    command.add_argument("out", metavar="HF_FOLDER")
    command.add_argument(
        "--layout",
        choices=["source", "llava-hf", "decoder"],
        default="source",
        help="as it was imported (default), for transformers, or the language model alone",
    )
    _conversion(command)
    command = commands.add_parser("verify", help="compare two checkpoints of either kind, bit for bit")
    command.add_argument("one")
    command.add_argument("other", help="the original")
    command = commands.add_parser("inspect", help="what a checkpoint of either kind holds")
    command.add_argument("path")
    command.add_argument("--checksums", action="store_true", help="the CRC-32 of every published tensor, which reads them all")
    command = commands.add_parser("delta", help="weights published as differences to a base model")
    command.add_argument("action", choices=["apply", "make"])
    command.add_argument("base", metavar="BASE")
    command.add_argument(
        "source", metavar="DELTA_OR_TARGET", help="the difference to add to BASE, or the model to subtract it from"
    )
    command.add_argument("out", metavar="OUT")
    command.add_argument("--overwrite", action="store_true", help="replace an existing target")
    return top


def _conversion(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="type of all weights (default: unchanged)")
    command.add_argument("--overwrite", action="store_true", help="replace an existing target")
    command.add_argument("--no-verify", action="store_true", help="do not compare the result with the source")
    command.add_argument("--no-logits", action="store_true", help="compare tensors, but not logits")
    command.add_argument("--processes", type=int, default=1, metavar="N", help="work in N processes (default: 1)")
    command.add_argument("--dry-run", action="store_true", help="print every tensor that would be moved, write nothing")


def run(arguments: argparse.Namespace) -> int:
    """Does what was asked; 1 if a comparison found differences."""
    # Only now: --help needs no torch.
    import yaml

    from llava_mcore.conversion.describe import describe, inspect

    if arguments.command == "inspect":
        print(yaml.safe_dump(inspect(arguments.path, checksums=arguments.checksums), sort_keys=False), end="")
        return 0
    if arguments.command in ("import", "export") and arguments.dry_run:
        print(describe(_source(arguments)))
        return 0
    return _move(arguments)


def _source(arguments: argparse.Namespace) -> Source:
    from llava_mcore.conversion.layouts import source

    return source(arguments.source, *(getattr(arguments, name, None) for name in ("tower", "projector", "vocab_size")))


def _move(arguments: argparse.Namespace) -> int:
    """The commands that take their time."""
    from tqdm import tqdm

    from llava_mcore.conversion import convert, deltas
    from llava_mcore.conversion.verify import Report, total_bytes
    from llava_mcore.conversion.views import open_view

    report: Report | None = None
    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc=arguments.command) as bar:
        if arguments.command == "delta":
            combine = deltas.apply_delta if arguments.action == "apply" else deltas.make_delta
            count = combine(arguments.base, arguments.source, arguments.out, overwrite=arguments.overwrite, progress=bar.update)
        elif arguments.command == "verify":
            report = convert.compare_paths(arguments.one, arguments.other, progress=bar.update)
        else:
            options = {
                "dtype": arguments.dtype,
                "overwrite": arguments.overwrite,
                "verify": not arguments.no_verify,
                "compare_logits": not arguments.no_logits,
                "processes": arguments.processes,
                "progress": bar.update,
            }
            if arguments.command == "import":
                options |= {name: getattr(arguments, name) for name in ("tower", "projector", "vocab_size")}
            else:
                options["layout"] = arguments.layout
            with closing(open_view(_source(arguments))) as view:
                bar.total = total_bytes(view) * (1 if arguments.no_verify else 2)
            report = (convert.import_hf if arguments.command == "import" else convert.export_hf)(
                arguments.source, arguments.out, **options
            )
    if arguments.command == "delta":
        print(f"written to {arguments.out}: {count} tensors {'added to' if arguments.action == 'apply' else 'less'} the base's")
        return 0
    if report is None:
        print(f"written to {arguments.out}, not compared")
        return 0
    print(report.table())
    for name in report.differing[:20]:
        print(f"  {name}")
    return 0 if report.ok else 1


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 an error or a difference."""
    arguments = parser().parse_args(argv)
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    try:
        return run(arguments)
    except (ValueError, OSError) as error:  # ConversionError and CheckpointError are ValueErrors that name file and fix
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
