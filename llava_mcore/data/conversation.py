"""From a conversation to token ids and labels, the way LLaVA renders and masks it.

A conversation is rendered to segments of text, of which the answers (and what ends them) are supervised. The text is cut at every
``<image>``, each chunk is tokenised on its own as LLaVA does, and a token is supervised if its characters lie in a supervised
segment. LLaVA itself counts the tokens of every part and masks a whole sample where the counts disagree; the two give the same
labels wherever LLaVA's counting works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_mcore.data.errors import SampleError
from llava_mcore.data.tokenizer import Tokenizer

IMAGE = "<image>"
IGNORE = -100


@dataclass(frozen=True)
class Template:
    """How turns become text. ``end`` follows an answer and is learned with it."""

    system: str
    human: str
    gpt: str
    between: str
    end: str
    ends_with_eos: bool
    keeps_questions: bool
    max_turns: int | None = None


TEMPLATES = {
    # Captions: the question is thrown away and only its pictures stay. No EOS, as published.
    "plain": Template(system="", human="", gpt="", between="", end="\n", ends_with_eos=False, keeps_questions=False, max_turns=2),
    "vicuna_v1": Template(
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        ),
        human="USER: ",
        gpt="ASSISTANT:",
        between=" ",
        end="",
        ends_with_eos=True,
        keeps_questions=True,
    ),
}


@dataclass(frozen=True)
class Segment:
    """A stretch of rendered text, and whether the model learns to write it."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class EncodedSample:
    """One tokenised sample: L tokens of which E are places of image embeddings."""

    input_ids: np.ndarray  # [L] int64, image_token_id at every image embedding
    labels: np.ndarray  # [L] int64, labels[t] is the id to be predicted at t, IGNORE where there is none
    image_slots: np.ndarray  # [E] int64, where the embeddings go, picture after picture


