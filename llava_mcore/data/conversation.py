"""From a conversation to token ids and labels, the way LLaVA renders and masks it.

A conversation is rendered to segments of text, of which the answers (and what ends them) are supervised. The text is cut at every
placeholder of a medium, each chunk is tokenised on its own as LLaVA does, and a token is supervised if its characters lie in a
supervised segment. LLaVA itself counts the tokens of every part and masks a whole sample where the counts disagree; the two give
the same labels wherever LLaVA's counting works.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.templates import CHAT_TEMPLATE, TEMPLATES, Template
from llava_mcore.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llava_mcore.data.video import FrameChoice

IMAGE, VIDEO, AUDIO = "<image>", "<video>", "<audio>"
IGNORE = -100

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Medium:
    """One medium of a sample, in the order of its files.

    ``<image>`` stands for a picture or a video, as in LLaVA's data; ``<video>`` for a video, ``<audio>`` for a sound, and both
    only in samples that have one (elsewhere they are HTML). A sound may have no placeholder: nothing of it enters the text yet.
    """

    kind: Literal["picture", "video", "sound"]
    embeddings: int = 0  # places it takes in the stream
    seconds: tuple[float, ...] = ()  # of a video's frames, where the conversation tells them
    lasts: float = 0.0  # seconds of the whole video, likewise

    @property
    def told(self) -> str:
        """What LLaVA-Video says of its frames; nothing where their times are not given."""
        if not self.seconds:
            return ""
        located = ",".join(f"{second:.2f}s" for second in self.seconds)
        return (
            f"The video lasts for {self.lasts:.2f} seconds, and {len(self.seconds)} frames are uniformly sampled from it. "
            f"These frames are located at {located}.Please answer the following questions related to this video."
        )


@dataclass(frozen=True)
class Rendering:
    """How conversations are written and what of them is learned; the names are those of ``data``."""

    template: str = "vicuna_v1"
    system_prompt: str | None = None  # in place of the template's own
    label_rule: Literal["answers", "published"] = "answers"
    image_start_token: str = ""  # around every picture
    image_end_token: str = ""
    frame_times: FrameChoice | None = None  # the frames of videos, whose times are told


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


def _turns(conversations: Any) -> tuple[str | None, list[tuple[str, str]]]:
    """The system prompt if there is one, and checked (role, text) pairs that alternate from a human turn on."""
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise SampleError("no `conversations`: a list of turns is needed")
    turns = []
    system = None
    for number, turn in enumerate(conversations, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise SampleError(f'turn {number} is not {{"from": ..., "value": text}}')
        role = turn.get("from")
        if role not in _ROLES:
            raise SampleError(f"turn {number}: unknown role {role!r} (human, gpt and, first, system are known)")
        if role == "system":
            if number > 1:
                raise SampleError(f"turn {number}: a system prompt can only come first")
            system = turn["value"]
        else:
            turns.append((role, turn["value"]))
    if turns and turns[0][0] == "gpt":  # as LLaVA does
        turns = turns[1:]
    if not turns:
        raise SampleError("the conversation is empty")
    for number, (role, _) in enumerate(turns, 1):
        if role != ("human" if number % 2 else "gpt"):
            raise SampleError(f"human and gpt turns do not alternate at turn {number}")
    return system, turns


def _check_texts(turns: list[tuple[str, str]], keeps_questions: bool, max_turns: int | None) -> None:
    for number, (role, text) in enumerate(turns, 1):
        if not text.strip() and (role == "gpt" or keeps_questions):
            raise SampleError(f"turn {number} ({role}) has no text")
    if max_turns is not None and len(turns) > max_turns:
        raise SampleError(f"{len(turns)} turns, but this template takes {max_turns}")


def _placed(
    turns: list[tuple[str, str]], how: Rendering, media: Sequence[Medium], keeps_questions: bool = True
) -> list[tuple[str, str]]:
    """The turns with their media where the model is to find them; of questions that are not kept, only these stay."""
    placeholder, waiting = _visual(media), iter([medium for medium in media if medium.kind != "sound"])
    return [
        (
            role,
            _place_images(text, placeholder, how, waiting)
            if keeps_questions or role == "gpt"
            else "".join(placeholder.findall(text)),
        )
        for role, text in turns
    ]


def _place_images(text: str, placeholder: re.Pattern[str], how: Rendering, waiting: Iterator[Medium]) -> str:
    """LLaVA's rule: a single picture moves to the front of its turn, on a line of its own; several stay where they are.

    The times of a video's frames stand on the line after it, as in LLaVA-Video.
    """
    found = placeholder.findall(text)
    if len(found) == 1:
        text = (found[0] + "\n" + text.replace(found[0], "").strip()).strip()

    def written(match: re.Match[str]) -> str:
        medium = next(waiting, None)  # where there are too few, ``_slots`` says so
        place = how.image_start_token + match[0] + how.image_end_token
        if medium is None or not medium.told:
            return place
        return f"{place}\n{medium.told}" + ("" if text[match.end() :].startswith("\n") else "\n")

    return placeholder.sub(written, text)


def _visual(media: Sequence[Medium]) -> re.Pattern[str]:
    """What stands for pictures and videos in a sample with these media."""
    return re.compile(f"{IMAGE}|{VIDEO}" if any(medium.kind == "video" for medium in media) else IMAGE)


def render(
    conversations: Any,
    how: Rendering | str,
    eos_token: str | None = None,
    bos_token: str | None = None,
    media: Sequence[Medium] = (),
) -> list[Segment]:
    """Renders a conversation by a template. One that ends with a human turn ends with the opening of the answer.

    Args:
        conversations: LLaVA's list of ``{"from": "human" | "gpt", "value": text}``, after a turn of ``system`` or none.
        how: or the name of a template of ``TEMPLATES``.
        eos_token: text of the end of sequence, for templates that write it.
        bos_token: text of the beginning of sequence, likewise.
        media: of the sample; whether there are videos among them decides what ``<video>`` means.

    Raises:
        SampleError: this is no conversation, or has a system prompt the template has no place for.
        ValueError: the template writes a token that is not given.
    """
    how = Rendering(how) if isinstance(how, str) else how
    template = TEMPLATES[how.template]

    def spelled(text: str) -> str:
        for name, word, token in (("{eos}", "end-of-sequence", eos_token), ("{bos}", "beginning-of-sequence", bos_token)):
            if name in text:
                if token is None:
                    raise ValueError(f"template {how.template} writes the {word} token, but the tokenizer has none")
                text = text.replace(name, token)
        return text

    said, turns = _turns(conversations)
    _check_texts(turns, template.keeps_questions, template.max_turns)
    system = _system(said, how, template)
    published = template.published_opening and how.label_rule == "published"
    segments = [] if template.system_in_question else [Segment(system, False)]
    for number, (role, text) in enumerate(_placed(turns, how, media, template.keeps_questions)):
        segments.append(Segment(template.mark, published or (role == "human" and number > 0)))
        if role == "human":
            first = system if template.system_in_question and not number else ""
            later = spelled(template.later_human) if number else ""
            segments.append(Segment(later + template.human + first + text + template.human_end, False))
        if role == "gpt" or number == len(turns) - 1:
            if role == "human":
                segments.append(Segment(template.mark, published))
            segments.append(Segment(template.opening, published))
        if role == "gpt":
            segments.append(Segment(template.glue + text + spelled(template.end), True))
            segments.append(Segment(template.after, published))
    if turns[-1][0] == "gpt":
        segments.append(Segment(template.mark, True))
    return [segment for segment in segments if segment.text]


def _system(said: str | None, how: Rendering, template: Template) -> str:
    """The system prompt as it is written: the sample's, else that of the settings, else the template's."""
    system = next((text for text in (said, how.system_prompt) if text is not None), None)
    if template.system_around is None:
        if system:
            raise SampleError(f"has a system prompt, which template {how.template} has no place for")
        return ""
    system = template.system if system is None else system
    return template.system_around[0] + system + template.system_around[1] if system else ""


def _render_own(conversations: Any, how: Rendering, tokenizer: Tokenizer, media: Sequence[Medium]) -> list[Segment]:
    """Renders by the template that the tokenizer brings along."""
    from llava_mcore.data.chat_template import render_chat

    if tokenizer.chat_template is None:
        raise DatasetError(
            f"the tokenizer has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            f"set data.template to one of {', '.join(TEMPLATES)}"
        )
    said, turns = _turns(conversations)
    _check_texts(turns, True, None)
    system = next((text for text in (said, how.system_prompt) if text is not None), None)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": _ROLES[role], "content": text} for role, text in _placed(turns, how, media)]
    return [Segment(*piece) for piece in render_chat(tokenizer.chat_template, messages, tokenizer.special_tokens)]


def _slots(text: str, media: Sequence[Medium]) -> list[tuple[int, int, int]]:
    """First and last character of every placeholder, and how many embeddings go there."""
    kinds = {medium.kind for medium in media}
    names = [IMAGE] + [VIDEO] * ("video" in kinds) + [AUDIO] * ("sound" in kinds)
    found = [(match[0], match.start(), match.end()) for match in re.finditer("|".join(names), text)]
    visual = [medium for medium in media if medium.kind != "sound"]
    places = [entry for entry in found if entry[0] != AUDIO]
    if len(places) != len(visual):
        named = "pictures" if "video" not in kinds else "pictures and videos"
        raise SampleError(
            f"{len(places)} `{'` or `'.join(names[: 1 + ('video' in kinds)])}` in the text, but {len(visual)} {named}"
        )
    sounds = len(media) - len(visual)
    if len(found) - len(places) not in (0, sounds):
        raise SampleError(f"{len(found) - len(places)} `{AUDIO}` in the text, but {sounds} sounds")
    waiting = iter(visual)
    slots = []
    for name, first, last in found:
        medium = Medium("sound") if name == AUDIO else next(waiting)
        if name == VIDEO and medium.kind != "video":
            raise SampleError(f"`{VIDEO}` stands in the text where the sample has a picture")
        slots.append((first, last, medium.embeddings))
    return slots


def _tokenize(
    segments: list[Segment], tokenizer: Tokenizer, how: Rendering, media: Sequence[Medium], image_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids with BOS and placeholders, and which of them are supervised."""
    text = "".join(segment.text for segment in segments)
    supervised_char = np.repeat([segment.supervised for segment in segments], [len(segment.text) for segment in segments])
    # Differences of this running count tell in one step whether a token's characters are all supervised.
    count = np.concatenate([[0], np.cumsum(supervised_char)])
    # A tokenizer's own template writes BOS itself.
    bos = [] if tokenizer.bos_id is None or how.template == CHAT_TEMPLATE else [tokenizer.bos_id]
    ids, supervised = [np.array(bos, dtype=np.int64)], [np.zeros(len(bos), dtype=bool)]
    always = _published_tokens(tokenizer, how)
    start = 0
    for first, last, embeddings in [*_slots(text, media), (len(text), len(text), 0)]:
        if chunk := text[start:first]:
            chunk_ids, offsets = tokenizer.encode(chunk)
            if image_token_id in chunk_ids:
                raise SampleError(f"the text contains token id {image_token_id}, which is kept for pictures")
            spans = np.array(offsets, dtype=np.int64).reshape(-1, 2) + start
            # A piece without characters of its own (a byte, the leading blank) belongs to the character after it.
            begin, end = spans[:, 0], np.maximum(spans[:, 1], np.minimum(spans[:, 0] + 1, start + len(chunk)))
            ids.append(np.array(chunk_ids, dtype=np.int64))
            learned = (end > begin) & (count[end] - count[begin] == end - begin)
            supervised.append(learned | np.isin(ids[-1], always) if always else learned)
        ids.append(np.full(embeddings, image_token_id, dtype=np.int64))
        supervised.append(np.zeros(embeddings, dtype=bool))
        start = last
    return np.concatenate(ids), np.concatenate(supervised)


