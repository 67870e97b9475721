"""Sound: decoded to 16 kHz, one channel, by PyAV."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
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
            yield container
    except SampleError:
        raise
    except (FFmpegError, ValueError, EOFError) as error:
        raise SampleError(f"not a readable sound ({looks_like(data)}: {error})") from error


def sound_length(duration: int, time_base: Fraction) -> int:
    """Samples at ``SAMPLE_RATE`` of a duration in ticks of ``time_base`` seconds."""
    return round(duration * time_base * SAMPLE_RATE)


def scan_audio(data: bytes) -> AudioScan:
    """Length of a sound, from its packets, without decoding any.

    Raises:
        SampleError: no MP3, WAV, FLAC (or video with sound), or no samples in it.
    """
    with open_audio(data) as container:
        stream = container.streams.audio[0]
        length = sum(packet.duration or 0 for packet in container.demux(stream) if packet.size and not packet.is_discard)
        samples = sound_length(length, stream.time_base)
        if not samples:
            raise SampleError("sound has no samples")
        promised = sound_length(stream.duration or 0, stream.time_base)
        # FFmpeg shortens a WAV's length to what is there; its own header tells (all ones: written as a stream).
        riff = int.from_bytes(data[4:8], "little") if data[:4] == b"RIFF" else 0
        if promised > samples + SAMPLE_RATE or len(data) < riff + 8 < 1 << 32:
            raise SampleError(f"sound is cut short: {samples / SAMPLE_RATE:.2f} s are there")
        return AudioScan(stream.codec_context.name, stream.codec_context.sample_rate, stream.codec_context.channels, samples)