def _turns(conversations: Any, template: Template) -> list[tuple[str, str]]:
    """Checked (role, text) pairs that alternate from a human turn on."""
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise SampleError("no `conversations`: a list of turns is needed")
    turns = []
    for number, turn in enumerate(conversations, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise SampleError(f'turn {number} is not {{"from": ..., "value": text}}')
        role = turn.get("from")
        if role not in ("human", "gpt"):
            raise SampleError(f"turn {number}: unknown role {role!r} (human and gpt are known)")
        turns.append((role, turn["value"]))
    if turns and turns[0][0] == "gpt":  # as LLaVA does
        turns = turns[1:]
    if not turns:
        raise SampleError("the conversation is empty")
    for number, (role, text) in enumerate(turns, 1):
        if role != ("human" if number % 2 else "gpt"):
            raise SampleError(f"human and gpt turns do not alternate at turn {number}")
        if not text.strip() and (role == "gpt" or template.keeps_questions):
            raise SampleError(f"turn {number} ({role}) has no text")
    if template.max_turns is not None and len(turns) > template.max_turns:
        raise SampleError(f"{len(turns)} turns, but this template takes {template.max_turns}")
    return turns


def _place_images(text: str) -> str:
    """LLaVA's rule: a single ``<image>`` moves to the front of its turn, on a line of its own; several stay where they are."""
    if text.count(IMAGE) != 1:
        return text
    return (IMAGE + "\n" + text.replace(IMAGE, "").strip()).strip()


def render(conversations: Any, template: str, eos_token: str | None = None) -> list[Segment]:
    """Renders a conversation. One that ends with a human turn ends with the opening of the answer, as generation needs it.

    Args:
        conversations: LLaVA's list of ``{"from": "human" | "gpt", "value": text}``.
        template: name of a template.
        eos_token: text of the end of sequence, where the template ends an answer with it.

    Raises:
        SampleError: this is no conversation.
    """
    how = TEMPLATES[template]
    if how.ends_with_eos and eos_token is None:
        raise ValueError(f"template {template} ends answers with the end-of-sequence token, but the tokenizer has none")
    end = (eos_token or "") if how.ends_with_eos else how.end
    segments = [Segment(how.system, False)]
    for role, text in _turns(conversations, how):
        text = _place_images(text)
        if role == "human":
            text = text if how.keeps_questions else IMAGE * text.count(IMAGE)
            segments.append(Segment(how.human + text + how.between + how.gpt, False))
        else:
            # The space before the answer belongs to it: tokenizers glue it to the first word.
            segments.append(Segment(how.between + text + end, True))
    return [segment for segment in segments if segment.text]


def _tokenize(
    segments: list[Segment], tokenizer: Tokenizer, num_images: int, image_tokens_each: int, image_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids with BOS and placeholders, and which of them are supervised."""
    text = "".join(segment.text for segment in segments)
    chunks = text.split(IMAGE)
    if len(chunks) - 1 != num_images:
        raise SampleError(f"{len(chunks) - 1} `{IMAGE}` in the text, but {num_images} pictures")
    supervised_char = np.repeat([segment.supervised for segment in segments], [len(segment.text) for segment in segments])
    # Differences of this running count tell in one step whether a token's characters are all supervised.
    count = np.concatenate([[0], np.cumsum(supervised_char)])
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    picture = np.full(image_tokens_each, image_token_id, dtype=np.int64)
    ids, supervised = [np.array(bos, dtype=np.int64)], [np.zeros(len(bos), dtype=bool)]
    start = 0
    for number, chunk in enumerate(chunks):
        if number:
            ids.append(picture)
            supervised.append(np.zeros(image_tokens_each, dtype=bool))
            start += len(IMAGE)
        if chunk:
            chunk_ids, offsets = tokenizer.encode(chunk)
            if image_token_id in chunk_ids:
                raise SampleError(f"the text contains token id {image_token_id}, which is kept for pictures")
            spans = np.array(offsets, dtype=np.int64).reshape(-1, 2) + start
            # A piece without characters of its own (a byte, the leading blank) belongs to the character after it.
            first, last = spans[:, 0], np.maximum(spans[:, 1], np.minimum(spans[:, 0] + 1, start + len(chunk)))
            ids.append(np.array(chunk_ids, dtype=np.int64))
            supervised.append((last > first) & (count[last] - count[first] == last - first))
            start += len(chunk)
    return np.concatenate(ids), np.concatenate(supervised)


def encode_conversation(
    conversations: Any, tokenizer: Tokenizer, template: str, *, num_images: int, image_tokens_each: int, image_token_id: int
) -> EncodedSample:
    """Tokenises a conversation for training.

    Args:
        conversations: LLaVA's list of turns, ending with an answer.
        tokenizer: gives ids and character offsets.
        template: name of a template.
        num_images: pictures that belong to the sample.
        image_tokens_each: decoder embeddings one picture becomes.
        image_token_id: id written at each of them.

    Raises:
        SampleError: no conversation, an unknown role, an empty turn, or another number of ``<image>`` than of pictures.
    """
    if isinstance(conversations, Sequence) and len(conversations) and isinstance(conversations[-1], Mapping):
        if conversations[-1].get("from") == "human":
            raise SampleError("the conversation ends with a human turn: there is no answer to learn")
    segments = render(conversations, template, tokenizer.eos_token)
    ids, supervised = _tokenize(segments, tokenizer, num_images, image_tokens_each, image_token_id)
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    labels[:-1] = np.where(supervised[1:], ids[1:], IGNORE)
    return EncodedSample(ids, labels, np.flatnonzero(ids == image_token_id) if num_images else np.empty(0, dtype=np.int64))


def encode_prompt(
    conversations: Any, tokenizer: Tokenizer, template: str, *, num_images: int, image_tokens_each: int, image_token_id: int
) -> np.ndarray:
    """Token ids [L] of a conversation up to its last human turn, with the answer opened: what generation starts from.

    Answers after the last human turn are left out. Arguments and errors are those of ``encode_conversation``.
    """
    if isinstance(conversations, Sequence) and not isinstance(conversations, str):
        last = max(
            (n for n, turn in enumerate(conversations) if isinstance(turn, Mapping) and turn.get("from") == "human"), default=-1
        )
        if last < 0:
            raise SampleError("the conversation has no human turn to answer")
        conversations = conversations[: last + 1]
    segments = render(conversations, template, tokenizer.eos_token)
    return _tokenize(segments, tokenizer, num_images, image_tokens_each, image_token_id)[0]
