"""Small real data for tests: pictures, conversations, shards, a tokenizer. Everything is made here, nothing is downloaded."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import sentencepiece
from PIL import Image

from llava_mcore.data.index import build_index
from llava_mcore.data.lengths import build_lengths
from llava_mcore.data.shards import ShardWriter

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}
QUESTIONS = ("Which colour is this?", "What is shown here?", "Name the colour of the picture.")
VOCAB_SIZE = 211


def picture(colour: str, rng: random.Random) -> bytes:
    """A noisy PNG of one colour, of an odd size."""
    size = rng.randint(5, 60), rng.randint(5, 60)
    noise = np.random.default_rng(rng.randint(0, 2**31)).integers(-20, 20, (size[1], size[0], 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sample(number: int, rng: random.Random) -> tuple[dict, list[tuple[str, bytes]]]:
    """One record and its pictures: one picture, two in one turn, two turns with one each, or text only."""
    kind = number % 5
    colours = [rng.choice(list(COLOURS)) for _ in range((1, 2, 2, 0, 1)[kind])]
    if kind == 3:
        turns = [("human", f"Say the number {number}."), ("gpt", f"{number}")]
    elif kind == 1:
        turns = [("human", f"<image> and <image>\n{rng.choice(QUESTIONS)}"), ("gpt", f"{colours[0]} and {colours[1]}")]
    else:
        turns = []
        for colour in colours:
            turns += [("human", f"<image>\n{rng.choice(QUESTIONS)}"), ("gpt", f"It is {colour}.")]
    record = {"id": f"s{number}", "conversations": [{"from": who, "value": text} for who, text in turns]}
    return record, [("png", picture(colour, rng)) for colour in colours]


def make_shards(folder: Path, count: int = 40, seed: int = 0, tokenizer: Path | None = None) -> Path:
    """``count`` samples in several shards, indexed; with a tokenizer, their lengths too."""
    rng = random.Random(seed)
    with ShardWriter(folder, samples_per_shard=16) as writer:
        for number in range(count):
            record, pictures = sample(number, rng)
            writer.write(record["id"], record, pictures)
    build_index(folder)
    if tokenizer is not None:
        build_lengths(folder, tokenizer, "vicuna_v1")
    return folder


def make_tokenizer(folder: Path) -> Path:
    """A SentencePiece model over the texts above; ``<image>`` has id 3."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [turn["value"] for number in range(40) for turn in sample(number, random.Random(number))[0]["conversations"]]
    texts += [
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. USER: ASSISTANT:"
    ] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        character_coverage=1.0,
        user_defined_symbols=["<image>"],
        minloglevel=2,
    )
    return folder
