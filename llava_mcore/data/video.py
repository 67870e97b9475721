"""Videos: which frames there are, and decoding some of them on a CPU with PyAV.

Frames are counted in the order they are shown, from 0, as a list of presentation times made by demultiplexing. It is exact where
headers are not, and tells frames apart in videos of variable frame rate.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from llava_mcore.data.audio import sound_length
from llava_mcore.data.errors import SampleError
from llava_mcore.data.probe import Probe, check_size, looks_like

# What FFmpeg calls the containers that are read here (also for mp4's relatives, mov and m4v).
CONTAINERS = ("mov,mp4", "matroska,webm")
_SHOW_FRAME = 1 << 4  # of a VP8 frame's first byte (RFC 6386, 9.1): packets without it show nothing


@dataclass(frozen=True)
class VideoScan:
    """The frames of a video, in the order they are shown."""

    codec: str  # h264, hevc, av1, vp8, vp9, mpeg4, mjpeg, ...
    width: int
    height: int
    pts: np.ndarray  # [frames] int64, in time_base, ascending
    keyframe: np.ndarray  # [frames] bool: decoding can begin here
    time_base: float  # seconds
    rate: float  # frames a second, where a single frame cannot tell it
    audio_samples: int

    @property
    def times(self) -> np.ndarray:
        """Seconds from the first frame, float64 [frames]."""
        return (self.pts - self.pts[0]) * self.time_base

    @property
    def probe(self) -> Probe:
        """What an index keeps of it."""
        steps = np.diff(self.pts)
        total = float(steps.sum()) * self.time_base
        return Probe(
            width=self.width,
            height=self.height,
            frames=len(self.pts),
            fps=len(steps) / total if total else self.rate,
            # Containers round times to their ticks, so that equal steps may differ by one.
            vfr=bool(len(steps)) and int(steps.max() - steps.min()) > 1,
            audio_samples=self.audio_samples,
        )


@contextmanager
def open_video(data: bytes) -> Iterator[Any]:
    """An open container that has a video stream.

    Raises:
        SampleError: it cannot be opened, or has none. Errors of PyAV within the block become SampleErrors too.
    """
    try:
        with av.open(io.BytesIO(data), metadata_errors="replace") as container:
            if not container.format.name.startswith(CONTAINERS) or not container.streams.video:
                raise SampleError(f"not a video: {looks_like(data)}")
            yield container
    except SampleError:
        raise
    except (FFmpegError, ValueError, EOFError) as error:
        if data[4:8] == b"ftyp" and b"moov" not in data:
            raise SampleError("video has no moov atom: its end is missing, or it was never finished") from error
        raise SampleError(f"not a readable video ({looks_like(data)}: {error})") from error


def scan_video(data: bytes) -> VideoScan:
    """Lists the frames of a video, without decoding any.

    Args:
        data: an MP4, WebM or Matroska file.

    Raises:
        SampleError: no such file, no frame in it, cut short, or frames too large.
    """
    with open_video(data) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context.name
        check_size("video", stream.codec_context.width, stream.codec_context.height)
        shown: list[tuple[int, bool]] = []
        sound, end = 0, 0.0
        audio = container.streams.audio[:1]
        for packet in container.demux(stream, *audio):
            if not packet.size or packet.is_discard:
                continue
            time = packet.pts if packet.pts is not None else packet.dts
            if time is None:
                raise SampleError("video has frames without a time")
            end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
            if packet.stream is not stream:
                sound += packet.duration or 0
            elif codec not in ("vp8", "libvpx") or bytes(memoryview(packet)[:1])[0] & _SHOW_FRAME:
                shown.append((time, packet.is_keyframe))
        if not shown:
            raise SampleError("video has no frame")
        if stream.frames > len(shown) + 1 or (container.duration or 0) / av.time_base > end + 1:
            raise SampleError(f"video is cut short: {len(shown)} frames and {end:.2f} s of {_promised(container, stream)}")
        shown.sort(key=lambda frame: frame[0])
        return VideoScan(
            codec=codec,
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            pts=np.array([time for time, _ in shown], dtype=np.int64),
            keyframe=np.array([key for _, key in shown], dtype=bool),
            time_base=float(stream.time_base),
            rate=float(stream.average_rate or 0),
            audio_samples=sound_length(sound, audio[0].time_base) if audio else 0,
        )


def _promised(container: Any, stream: Any) -> str:
    seconds = (container.duration or 0) / av.time_base
    return f"{stream.frames} frames" if stream.frames else f"{seconds:.2f} s"
