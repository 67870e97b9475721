"""Sound: decoded to 16 kHz, one channel, by PyAV."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from llava_mcore.data.errors import SampleError
from llava_mcore.data.probe import looks_like

SAMPLE_RATE = 16_000  # of what speech encoders hear
CONTAINERS = ("wav", "flac", "mp3", "mov,mp4", "matroska,webm")


@dataclass(frozen=True)
class AudioScan:
    """What headers and packets of a sound say."""

    codec: str
    rate: int  # as stored
    channels: int
    samples: int  # of one channel at SAMPLE_RATE


@contextmanager
def open_audio(data: bytes) -> Iterator[Any]:
    """An open container that has a sound stream.

    Raises:
        SampleError: it cannot be opened, or has none. Errors of PyAV within the block become SampleErrors too.
    """
    try:
        with av.open(io.BytesIO(data), metadata_errors="replace") as container:
            if not container.format.name.startswith(CONTAINERS) or not container.streams.audio:
                raise SampleError(f"holds no sound: {looks_like(data)}")
            if container.streams.audio[0].codec_context is None:
                raise SampleError(f"sound is of an unknown codec ({looks_like(data)})")
            yield container
    except SampleError:
        raise
    except (FFmpegError, ValueError, ArithmeticError) as error:
        raise SampleError(f"not a readable sound ({looks_like(data)}: {error})") from error


class SoundLength:
    """Adds up how long a sound is, packet by packet, without what an encoder put in front of it and behind.

    Args:
        container: an open container.
        stream: its sound.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self._stream = stream
        self._rate = stream.codec_context.sample_rate
        # Matroska's last packet is as long as what is heard of it; elsewhere it is as long as what is coded.
        self._ends_are_cut = container.format.name.startswith("matroska")
        self._ticks = self._skipped = 0

    def add(self, packet: Any) -> None:
        """Counts one packet of the sound."""
        if packet.is_discard:
            return
        self._ticks += packet.duration or 0
        if packet.has_sidedata("skip_samples"):  # two little-endian 32-bit counts: at the start, at the end
            front, end = struct.unpack_from("<II", bytes(packet.get_sidedata("skip_samples")))
            self._skipped += front + (0 if self._ends_are_cut else end)

    @property
    def samples(self) -> int:
        """Samples at ``SAMPLE_RATE``."""
        seconds = self._ticks * self._stream.time_base - Fraction(self._skipped, self._rate or SAMPLE_RATE)
        return max(0, round(seconds * SAMPLE_RATE))


def scan_audio(data: bytes) -> AudioScan:
    """Length of a sound, from its packets, without decoding any.

    Raises:
        SampleError: no MP3, WAV, FLAC (or video with sound), or no samples in it.
    """
    with open_audio(data) as container:
        stream = container.streams.audio[0]
        length = SoundLength(container, stream)
        for packet in container.demux(stream):
            if packet.size:
                length.add(packet)
        samples = length.samples
        if not samples:
            raise SampleError("sound has no samples")
        promised = round((stream.duration or 0) * stream.time_base * SAMPLE_RATE)
        # FFmpeg shortens a WAV's length to what is there; its own header tells (all ones: written as a stream).
        riff = int.from_bytes(data[4:8], "little") if data[:4] == b"RIFF" else 0
        if promised > samples + SAMPLE_RATE or len(data) < riff + 8 < 1 << 32:
            raise SampleError(f"sound is cut short: {samples / SAMPLE_RATE:.2f} s are there")
        return AudioScan(stream.codec_context.name, stream.codec_context.sample_rate, stream.codec_context.channels, samples)


def decode_sound(data: bytes) -> np.ndarray:
    """Decodes a sound (also a video's) to one channel at ``SAMPLE_RATE``.

    Args:
        data: an MP3, WAV or FLAC file, or a video with sound.

    Returns:
        float32 [samples] from -1 to 1, as many as ``scan_audio`` says: what an encoder's padding adds or a resampler holds back
        is cut or filled with silence.

    Raises:
        SampleError: no such file, no samples in it, or more than a tenth of a second of it cannot be decoded.
    """
    samples = scan_audio(data).samples
    pieces: list[np.ndarray] = []
    with open_audio(data) as container:
        stream = container.streams.audio[0]
        stream.codec_context.thread_count = 1
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        for frame in container.decode(stream):
            pieces.extend(resampled.to_ndarray()[0] for resampled in resampler.resample(frame))
        pieces.extend(resampled.to_ndarray()[0] for resampled in resampler.resample(None))
    decoded = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.float32)
    if abs(len(decoded) - samples) > SAMPLE_RATE // 10:
        seconds = f"{samples / SAMPLE_RATE:.2f} s, but {len(decoded) / SAMPLE_RATE:.2f} s can be decoded"
        raise SampleError(f"sound of {seconds}")
    sound = np.zeros(samples, dtype=np.float32)
    sound[: len(decoded)] = decoded[:samples]
    return sound
