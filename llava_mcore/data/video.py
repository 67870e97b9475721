"""Videos: which frames there are, which of them are shown to the model, and decoding those on a CPU with PyAV.

Frames are counted in the order they are shown, from 0, as a list of presentation times made by demultiplexing. It is exact where
headers are not, and tells frames apart in videos of variable frame rate.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import av
import numpy as np
from av.error import FFmpegError

from llava_mcore.data.audio import SoundLength
from llava_mcore.data.errors import SampleError
from llava_mcore.data.probe import Probe, check_size, looks_like

# What FFmpeg calls the containers that are read here (also for mp4's relatives, mov and m4v).
CONTAINERS = ("mov,mp4", "matroska,webm")
_SHOW_FRAME = 1 << 4  # of a VP8 frame's first byte (RFC 6386, 9.1): packets without it show nothing
# Codecs whose decoders, told so for one packet, leave out frames that no other refers to (libdav1d heeds its first order only).
_CAN_SKIP = frozenset({"h264", "hevc", "mpeg4"})
_CODECS = {"libdav1d": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a video the model sees.

    ``uniform``: the middle frames of ``frames`` equal parts. ``segments``: a random frame of each part (TSN, arXiv:1608.00859).
    ``time``: like ``uniform``, with parts of equal duration: another choice where the frame rate varies. ``fps``: about ``fps``
    frames a second; where that makes more than ``frames``, that many from the first to the last (LLaVA-NeXT). A video of fewer
    frames gives all of them.
    """

    policy: Literal["uniform", "segments", "time", "fps"] = "uniform"
    frames: int = 8
    fps: float = 1.0

    def count(self, frames: int, fps: float) -> int:
        """How many frames a video of ``frames`` frames at ``fps`` a second gives: what a plan needs to know."""
        if self.policy == "fps":
            return min(-(-frames // self._stride(fps)), self.frames)
        return min(self.frames, frames)

    def choose(self, times: np.ndarray, fps: float, key: int) -> np.ndarray:
        """Numbers of the frames, ascending, int64 [count].

        Args:
            times: seconds of each frame, ascending, float64 [frames].
            fps: frames a second on average, as in the video's ``Probe``.
            key: makes the random choice: the same key, the same frames.
        """
        total, count = len(times), self.count(len(times), fps)
        if self.policy == "fps":
            every = np.arange(0, total, self._stride(fps))
            return every if len(every) <= self.frames else np.linspace(0, total - 1, self.frames).astype(np.int64)
        if self.policy == "time" and count < total:
            # A frame is shown until the next one comes; how long the last one lasts is taken from the average.
            end = times[-1] + (times[-1] - times[0]) / max(1, total - 1)
            middles = times[0] + (np.arange(count) + 0.5) / count * (end - times[0])
            return np.searchsorted(times, middles, side="right").astype(np.int64) - 1
        within = np.full(count, 0.5)
        if self.policy == "segments":
            within = np.random.Generator(np.random.Philox(key=key)).random(count)
        return np.minimum((np.arange(count) + within) * total / count, total - 1).astype(np.int64)

    def _stride(self, fps: float) -> int:
        return max(1, round(fps / self.fps))


@dataclass(frozen=True)
class VideoScan:
    """The frames of a video in the order they are shown, and the packets they lie in, in the order they are stored."""

    codec: str  # h264, hevc, av1, vp8, vp9, mpeg4, mjpeg, ...
    pixel_format: str  # as FFmpeg calls it: yuv420p, yuv420p10le, ...
    width: int
    height: int
    pts: np.ndarray  # [frames] int64, in time_base, ascending
    packet: np.ndarray  # [frames] int64, the packet that holds each frame
    packets: int  # more than frames where some show nothing
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
def _open(data: bytes) -> Iterator[Any]:
    """An open container that has a video stream; errors of PyAV within the block become SampleErrors."""
    try:
        with av.open(io.BytesIO(data), metadata_errors="replace") as container:
            if not container.format.name.startswith(CONTAINERS) or not container.streams.video:
                raise SampleError(f"not a video: {looks_like(data)}")
            if container.streams.video[0].codec_context is None:
                raise SampleError(f"video is of an unknown codec ({looks_like(data)})")
            yield container
    except SampleError:
        raise
    except (FFmpegError, ValueError, ArithmeticError) as error:
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
    with _open(data) as container:
        return _scan(container)[0]


def _scan(container: Any) -> tuple[VideoScan, list[Any]]:
    """The frames of an open video, and its packets."""
    stream = container.streams.video[0]
    context = stream.codec_context
    codec = _CODECS.get(context.name, context.name)
    check_size("video", context.width, context.height)
    packets: list[Any] = []
    shown: list[tuple[int, int]] = []
    end = 0.0
    audio = [sound for sound in container.streams.audio[:1] if sound.codec_context is not None]
    sound = SoundLength(container, audio[0]) if audio else None
    for packet in container.demux(stream, *audio):
        if not packet.size:
            continue
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None:
            raise SampleError("video has frames without a time")
        end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
        if sound is not None and packet.stream is not stream:
            sound.add(packet)
            continue
        if not packet.is_discard and (codec != "vp8" or memoryview(packet)[0] & _SHOW_FRAME):
            shown.append((time, len(packets)))
        packets.append(packet)
    if not shown:
        raise SampleError("video has no frame")
    # Streams that are not read here may last longer.
    promised = (container.duration or 0) / av.time_base if len(container.streams) == 1 + len(audio) else 0.0
    if stream.frames > len(packets) + 1 or promised > end + 0.25:
        header = f"{stream.frames} frames" if stream.frames else f"{promised:.2f} s"
        raise SampleError(f"video is cut short: {len(packets)} frames and {end:.2f} s of {header}")
    shown.sort()
    scan = VideoScan(
        codec=codec,
        pixel_format=context.pix_fmt or "",
        width=context.width,
        height=context.height,
        pts=np.array([time for time, _ in shown], dtype=np.int64),
        packet=np.array([packet for _, packet in shown], dtype=np.int64),
        packets=len(packets),
        time_base=float(stream.time_base),
        rate=float(stream.average_rate or 0),
        audio_samples=sound.samples if sound is not None else 0,
    )
    return scan, packets


def decode_frames(data: bytes, frames: Sequence[int] | Callable[[VideoScan], np.ndarray]) -> list[np.ndarray]:
    """Decodes some frames of a video, on one core.

    Only what those frames need is decoded: from the keyframe before each, without the frames in between that no other refers to.

    Args:
        data: an MP4, WebM or Matroska file.
        frames: their numbers, from 0, in any order, repeated or not; or what chooses them.

    Returns:
        uint8 [height, width, 3] each, RGB, as stored: no rotation is applied.

    Raises:
        SampleError: it is no video, has no such frame, or a frame cannot be decoded.
    """
    with _open(data) as container:
        scan, packets = _scan(container)
        frames = [int(frame) for frame in (frames(scan) if callable(frames) else frames)]
        wanted = sorted(set(frames))
        if not wanted:
            return []
        if wanted[0] < 0 or wanted[-1] >= len(scan.pts):
            raise SampleError(f"video has no frame {wanted[-1] if wanted[0] >= 0 else wanted[0]}: it has {len(scan.pts)}")
        context = container.streams.video[0].codec_context
        context.thread_count = 1
        number_at = {int(scan.pts[number]): number for number in wanted}
        found: dict[int, np.ndarray] = {}

        def keep(decoded: Iterable[Any]) -> None:
            for frame in decoded:
                number = number_at.get(frame.pts)
                if number is not None and number not in found:
                    found[number] = frame.to_ndarray(format="rgb24")

        for first, last in _runs(scan, packets, wanted):
            _decode_run(context, packets[first : last + 1], number_at if scan.codec in _CAN_SKIP else None, keep)
        if len(found) < len(wanted):  # keyframes that are none, or frames marked wrongly as not referred to: decode everything
            _decode_run(context, packets, None, keep)
        missing = [number for number in wanted if number not in found]
        if missing:
            raise SampleError(f"frame {missing[0]} of the {len(scan.pts)} of the video cannot be decoded")
        return [found[frame] for frame in frames]


def _runs(scan: VideoScan, packets: list[Any], wanted: list[int]) -> list[tuple[int, int]]:
    """First and last packet of the stretches that have to be decoded; each begins with a keyframe."""
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe] or [0]
    runs: list[tuple[int, int]] = []
    for target in sorted(int(scan.packet[number]) for number in wanted):
        before = [key for key in keys if key <= target]
        begin = before[-1] if before else 0
        # A frame stored after a keyframe and shown before it also refers to what came before (an open group of pictures).
        if len(before) > 1 and _time(packets[target]) < _time(packets[begin]):
            begin = before[-2]
        if runs and begin <= runs[-1][1]:
            runs[-1] = (runs[-1][0], target)
        else:
            runs.append((begin, target))
    return runs


def _time(packet: Any) -> int:
    return int(packet.pts if packet.pts is not None else packet.dts)


def _decode_run(context: Any, packets: list[Any], wanted: Container[int] | None, keep: Callable[[Iterable[Any]], None]) -> None:
    """Decodes one stretch; with times of ``wanted`` frames given, of the others only those that frames refer to."""
    for packet in packets:
        if wanted is not None:
            context.skip_frame = "DEFAULT" if _time(packet) in wanted else "NONREF"
        try:
            keep(context.decode(packet))
        except FFmpegError:
            pass  # a damaged packet matters only if a wanted frame is missing in the end
    context.skip_frame = "DEFAULT"
    keep(context.decode(None))
    context.flush_buffers()
