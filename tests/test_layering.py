"""Imports go one way: geometry <- settings <- platform <- parallel <- models | data <- training, conversion, evaluation."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "llava_mcore"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
LEVELS = {
    "configs": 0,
    "geometry": -1,
    "settings": 0,
    "platform": 1,
    "parallel": 2,
    "data": 3,
    "models": 3,
    "conversion": 4,
    "evaluation": 4,
    "training": 4,
    "train": 5,
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part(module: str) -> str:
    """The room of the package a module lies in."""
    return module.split(".")[1]


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(path: Path, *names: str) -> bool:
    """Whether a file imports one of these packages or modules, or anything below them."""
    return any(found == name or found.startswith(name + ".") for found in imports(path) for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_one_way(path: Path) -> None:
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    assert own in LEVELS, f"{path}: say in {Path(__file__).name} where {own} stands"
    for found in imports(path):
        if found.split(".")[0] != PACKAGE or found.count(".") == 0 or found == f"{PACKAGE}.__version__":
            continue
        other = part(found)
        assert other == own or LEVELS[other] < LEVELS[own] or {other, own} <= {"training", "conversion", "evaluation"}, found
        assert {other, own} != {"models", "data"}, f"{path} imports {found}"


def test_no_heavy_imports_below() -> None:
    for path in FILES:
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        if LEVELS[own] <= 0:
            assert not within(path, "torch", "megatron", "transformers", "numpy"), path
        if own == "data":
            assert not within(path, "megatron"), path
        if own == "models":
            assert not within(path, "megatron.core.parallel_state", "megatron.core.mpu"), path


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (f"import {PACKAGE}", ["torch", "megatron", "hydra", "pydantic"]),
        (f"import {PACKAGE}.settings.compose, {PACKAGE}.settings.cli, {PACKAGE}.geometry", ["torch", "megatron", "hydra"]),
        (f"import {PACKAGE}.train", ["torch", "megatron", "hydra"]),
        (f"import {PACKAGE}.data.loader, {PACKAGE}.data.prepare", ["megatron"]),
    ],
)
def test_what_an_import_brings(statement: str, absent: list[str]) -> None:
    """Through other modules too, in a process of its own."""
    code = f"import sys\n{statement}\nprint([name for name in {absent} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
