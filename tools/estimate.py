#!/usr/bin/env python3
"""What a run will cost, before it is started.

    python tools/estimate.py tokens --image 1344x1008 model=llava_next_mistral_7b
    python tools/estimate.py tokens --image 640x480 --video 720p:30s experiment=finetune_llava_7b data.video_frames=32

`tokens` shows embeddings, FLOPs and memory of a picture or a clip for every way of making embeddings of it, side by side; each
line names the settings that choose it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava_mcore.settings import cli  # noqa: E402
from llava_mcore.settings.compose import SettingsError, compose  # noqa: E402

PROGRAM = "python tools/estimate.py"


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
    tokens.add_argument("--text", type=int, default=128, metavar="N", help="tokens of text beside it (default: 128)")
    tokens.add_argument("--config-dir", type=Path, metavar="DIR", help="your own tree of groups")
    arguments = parser.parse_args(argv)
    if not arguments.image and not arguments.video:
        parser.error("name at least one --image or --video")
    return arguments


def main() -> int:
    """The command line."""
    arguments = parse()
    # Nothing is trained here; settings only are not whole without it.
    chosen = any(text.lstrip("+").startswith(("experiment=", "train")) for text in arguments.overrides)
    try:
        settings = compose([*([] if chosen else ["train=pretrain"]), *arguments.overrides], arguments.config_dir)
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
        print(f"\na picture of {text} pixels")
        print("\n".join(prices.table(prices.of_picture(settings, *size), arguments.text)))
    for text, (seconds, rate) in clips.items():
        frames = frames_of(settings.data).count(max(1, round(seconds * rate)), rate)
        print(f"\na clip {text}, of which {frames} frames are shown (data.video_frames, data.video_frames_by)")
        print("\n".join(prices.table(prices.of_clip(settings, frames), arguments.text)))
    print("\nFLOPs of one forward pass; activations of the decoder in 16 bits, nothing recomputed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
