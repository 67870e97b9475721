"""Shards of real pictures and made-up conversations, and the tokenizer that reads them: one word is one token."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from _step import FIRST_WORD
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from llava_mcore.data.index import build_index
from llava_mcore.data.shards import ShardWriter

SPECIAL = ("<unk>", "<s>", "</s>", "<image>")
PICTURE_SIDES = (320, 640)  # pixels, of a picture as it is stored; drawn evenly for each side


def make_tokenizer(folder: Path, vocab_size: int) -> Path:
    """A word-level tokenizer of ``vocab_size`` words, the special ones first (ids as in ``_step``)."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {word: number for number, word in enumerate((*SPECIAL, *(f"w{n}" for n in range(FIRST_WORD, vocab_size))))}
    tokenizer = Tokenizer(WordLevel(words, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens), encoding="utf-8")
    return folder


def picture(random: np.random.Generator) -> tuple[str, bytes]:
    """A JPEG, or every fourth time a PNG, of a size of its own: smooth colours with some noise, as a photograph has."""
    width, height = random.integers(*PICTURE_SIDES, size=2, endpoint=True).tolist()
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, dtype=np.int16) + random.integers(-12, 13, (height, width, 3), dtype=np.int16)
    file = io.BytesIO()
    extension = "png" if random.random() < 0.25 else "jpg"
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "PNG" if extension == "png" else "JPEG")
    return extension, file.getvalue()


def make_shards(folder: Path, words: np.ndarray, pictures: bool, vocab_size: int, picture_tokens: int, seed: int) -> Path:
    """Samples whose texts have the given numbers of words; with pictures, five of six samples hold one and every seventh of those
    two. Without, each picture's place is taken by as many words, so that both sets have samples of the same lengths."""
    random = np.random.default_rng(seed)
    with ShardWriter(folder, samples_per_shard=64) as writer:
        for number, count in enumerate(words.tolist()):
            holds = 0 if number % 6 == 5 else 2 if number % 7 == 6 else 1
            shown = [picture(random) for _ in range(holds if pictures else 0)]
            extra = 0 if pictures else holds * picture_tokens
            text = [f"w{word}" for word in random.integers(FIRST_WORD, vocab_size, count + extra)]
            question = ["<image>\n" * len(shown), *text[: len(text) // 2]]
            turns = [("human", " ".join(question)), ("gpt", " ".join(text[len(text) // 2 :]))]
            writer.write(str(number), {"id": number, "conversations": [{"from": f, "value": v} for f, v in turns]}, shown)
    build_index(folder)
    return folder
