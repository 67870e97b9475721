#!/usr/bin/env python3
"""What a run will cost, before it is started.

    python tools/estimate.py tokens --image 1344x1008 model=llava_next_mistral_7b
    python tools/estimate.py tokens --image 640x480 --video 720p:30s experiment=finetune_llava_7b data.video_frames=32
    python tools/estimate.py tokens --image 336x336 --config runs/finetune/settings.yaml model.projector.pooling='{kind: max}'

`tokens` shows embeddings, FLOPs and memory of a picture or a clip for every way of making embeddings of it, side by side; each
line names the settings that choose it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava_mcore.settings import cli  # noqa: E402
from llava_mcore.settings.compose import SettingsError, compose, from_stored  # noqa: E402
from llava_mcore.settings.schema import Settings  # noqa: E402
from llava_mcore.training.prices import Price  # noqa: E402

PROGRAM = "python tools/estimate.py"


def count(text: str) -> int:
    """A number of tokens."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write 0 or more")
    return int(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens", help="the price of pictures and clips", allow_abbrev=False)
    tokens.add_argument("overrides", nargs="*", metavar="key=value", help="as for training: experiment=NAME, model=NAME, ...")
    tokens.add_argument("--image", action="append", default=[], metavar="WIDTHxHEIGHT", help="a picture, in pixels")
    tokens.add_argument("--video", action="append", default=[], metavar="SIZE:SECONDSs", help="a clip, as 720p:30s")
    tokens.add_argument("--text", type=count, default=128, metavar="N", help="tokens of text beside it (default: 128)")
    tokens.add_argument("--config", metavar="NAME", help="an experiment, or a file of composed settings (settings.yaml)")
    tokens.add_argument("--config-dir", type=Path, metavar="DIR", help="your own tree of groups")
    arguments = parser.parse_args(argv)
    if not arguments.image and not arguments.video:
        parser.error("name at least one --image or --video")
    return arguments


def settings_of(config: str | None, overrides: list[str], config_dir: Path | None) -> Settings:
    """Composes settings, or reads a file.

    Raises:
        SettingsError: naming every problem.
    """
    if config is None:
        # Nothing is trained here; settings only are not whole without it.
        chosen = any(text.lstrip("+").startswith(("experiment=", "train")) for text in overrides)
        return compose([*([] if chosen else ["train=pretrain"]), *overrides], config_dir)
    if not Path(config).is_file():
        return compose([f"experiment={config}", *overrides], config_dir)
    import yaml

    try:
        stored = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SettingsError([f"--config {config}: not YAML: {error}"]) from None
    if not isinstance(stored, dict):
        raise SettingsError([f"--config {config}: holds no settings; name an experiment or the settings.yaml of a run"])
    return from_stored(stored, overrides)


def show(title: str, found: tuple[list[Price], list[str]], text: int) -> None:
    """Prints a table, and what is not in it."""
    from llava_mcore.training.prices import table

    of_ways, refused = found
    print(f"\n{title}")
    print("\n".join([*table(of_ways, text), *(f"left out: {reason}" for reason in refused)]))


def main() -> int:
    """The command line."""
    arguments = parse()
    try:
        settings = settings_of(arguments.config, arguments.overrides, arguments.config_dir)
    except SettingsError as error:
        cli.fail(error, PROGRAM)
    from llava_mcore.data.sample import frames_of
    from llava_mcore.training import prices

    try:
        pictures = {text: prices.parse_picture(text) for text in arguments.image}
        clips = {text: prices.parse_clip(text) for text in arguments.video}
    except ValueError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    for text, size in pictures.items():
        show(f"a picture of {text} pixels", prices.of_picture(settings, *size, arguments.text), arguments.text)
    for text, (seconds, rate) in clips.items():
        frames = frames_of(settings.data).count(max(1, round(seconds * rate)), rate)
        title = f"a clip {text}, of which {frames} frames are shown (data.video_frames, data.video_frames_by)"
        show(title, prices.of_clip(settings, frames, arguments.text), arguments.text)
    print(
        f"\nOf a training step of one sample, with {arguments.text} tokens of text: FLOPs forward and backward, the encoder is "
        "tower and projector;\nbytes that the decoder keeps for the backward pass."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
