"""Every command in the README is real: its files exist, its options parse, its settings compose."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    words = shlex.split(command)
    scripts = [word for word in words if word.endswith((".py", ".sh"))]
    assert all((ROOT / script).is_file() for script in scripts), f"{command}: no such file"
    settings = [word for word in words if "=" in word]
    if words[0] == "python" and scripts:
        # The subcommand with its options, asked for help: argparse would refuse a subcommand that is not there.
        done = run([sys.executable, scripts[0], words[2], "--help"])
        assert done.returncode == 0, done.stderr
        for option in (word for word in words if word.startswith("--")):
            assert option in done.stdout, f"{command}: {option} is unknown"
    elif settings and scripts:
        script = next(script for script in scripts if script.startswith("examples/"))
        done = run(["bash", script, *settings, "--print-config"])
        assert done.returncode == 0, done.stderr
    elif "llava_mcore.train" in words and "--dry-run" not in words:
        done = run([sys.executable, *words[1:]])
        assert done.returncode == 0, done.stderr
    else:
        # The quickstart, the tests and the dry run of a 7B model are run whole, elsewhere.
        assert scripts or "--dry-run" in words, f"{command}: nothing here checks it"


def test_the_family_shown_is_the_one_there_is() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", README, re.S)
    families = (ROOT / "llava_mcore" / "settings" / "families.py").read_text(encoding="utf-8")
    assert textwrap.indent(shown, "    ") in families


def test_links() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
