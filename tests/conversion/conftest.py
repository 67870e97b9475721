"""Tiny LLaVA models, saved once for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conversion_material import VARIANTS, make_model

from llava_mcore.platform import device

sys.path.append(str(Path(__file__).resolve().parents[1]))  # tests/material.py


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every variant as ``save_pretrained`` writes it."""
    root = tmp_path_factory.mktemp("saved")
    for name, sizes in VARIANTS.items():
        make_model(**sizes).save_pretrained(root / name)
    return {name: root / name for name in VARIANTS}


@pytest.fixture(scope="session")
def process() -> Iterator[None]:
    """This process as the only one of its group, for tests that read weights/ themselves."""
    device.start()
    yield
    device.stop()
