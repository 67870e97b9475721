"""Hugging Face LLaVA checkpoints to distributed checkpoints of this project, and back.

python tools/convert_checkpoint.py import  HF_FOLDER CHECKPOINT
python tools/convert_checkpoint.py export  CHECKPOINT HF_FOLDER
python tools/convert_checkpoint.py verify  ONE OTHER
python tools/convert_checkpoint.py inspect FOLDER
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for name, source, target, says in (
        ("import", "HF_FOLDER", "CHECKPOINT", "Hugging Face to distributed"),
        ("export", "CHECKPOINT", "HF_FOLDER", "distributed to Hugging Face"),
    ):
        command = commands.add_parser(name, help=says, description=says)
        command.add_argument("source", metavar=source)
        command.add_argument("out", metavar=target)
        command.add_argument(
            "--dtype", choices=["float32", "bfloat16", "float16"], help="type of all weights (default: unchanged)"
        )
        command.add_argument("--overwrite", action="store_true", help="replace an existing target")
        command.add_argument("--no-verify", action="store_true", help="do not compare the result with the source")
        command.add_argument("--dry-run", action="store_true", help="print every tensor that would be moved, write nothing")
    command = commands.add_parser("verify", help="compare two checkpoints of either kind, bit for bit")
    command.add_argument("one")
    command.add_argument("other", help="the original")
    command = commands.add_parser("inspect", help="what a checkpoint of either kind holds")
    command.add_argument("path")
    return top


def run(arguments: argparse.Namespace) -> int:
    """Does what was asked; 1 if a comparison found differences."""
    # Only now: --help needs no torch.
    import yaml
    from tqdm import tqdm

    from llava_mcore.conversion import convert
    from llava_mcore.conversion.verify import Report

    if arguments.command == "inspect":
        print(yaml.safe_dump(convert.inspect(arguments.path), sort_keys=False), end="")
        return 0
    if arguments.command != "verify" and arguments.dry_run:
        print(convert.describe(arguments.source))
        return 0
    report: Report | None
    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc=arguments.command) as bar:
        if arguments.command == "verify":
            report = convert.compare_paths(arguments.one, arguments.other, progress=bar.update)
        else:
            function = convert.import_hf if arguments.command == "import" else convert.export_hf
            bar.total = convert.work(arguments.source, verify=not arguments.no_verify)
            report = function(
                arguments.source,
                arguments.out,
                dtype=arguments.dtype,
                overwrite=arguments.overwrite,
                verify=not arguments.no_verify,
                progress=bar.update,
            )
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
