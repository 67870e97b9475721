"""Writes the quickstart's data: real pictures, questions about them, and a tokenizer that knows the words.

    python examples/quickstart/make_data.py runs/quickstart/data

The pictures come with scikit-learn: 1,797 scans of handwritten digits (8x8 pixels) and two photographs, of a temple and of a
flower, cut into tiles. 297 of the digits, and the right-hand part of each photograph, are held out: no pixel of a held-out
picture is trained on. Everything is seeded: a second call writes the same bytes.

    media/             PNG files
    train.json         conversations in LLaVA's format
    heldout.json       the same about held-out pictures; the id's first word says what is asked: digit, parity, kind or scene
    tokenizer/         a SentencePiece model in which <image> is piece 3
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

from llava_mcore.data.conversation import IMAGE, render

SIDE = 28  # pixels of a picture, as the tower of model/tiny sees it
HELD_OUT_DIGITS = 297
TILE, TRAIN_COLUMNS = 64, 8  # photographs are 640 x 427: 10 x 6 tiles, of which the last two columns are held out
VOCAB_SIZE, IMAGE_ID = 512, 3  # as model/tiny has them
SCENES = {"china.jpg": "the temple", "flower.jpg": "the flower"}

QUESTIONS = {
    "digit": ["Which digit is this?", "What digit is written here?", "Read the digit in the picture."],
    "parity": ["Is the digit even or odd?", "Is this an even or an odd digit?"],
    "kind": ["Is this a digit or a photograph?"],
    "scene": ["Which photograph is this cut from, the temple or the flower?"],
}


@dataclass(frozen=True)
class Sample:
    """One question about one picture."""

    kind: str
    picture: str  # path under media/
    answer: str
    held_out: bool

    def record(self, rng: random.Random) -> dict[str, object]:
        """The sample in LLaVA's format, asked in one of the known ways."""
        question = f"{IMAGE}\n{rng.choice(QUESTIONS[self.kind])}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": self.answer}]
        return {"id": f"{self.kind}-{Path(self.picture).stem}", "image": self.picture, "conversations": turns}


def digits(media: Path) -> Iterator[Sample]:
    """Every digit is asked for; a third of the pictures also for odd or even, a sixth for what kind of picture it is."""
    scans = load_digits()
    numbers = np.arange(len(scans.target))
    _, held_out = train_test_split(numbers, test_size=HELD_OUT_DIGITS, random_state=0, stratify=scans.target)
    held_out = set(held_out.tolist())
    for number, (pixels, digit) in enumerate(zip(scans.images, scans.target.tolist(), strict=True)):
        picture = f"digits/{number:04d}.png"
        scan = Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8))
        scan.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB").save(media / picture)
        yield Sample("digit", picture, str(digit), number in held_out)
        if number % 3 == 0:
            yield Sample("parity", picture, "odd" if digit % 2 else "even", number in held_out)
        if number % 6 == 1:
            yield Sample("kind", picture, "a digit", number in held_out)


def photographs(media: Path) -> Iterator[Sample]:
    """Tiles of the two photographs, none overlapping another."""
    photos = load_sample_images()
    for path, pixels in zip(photos.filenames, photos.images, strict=True):
        name = Path(path).name
        for row in range(pixels.shape[0] // TILE):
            for column in range(pixels.shape[1] // TILE):
                picture = f"photographs/{Path(name).stem}-{row}-{column}.png"
                tile = pixels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
                Image.fromarray(tile).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(media / picture)
                held_out = column >= TRAIN_COLUMNS
                yield Sample("scene", picture, SCENES[name], held_out)
                yield Sample("kind", picture, "a photograph", held_out)


def train_tokenizer(records: list[dict[str, object]], path: Path) -> None:
    """A SentencePiece model in Llama's manner: nothing is normalised, digits stand alone, unknown characters become bytes."""
    rendered = ["".join(segment.text for segment in render(record["conversations"], "vicuna_v1", "")) for record in records]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in rendered for line in text.replace(IMAGE, "").splitlines()]),
        model_writer=model,
        model_type="bpe",  # 512 pieces are enough to make every word of so small a language one piece
        vocab_size=VOCAB_SIZE,
        user_defined_symbols=[IMAGE],  # after unknown 0, begin 1 and end 2, so it is 3
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        byte_fallback=True,
        num_threads=1,  # the same model at every call
        minloglevel=2,
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    if processor.piece_to_id(IMAGE) != IMAGE_ID:
        raise RuntimeError(f"{path}: {IMAGE} is piece {processor.piece_to_id(IMAGE)}, but model/tiny takes it to be {IMAGE_ID}")


def make(output: Path) -> dict[str, int]:
    """Writes everything under ``output`` and counts what was written."""
    media = output / "media"
    for folder in ("digits", "photographs"):
        (media / folder).mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    samples = [*digits(media), *photographs(media)]
    train = [sample.record(rng) for sample in samples if not sample.held_out]
    held_out = [sample.record(rng) for sample in samples if sample.held_out]
    for name, records in (("train", train), ("heldout", held_out)):
        (output / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    train_tokenizer(train, output / "tokenizer")
    return {
        "pictures": len({sample.picture for sample in samples}),
        "training samples": len(train),
        "held-out samples": len(held_out),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write to")
    output = parser.parse_args().output
    counts = make(output)
    print(f"{output}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