def _published_tokens(tokenizer: Tokenizer, how: Rendering) -> list[int]:
    """Ids that are learned wherever they stand."""
    if how.label_rule != "published" or how.template == CHAT_TEMPLATE:
        return []
    encoded = [tokenizer.encode(token)[0] for token in TEMPLATES[how.template].published_tokens]
    return [ids[0] for ids in encoded if len(ids) == 1]


def _segments(conversations: Any, tokenizer: Tokenizer, how: Rendering, media: Sequence[Medium]) -> list[Segment]:
    if how.template == CHAT_TEMPLATE:
        return _render_own(conversations, how, tokenizer, media)
    for name in ("image_start_token", "image_end_token"):
        token = getattr(how, name)
        if token and tokenizer.token_id(token) is None:
            raise DatasetError(f"data.{name} {token!r} is not in the tokenizer's vocabulary; add it there or leave it out")
    return render(conversations, how, tokenizer.eos_token, tokenizer.bos_token, media)


def encode_sample(
    conversations: Any, tokenizer: Tokenizer, how: Rendering, *, media: Sequence[Medium], image_token_id: int
) -> EncodedSample:
    """Tokenises a conversation for training, whatever media belong to it.

    Args:
        conversations: LLaVA's list of turns, ending with an answer.
        tokenizer: gives ids and character offsets.
        how: template, system prompt, label rule.
        media: of the sample, in order: the n-th placeholder in the text stands for the n-th picture or video.
        image_token_id: id written at each of their embeddings.

    Raises:
        SampleError: no conversation, an unknown role, an empty turn, or another number of placeholders than of media.
        DatasetError: the tokenizer lacks what ``how`` asks for.
    """
    if isinstance(conversations, Sequence) and len(conversations) and isinstance(conversations[-1], Mapping):
        if conversations[-1].get("from") == "human":
            raise SampleError("the conversation ends with a human turn: there is no answer to learn")
    ids, supervised = _tokenize(_segments(conversations, tokenizer, how, media), tokenizer, how, media, image_token_id)
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    labels[:-1] = np.where(supervised[1:], ids[1:], IGNORE)
    has_places = any(medium.embeddings for medium in media)
    return EncodedSample(ids, labels, np.flatnonzero(ids == image_token_id) if has_places else np.empty(0, dtype=np.int64))


