"""From a sample in a shard to what the model reads of it: which media it has, how many pictures they make, its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_mcore.data import conversation
from llava_mcore.data.conversation import EncodedSample, Rendering, encode_prompt_of, encode_sample
from llava_mcore.data.decode import Decoder, Request
from llava_mcore.data.errors import SampleError
from llava_mcore.data.order import key
from llava_mcore.data.shards import AUDIO, FAMILIES, PICTURE, VIDEO, Medium, ShardDataset
from llava_mcore.data.tokenizer import Tokenizer
from llava_mcore.data.video import FrameChoice
from llava_mcore.settings.schema import DataSettings, VisionSettings

_KINDS = {PICTURE: "picture", VIDEO: "video", AUDIO: "sound"}


def rendering_of(data: DataSettings) -> Rendering:
    """How the settings write conversations."""
    return Rendering(data.template, data.system_prompt, data.label_rule, data.image_start_token, data.image_end_token)


def frames_of(data: DataSettings) -> FrameChoice:
    """Which frames of a video the settings show."""
    return FrameChoice(data.video_frames_by, data.video_frames, data.video_fps)


def media_of(media: Sequence[Medium], embeddings: Sequence[int]) -> list[conversation.Medium]:
    """Media as a conversation is written with them, and the places each takes."""
    return [
        conversation.Medium(_KINDS[medium.family], count)  # type: ignore[arg-type]
        for medium, count in zip(media, embeddings, strict=True)
    ]


@dataclass(frozen=True)
class Reading:
    """How samples of any dataset become tokens and pictures. A video is as many pictures as frames of it are shown.

    Attributes:
        tokenizer: makes ids.
        how: template and the like.
        frames: which frames of a video are shown.
        each: embeddings of one picture.
        image_token_id: id written at each of them.
    """

    tokenizer: Tokenizer
    how: Rendering
    frames: FrameChoice
    each: int
    image_token_id: int

    @classmethod
    def from_settings(cls, tokenizer: Tokenizer, data: DataSettings, vision: VisionSettings, image_token_id: int) -> Reading:
        """As the settings of a run ask for."""
        return cls(tokenizer, rendering_of(data), frames_of(data), vision.embeddings_per_image, image_token_id)

    def pictures(self, medium: Medium) -> int:
        """Pictures one medium is to the model: none for a sound, whose encoder comes later."""
        if medium.family == VIDEO:
            return self.frames.count(medium.frames, medium.fps)
        return 1 if medium.family == PICTURE else 0

    def encode(self, dataset: ShardDataset, index: int, record: dict[str, Any]) -> EncodedSample:
        """Tokenises a sample for training.

        Raises:
            SampleError: it makes no conversation.
        """
        return encode_sample(
            record.get("conversations"),
            self.tokenizer,
            self.how,
            media=self._media(dataset, index),
            image_token_id=self.image_token_id,
        )

    def encode_prompt(self, dataset: ShardDataset, index: int, record: dict[str, Any]) -> np.ndarray:
        """Token ids [L] of a sample up to its last question, with the answer opened.

        Raises:
            SampleError: it makes no conversation, or has no question.
        """
        return encode_prompt_of(
            record.get("conversations"),
            self.tokenizer,
            self.how,
            media=self._media(dataset, index),
            image_token_id=self.image_token_id,
        )

    def _media(self, dataset: ShardDataset, index: int) -> list[conversation.Medium]:
        media = dataset.media(index)
        return media_of(media, [self.pictures(medium) * self.each for medium in media])


def requests_of(dataset: ShardDataset, index: int, *identity: int) -> list[Request]:
    """What is to be decoded for a sample, in the order of its pictures; reads the bytes.

    Args:
        dataset: the dataset.
        index: of the sample.
        identity: what the choice of frames depends on, where it is random: seed, epoch.

    Raises:
        SampleError: bytes have changed since they were indexed.
    """
    choice = int(key(index, *identity)[0])
    return [
        Request(medium.extension, dataset.read_medium(index, medium), choice)
        for medium in dataset.media(index)
        if medium.family in (PICTURE, VIDEO)
    ]


def decode_sample(decoder: Decoder, dataset: ShardDataset, index: int, image_size: int) -> np.ndarray:
    """Pictures and frames of a sample as the model sees them, float32 [n, 3, image_size, image_size].

    Raises:
        SampleError: one of them cannot be decoded.
    """
    seen = [np.empty((0, 3, image_size, image_size), dtype=np.float32)]
    for result in decoder.decode(requests_of(dataset, index)):
        if isinstance(result, SampleError):
            raise result
        seen.append(result.reshape(-1, 3, image_size, image_size))
    return np.concatenate(seen)


def count_pictures(dataset: ShardDataset, indices: np.ndarray, frames: FrameChoice) -> np.ndarray:
    """Pictures of each sample, int64 [samples], frames of videos included; from the index."""
    columns = dataset.columns
    first, last = columns["sample_component"][indices], columns["sample_component"][indices + 1]
    counts = last - first
    owners = np.repeat(np.arange(len(indices)), counts)
    rows = np.arange(counts.sum()) + np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    families = FAMILIES[columns["component_kind"][rows]]
    pictures = (families == PICTURE).astype(np.int64)
    for place in np.flatnonzero(families == VIDEO).tolist():
        row = rows[place]
        pictures[place] = frames.count(int(columns["component_frames"][row]), float(columns["component_fps"][row]))
    return np.bincount(owners, weights=pictures, minlength=len(indices)).astype(np.int64)
