"""The front of every command line: overrides, ``--print-config``, ``--dry-run``, and a help text made from the schema.

    command = cli.parse(sys.argv[1:], "python -m llava_mcore.train", "Train a model.")

``--help`` answers in well under a second: it imports neither torch nor hydra.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from llava_mcore.settings.compose import SettingsError, compose, describe, group_options, setting_field, setting_paths
from llava_mcore.settings.schema import Settings

SPEAKERS_HEAD_START = 5.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the user asked for."""

    settings: Settings
    overrides: list[str]
    config_dir: Path | None
    print_config: bool
    dry_run: bool


def parse(argv: Sequence[str], prog: str, description: str) -> Command:
    """Read a command line and compose its settings.

    Leaves the process for ``--help`` (exit code 0) and for bad options or settings (exit code 2, every problem on stderr).
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="experiment=NAME, group=OPTION or dotted.path=value")
    parser.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="your own tree of groups; its files win over the package's"
    )
    parser.add_argument("--print-config", action="store_true", help="print the composed settings as YAML and end")
    parser.add_argument("--dry-run", action="store_true", help="check layout, batch, memory and data without a GPU and end")
    parser.add_argument("-h", "--help", action="store_true", help="print this and end")
    arguments = parser.parse_intermixed_args(list(argv))
    if arguments.help:
        try:
            print(parser.format_help() + "\n" + _help(arguments.config_dir), flush=True)
        except BrokenPipeError:  # `--help | head`; what Python flushes at its end must go nowhere either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    try:
        settings = compose(arguments.overrides, arguments.config_dir)
    except SettingsError as error:
        fail(error, prog)
    return Command(
        settings=settings,
        overrides=arguments.overrides,
        config_dir=arguments.config_dir,
        print_config=arguments.print_config,
        dry_run=arguments.dry_run,
    )


def fail(error: SettingsError, prog: str) -> NoReturn:
    """Print every problem and leave with exit code 2, as :func:`stop` does."""
    count = len(error.problems)
    lines = [f"{count} problem{'s' if count > 1 else ''} in the settings", *(f"  {problem}" for problem in error.problems)]
    stop("\n".join([*lines, "See --help for every setting, --print-config for what was composed."]), prog)


def stop(message: str, prog: str) -> NoReturn:
    """Say what is wrong, once and not once a rank, and leave with exit code 2.

    The other ranks wait before they speak: torchrun ends all of them as soon as one leaves, so they get to it only if the first
    rank knows of no error.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(SPEAKERS_HEAD_START)
    print(f"{prog}: {'' if rank == '0' else f'rank {rank}: '}{message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _help(config_dir: Path | None) -> str:
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    lines = ["groups (choose with group=OPTION; `null` chooses none):"]
    for group, names in group_options(config_dir).items():
        lines += textwrap.wrap(f"{group}: {', '.join(names)}", width, initial_indent="  ", subsequent_indent="      ")
    lines += ["", "settings (set with path=value; lists as [a,b], null for none):"]
    for path in setting_paths():
        field = setting_field(path)
        default = "required" if field.is_required() else f"default {_shown(field.get_default(call_default_factory=True))}"
        lines.append(f"  {'.'.join(path)}  <{describe(field.annotation, field.metadata)}>  {default}")
        lines += textwrap.wrap(field.description or "", width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_shown(item) for item in value) + "]"
    return "{}" if value == {} else str(value)
