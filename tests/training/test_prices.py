"""The command that says what pictures and clips cost."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_mcore.geometry import Shape
from llava_mcore.settings.compose import compose
from llava_mcore.training import prices

ROOT = Path(__file__).resolve().parents[2]


def estimate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "tools/estimate.py", "tokens", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_every_line_is_what_its_settings_give() -> None:
    done = estimate("--image", "1344x1008", "--video", "720p:30s", "model=llava_vicuna_7b")
    assert done.returncode == 0, done.stderr
    pictures, clips = (
        re.findall(r"^(as set|model\.\S.*?)\s{2,}([\d,]+)\s+([\d,]+)\s", part, re.M) for part in done.stdout.split("a clip")
    )
    assert len(pictures) == 1 + 9 + 8 and len(clips) == 1 + 5 + 8
    for name, tiles, tokens in [*pictures, *clips]:
        changes = [] if name == "as set" else re.split(" (?=model)", name)
        geometry = compose(["train=pretrain", "model=llava_vicuna_7b", *changes]).model.geometry
        shape = Shape(frames=8) if (name, tiles, tokens) in clips else geometry.picture(1344, 1008, several=False)
        assert (tiles, tokens) == (f"{geometry.tiles(shape):,}", f"{geometry.embeddings(shape):,}"), name


def test_the_published_count_of_onevision() -> None:
    settings = compose(["train=pretrain", "model=llava_onevision_qwen2_7b"])
    (first, *others), refused = prices.of_picture(settings, 1344, 1008, text=0)
    assert not refused and any(price.name.startswith("model.anyres=null model.video.pool=none") for price in others)
    assert (first.name, first.tiles, first.tokens) == ("as set", 13, 7309)
    # Twice the decoder's FLOPs and memory at about twice the tokens.
    half = min(others, key=lambda price: abs(price.tokens - first.tokens / 2))
    assert half.memory / first.memory == pytest.approx(half.tokens / first.tokens)
    assert 0.4 < half.decoder / first.decoder < 0.55


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "1344x", "model=llava_vicuna_7b"], "'1344x' is no size of a picture; write WIDTHxHEIGHT"),
        (["--video", "720p", "model=llava_vicuna_7b"], "'720p' is no clip"),
        (["--video", "720p:0s", "model=llava_vicuna_7b"], "'720p:0s' is no clip"),
        (["model=llava_vicuna_7b"], "name at least one --image or --video"),
        (["--image", "1x1", "model.anyres={grids: []}", "model=llava_vicuna_7b"], "grids is empty"),
    ],
)
def test_bad_input(arguments: list[str], words: str) -> None:
    done = estimate(*arguments)
    assert done.returncode == 2 and words in done.stderr
