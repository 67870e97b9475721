"""Stops an example before anything is started if a path it cannot do without is missing: ``check_paths.py key=value ...``."""

from __future__ import annotations

import sys
from pathlib import Path

from llava_mcore.settings import cli
from llava_mcore.settings.schema import Settings

# setting, what it is, how one comes by it
NEEDED = (
    ("data.path", "a folder of shards", "python tools/prepare_data.py shard --input X.json --media DIR --output DIR"),
    ("data.tokenizer", "the decoder's tokenizer", "a folder with tokenizer.json or tokenizer.model"),
    ("train.init_from", "the weights to start from", "a checkpoint of this project, or a Hugging Face LLaVA folder"),
)


def problems(settings: Settings) -> list[str]:
    """One line for each path that is not set or not there."""
    found = []
    for name, what, how in NEEDED:
        group, key = name.split(".")
        if name == "data.path" and (settings.data.mixture or settings.data.mixture_file):
            continue  # the trainer names what is missing of a mixture
        value = getattr(getattr(settings, group), key)
        if value is None:
            found.append(f"{name} is not set: give {what} with {name}=PATH ({how})")
        elif not Path(value).exists():
            found.append(f"{name}={value}: no such file or folder, seen from {Path.cwd()} ({what}: {how})")
    return found


def check() -> list[str]:
    """What to say about the command line: nothing if all is well. A bad setting leaves the process, having said so."""
    return problems(cli.parse(sys.argv[1:], "check_paths.py", __doc__ or "").settings)


def main() -> int:
    """Exit code 2 and every problem on stderr, said once and not once a rank."""
    found = check()
    if found:
        cli.stop("\n  ".join(["paths are missing", *found]), "check_paths.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
