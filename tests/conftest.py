"""Fixtures shared by all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import material  # noqa: E402
import ranks  # noqa: E402


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """40 samples: one picture, several, none."""
    return material.make_shards(tmp_path_factory.mktemp("data") / "shards", tokenizer=tokenizer)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece tokenizer for them."""
    return material.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session", autouse=True)
def _end_ranks():
    yield
    ranks.close_all()
