#!/usr/bin/env python3
"""Says what a run would cost, from its settings alone.

    python tools/estimate.py tokens --config finetune_llava_7b --image 1344x1008
    python tools/estimate.py tokens --config runs/finetune/settings.yaml model.projector.token_merging='{ratio: 0.5}'

``tokens``: the embeddings of a picture, FLOPs of a training step of one sample with it (forward and backward; the encoder is
tower and projector) and the bytes the decoder keeps of it, for the settings as they are and for every way to make fewer.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava_mcore.settings import cli  # noqa: E402
from llava_mcore.settings.compose import SettingsError, compose, from_stored  # noqa: E402
from llava_mcore.settings.schema import Settings  # noqa: E402

PROG = "tools/estimate.py"


def picture_size(text: str) -> tuple[int, int]:
    """``1344x1008`` as width and height."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or not all(map(int, found.groups())):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write width x height in pixels, as in 1344x1008")
    return int(found[1]), int(found[2])


def count(text: str) -> int:
    """A number of tokens."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write 0 or more")
    return int(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens", help="what a picture costs, mode by mode")
    tokens.add_argument("--config", required=True, help="an experiment, or a file of composed settings (settings.yaml)")
    tokens.add_argument("--image", type=picture_size, metavar="WIDTHxHEIGHT", help="size of the picture (default: the tower's)")
    tokens.add_argument("--text", type=count, default=128, metavar="N", help="tokens of the sample besides it (default: 128)")
    tokens.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top")
    return parser.parse_args(argv)


def settings_of(config: str, overrides: list[str]) -> Settings:
    """Composes an experiment, or reads a file."""
    if not Path(config).is_file():
        return compose([f"experiment={config}", *overrides])
    import yaml

    try:
        stored = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SettingsError([f"--config {config}: not YAML: {error}"]) from None
    if not isinstance(stored, dict):
        raise SettingsError([f"--config {config}: holds no settings; name an experiment or the settings.yaml of a run"])
    return from_stored(stored, overrides)


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    arguments = parse(argv)
    from llava_mcore.training.token_costs import costs, table

    try:
        settings = settings_of(arguments.config, arguments.overrides)
    except SettingsError as error:
        cli.fail(error, PROG)
    size, mode = settings.model.vision.image_size, settings.data.image_mode
    width, height = arguments.image or (size, size)
    how = {"pad": "padded to a square and resized", "square": "resized and cut to a square"}[mode]
    print(f"one picture of {width} x {height} pixels, {how}, as {size} x {size}; {arguments.text} tokens of text\n")
    found, refused = costs(settings, arguments.text)
    print(table(found))
    for reason in refused:
        print(f"left out: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