def check_conversation(conversations: Any, media: Sequence[Medium]) -> None:
    """What can be said without a tokenizer: whether a template that keeps questions can train on a conversation.

    Raises:
        SampleError: it cannot.
    """
    segments = render(conversations, Rendering(), "</s>", "<s>", media)
    if conversations[-1].get("from") == "human":
        raise SampleError("the conversation ends with a human turn: there is no answer to learn")
    _slots("".join(segment.text for segment in segments), media)


def encode_prompt_of(
    conversations: Any, tokenizer: Tokenizer, how: Rendering, *, media: Sequence[Medium], image_token_id: int
) -> np.ndarray:
    """Token ids [L] of a conversation up to its last human turn, with the answer opened: what generation starts from.

    Answers after the last human turn are left out. Arguments and errors are those of ``encode_sample``.
    """
    if isinstance(conversations, Sequence) and not isinstance(conversations, str):
        last = max(
            (n for n, turn in enumerate(conversations) if isinstance(turn, Mapping) and turn.get("from") == "human"), default=-1
        )
        if last < 0:
            raise SampleError("the conversation has no human turn to answer")
        conversations = conversations[: last + 1]
    return _tokenize(_segments(conversations, tokenizer, how, media), tokenizer, how, media, image_token_id)[0]


def answer_end(how: Rendering) -> str:
    """The text that ends an answer where no end-of-sequence token does; else nothing, as after a tokenizer's own template."""
    if how.template == CHAT_TEMPLATE:
        return ""
    template = TEMPLATES[how.template]
    return template.mark or template.end.replace("{eos}", "").strip(" ")


def encode_conversation(
    conversations: Any, tokenizer: Tokenizer, template: str, *, num_images: int, image_tokens_each: int, image_token_id: int
) -> EncodedSample:
    """``encode_sample`` of a sample with ``num_images`` pictures of ``image_tokens_each`` embeddings, written by a template."""
    media = [Medium("picture", image_tokens_each)] * num_images
    return encode_sample(conversations, tokenizer, Rendering(template), media=media, image_token_id=image_token_id)


def encode_prompt(
    conversations: Any, tokenizer: Tokenizer, template: str, *, num_images: int, image_tokens_each: int, image_token_id: int
) -> np.ndarray:
    """``encode_prompt_of`` of such a sample."""
    media = [Medium("picture", image_tokens_each)] * num_images
    return encode_prompt_of(conversations, tokenizer, Rendering(template), media=media, image_token_id=image_token_id)
