"""From a sample in a shard to what the model reads of it: which media it has, what these become, its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from llava_mcore.data import conversation
from llava_mcore.data.conversation import EncodedSample, Rendering, encode_prompt_of, encode_sample
from llava_mcore.data.decode import Decoder, Request
from llava_mcore.data.errors import SampleError
from llava_mcore.data.order import key
from llava_mcore.data.shards import AUDIO, FAMILIES, PICTURE, VIDEO, Medium, ShardDataset
from llava_mcore.data.tokenizer import Tokenizer
from llava_mcore.data.video import FrameChoice
from llava_mcore.geometry import SINGLE, Geometry, Shape
from llava_mcore.settings.schema import DataSettings

_KINDS: dict[int, Literal["picture", "video", "sound"]] = {PICTURE: "picture", VIDEO: "video", AUDIO: "sound"}


def rendering_of(data: DataSettings) -> Rendering:
    """How the settings write conversations."""
    return Rendering(
        data.template,
        data.system_prompt,
        data.label_rule,
        data.image_start_token,
        data.image_end_token,
        frames_of(data) if data.video_time_instruction else None,
    )


def frames_of(data: DataSettings) -> FrameChoice:
    """Which frames of a video the settings show."""
    return FrameChoice(data.video_frames_by, data.video_frames, data.video_fps)


def positions_of(length: int, image_slots_E: np.ndarray, geometry: Geometry, shapes: Sequence[Shape]) -> np.ndarray:
    """Positions in the decoder of a sample's tokens, int64 [L], from 0; where tiles are merged or pooled, those of their patches.

    Args:
        length: L.
        image_slots_E: where the image embeddings are among the L, medium after medium.
        geometry: what a medium becomes.
        shapes: of the media.
    """
    taken = np.ones(length, dtype=np.int64)
    if geometry.skipped:
        taken[image_slots_E] = [step for shape in shapes for step in geometry.steps(shape)]
    return np.cumsum(taken) - taken


def media_of(families: Sequence[int], embeddings: Sequence[int]) -> list[conversation.Medium]:
    """Media of some families as a conversation is written with them, and the places each takes."""
    return [conversation.Medium(_KINDS[family], count) for family, count in zip(families, embeddings, strict=True)]


def written_media(media: Sequence[Medium], embeddings: Sequence[int], how: Rendering) -> list[conversation.Medium]:
    """The media of a sample as its conversation is written with them, with times of frames where those are told."""
    plain = media_of([medium.family for medium in media], embeddings)
    if how.frame_times is None:
        return plain
    return [
        replace(written, seconds=_seconds(medium, how.frame_times, 0), lasts=medium.frames / (medium.fps or 1.0))
        if medium.family == VIDEO
        else written
        for medium, written in zip(media, plain, strict=True)
    ]


def _seconds(medium: Medium, frames: FrameChoice, choice: int) -> tuple[float, ...]:
    """When the chosen frames of a video are shown. The index knows the average rate: exact but for videos whose rate varies."""
    times = np.arange(medium.frames) / (medium.fps or 1.0)
    return tuple(times[frames.choose(times, medium.fps, choice)].tolist())


@dataclass(frozen=True)
class Reading:
    """How samples of any dataset become tokens and pixels.

    Attributes:
        tokenizer: makes ids.
        how: template and the like.
        frames: which frames of a video are shown.
        geometry: what a picture or a clip becomes.
        image_token_id: id written at each embedding.
    """

    tokenizer: Tokenizer
    how: Rendering
    frames: FrameChoice
    geometry: Geometry
    image_token_id: int

    @classmethod
    def from_settings(cls, tokenizer: Tokenizer, data: DataSettings, geometry: Geometry, image_token_id: int) -> Reading:
        """As the settings of a run ask for."""
        return cls(tokenizer, rendering_of(data), frames_of(data), geometry, image_token_id)

    def shapes(self, dataset: ShardDataset, index: int, *identity: int) -> list[Shape]:
        """The pictures and clips of a sample; a sound is none, its encoder comes later.

        Args:
            dataset: the dataset.
            index: of the sample.
            identity: as in ``requests``; it matters for the times of frames only.
        """
        media = [medium for medium in dataset.media(index) if medium.family in (PICTURE, VIDEO)]
        several = sum(medium.family == PICTURE for medium in media) > 1
        return [
            self._clip(medium, int(key(index, *identity)[0]))
            if medium.family == VIDEO
            else self.geometry.picture(medium.width, medium.height, several)
            for medium in media
        ]

    def _clip(self, medium: Medium, choice: int) -> Shape:
        if not self.geometry.has_time:
            return Shape(frames=self.frames.count(medium.frames, medium.fps))
        seconds = _seconds(medium, self.frames, choice)
        return Shape(frames=len(seconds), seconds=seconds)

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

    def requests(self, dataset: ShardDataset, index: int, *identity: int) -> list[Request]:
        """What is to be decoded for a sample, in the order of its pictures and clips; reads the bytes.

        Args:
            dataset: the dataset.
            index: of the sample.
            identity: what the choice of frames depends on, where it is random: seed, epoch.

        Raises:
            SampleError: bytes have changed since they were indexed.
        """
        choice = int(key(index, *identity)[0])
        media = [medium for medium in dataset.media(index) if medium.family in (PICTURE, VIDEO)]
        return [
            Request(medium.extension, dataset.read_medium(index, medium), choice, tiled=shape.width > 0)
            for medium, shape in zip(media, self.shapes(dataset, index), strict=True)
        ]

    def pixels(self, decoder: Decoder, dataset: ShardDataset, index: int) -> np.ndarray:
        """Tiles and frames of a sample as the model sees them, float32 [n, 3, image_size, image_size].

        Raises:
            SampleError: one of them cannot be decoded.
        """
        size = self.geometry.image_size
        seen = [np.empty((0, 3, size, size), dtype=np.float32)]
        for result in decoder.decode(self.requests(dataset, index)):
            if isinstance(result, SampleError):
                raise result
            seen.append(result.reshape(-1, 3, size, size))
        return np.concatenate(seen)

    def _media(self, dataset: ShardDataset, index: int) -> list[conversation.Medium]:
        shapes = iter(self.shapes(dataset, index))
        media = dataset.media(index)
        counts = [self.geometry.embeddings(next(shapes)) if medium.family in (PICTURE, VIDEO) else 0 for medium in media]
        return written_media(media, counts, self.how)


def count_visual(
    dataset: ShardDataset, indices: np.ndarray, geometry: Geometry, frames: FrameChoice
) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of each sample, frames of videos included, and embeddings they become, int64 [samples] each; from the index."""
    columns = dataset.columns
    first, last = columns["sample_component"][indices], columns["sample_component"][indices + 1]
    counts = last - first
    owners = np.repeat(np.arange(len(indices)), counts)
    rows = np.arange(counts.sum()) + np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    families = FAMILIES[columns["component_kind"][rows]]
    is_picture = families == PICTURE
    several = np.bincount(owners, weights=is_picture, minlength=len(indices))[owners] > 1
    tiles = is_picture * geometry.tiles(SINGLE)
    embeddings = is_picture * geometry.embeddings(SINGLE)
    # One by one where the size counts.
    for place in np.flatnonzero((families == VIDEO) | (is_picture & (geometry.anyres is not None))).tolist():
        row = rows[place]
        if is_picture[place]:
            size = int(columns["component_width"][row]), int(columns["component_height"][row])
            shape = geometry.picture(*size, bool(several[place]))
        else:
            shape = Shape(frames=frames.count(int(columns["component_frames"][row]), float(columns["component_fps"][row])))
        tiles[place], embeddings[place] = geometry.tiles(shape), geometry.embeddings(shape)
    each = (np.bincount(owners, weights=values, minlength=len(indices)) for values in (tiles, embeddings))
    of_tiles, of_embeddings = (counted.astype(np.int64) for counted in each)
    return of_tiles, of_embeddings
