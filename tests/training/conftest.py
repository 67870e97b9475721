"""The data of the training tests, and runs that several of them look at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from runs import KeptRuns, Material  # noqa: E402


@pytest.fixture(scope="session")
def runs_material(shards: Path, tokenizer: Path) -> Material:
    """40 samples with one picture, several or none, and their tokenizer."""
    return Material(shards, tokenizer)


@pytest.fixture(scope="session")
def kept(runs_material: Material, tmp_path_factory: pytest.TempPathFactory) -> KeptRuns:
    """Runs that are made once."""
    return KeptRuns(runs_material, tmp_path_factory.mktemp("kept"))
