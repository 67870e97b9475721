"""Pictures, tokenizers and datasets, all made here."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from llava_mcore.data.index import build_index
from llava_mcore.data.lengths import build_lengths
from llava_mcore.data.shards import ShardDataset, ShardWriter
from llava_mcore.data.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: Which digit is this? ASSISTANT: It is a seven.",
    "USER: What is the cat doing on the table? ASSISTANT: The cat sleeps, and a dog looks on.",
    "A photograph of two people and a bicycle in front of an old house.",
]


@pytest.fixture(scope="session")
def sp_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model trained with the options of Llama's."""
    folder = tmp_path_factory.mktemp("sp")
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<image>"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(sp_file: Path) -> Tokenizer:
    return load_tokenizer(sp_file)


def make_picture(width: int = 20, height: int = 30, kind: str = "PNG", seed: int = 0, mode: str = "RGB") -> bytes:
    """A random picture, encoded."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    return make_picture


def make_sample(number: int, pictures: int) -> tuple[str, dict[str, Any], list[tuple[str, bytes]]]:
    """A sample with a known number of pictures and a length of its own."""
    question = "<image>\n" * pictures + "Which digit is this?"
    answer = "It is a seven. " * (1 + number % 7)
    record = {"id": number, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    return (
        f"sample.{number}",
        record,
        [("png", make_picture(20 + number % 5, 30, seed=number + place)) for place in range(pictures)],
    )


@pytest.fixture(scope="session")
def sample() -> Callable[[int, int], tuple[str, dict[str, Any], list[tuple[str, bytes]]]]:
    return make_sample


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, sp_file: Path) -> ShardDataset:
    """53 samples with 0, 1 or 2 pictures each, in 6 shards."""
    folder = tmp_path_factory.mktemp("dataset")
    with ShardWriter(folder, 10) as writer:
        for number in range(53):
            writer.write(*make_sample(number, number % 3))
    build_index(folder)
    build_lengths(folder, sp_file, "vicuna_v1")
    return ShardDataset(folder)
