"""Stops an example before anything is started if a path it cannot do without is missing: ``check_paths.py key=value ...``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llava_mcore.settings import cli

# setting, what it is, how one comes by it
NEEDED = (
    ("data.path", "a folder of shards", "python tools/prepare_data.py shard --input X.json --media DIR --output DIR"),
    ("data.tokenizer", "the decoder's tokenizer", "a folder with tokenizer.json or tokenizer.model"),
    ("train.init_from", "the weights to start from", "a checkpoint of this project, or a Hugging Face LLaVA folder"),
)


def problems(settings: object) -> list[str]:
    """One line for each path that is not set or not there."""
    found = []
    for name, what, how in NEEDED:
        value = settings
        for part in name.split("."):
            value = getattr(value, part)
        if value is None:
            found.append(f"{name} is not set: give {what} with {name}=PATH ({how})")
        elif not Path(str(value)).exists():
            found.append(f"{name}={value}: no such file or folder, seen from {Path.cwd()} ({what}: {how})")
    return found


def main() -> int:
    """Exit code 2 and every problem on stderr, once and not once a rank."""
    command = cli.parse(sys.argv[1:], "check_paths.py", __doc__ or "")
    found = problems(command.settings)
    if found and os.environ.get("RANK", "0") == "0":
        print("\n".join(found), file=sys.stderr)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
