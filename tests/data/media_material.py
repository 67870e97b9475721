"""All media of the tests, made by Pillow and PyAV: pictures, videos whose frames carry their number as a barcode, sounds."""

from __future__ import annotations

import io
import tempfile
import wave
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageFilter

SEGMENTS = 12  # bits of the barcode


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A photo-like RGB picture: smooth colours, edges as sharp as a lens makes them, and the noise of a sensor."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(x * rng.uniform(0.01, 0.2) + y * rng.uniform(0.01, 0.2) + rng.uniform(0, 6)) for _ in range(3)]
    pixels = 128 + 80 * np.stack(waves, axis=-1)
    for _ in range(6):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        pixels[top : top + height // 5 + 1, left : left + width // 5 + 1] = rng.uniform(0, 255, 3)
    seen = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8))
    return Image.fromarray(np.clip(np.asarray(seen) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    """A picture as bytes of a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def barcode(number: int, width: int, height: int) -> np.ndarray:
    """A frame that carries its number: bit b is black or white in the b-th of ``SEGMENTS`` columns; uint8 [height, width, 3]."""
    frame = np.empty((height, width, 3), dtype=np.uint8)
    edges = np.linspace(0, width, SEGMENTS + 1).astype(int)
    for bit, (left, right) in enumerate(zip(edges, edges[1:], strict=False)):
        frame[:, left:right] = 235 if number >> bit & 1 else 20
    frame[height // 2 :, :, 1] = (np.arange(width) * 3 + number * 7) % 200 + 20  # something that moves
    return frame


def read_barcode(frame: np.ndarray) -> int:
    """The number of a decoded frame [H, W, 3] of any size and of values from 0 to 255."""
    height, width = frame.shape[:2]
    edges = np.linspace(0, width, SEGMENTS + 1)
    middle = [int((left + right) / 2) for left, right in zip(edges, edges[1:], strict=False)]
    bits = frame[: max(1, height // 3), middle, 0].mean(axis=0) > 128
    return int(sum(1 << bit for bit, on in enumerate(bits) if on))


def video(
    container: str = "mp4",
    codec: str = "libx264",
    *,
    frames: int = 60,
    width: int = 192,
    height: int = 128,
    rate: int = 30,
    gop: int = 12,
    times: Sequence[int] | None = None,
    sound_seconds: float = 0.0,
    faststart: bool = False,
    options: dict[str, str] | None = None,
) -> bytes:
    """A video of barcode frames.

    Args:
        container: mp4, webm or matroska.
        codec: libx264, libx265, libvpx, libvpx-vp9, libsvtav1, mpeg4, mjpeg.
        times: when each frame is shown, in 1/1000 s, ascending; equally spaced by default.
        sound_seconds: length of a sine tone beside it.
        faststart: the moov atom of an mp4 comes first.
    """
    with tempfile.NamedTemporaryFile() as file:  # FFmpeg opens the file a second time to move an atom to its front
        flags = {"movflags": "+faststart"} if faststart else {}
        with av.open(file.name, "w", format=container, options=flags) as output:
            _encode_video(output, codec, frames, (width, height), rate, gop, times, options or {}, sound_seconds)
        return file.read()


def _encode_video(
    output: av.container.OutputContainer,
    codec: str,
    frames: int,
    size: tuple[int, int],
    rate: int,
    gop: int,
    times: Sequence[int] | None,
    options: dict[str, str],
    sound_seconds: float,
) -> None:
    stream = output.add_stream(codec, rate=rate, options=options)
    width, height = stream.width, stream.height = size
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    stream.codec_context.gop_size = gop
    stream.codec_context.thread_count = 1
    if times is not None:
        stream.codec_context.time_base = Fraction(1, 1000)
    tone = output.add_stream("libopus" if output.format.name == "webm" else "aac", rate=48000) if sound_seconds else None
    for number in range(frames):
        frame = av.VideoFrame.from_ndarray(barcode(number, width, height), format="rgb24")
        frame.pts = number if times is None else times[number]
        frame.time_base = Fraction(1, rate) if times is None else Fraction(1, 1000)
        output.mux(stream.encode(frame))
    output.mux(stream.encode())
    if tone is not None:
        _encode_sound(output, tone, sine(sound_seconds, 48000), 48000)


def sine(seconds: float, rate: int, frequency: float = 440.0) -> np.ndarray:
    """A tone, float32 [samples] of amplitude 0.5."""
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def _encode_sound(output: av.container.OutputContainer, stream: av.AudioStream, samples: np.ndarray, rate: int) -> None:
    resampler = av.AudioResampler(format=stream.format, layout=stream.layout, rate=rate)
    for first in range(0, len(samples), 4096):
        frame = av.AudioFrame.from_ndarray(samples[None, first : first + 4096], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, first, Fraction(1, rate)
        for resampled in resampler.resample(frame):
            output.mux(stream.encode(resampled))
    for resampled in resampler.resample(None):
        output.mux(stream.encode(resampled))
    output.mux(stream.encode())


def sound(container: str = "wav", *, seconds: float = 1.0, rate: int = 44100, stereo: bool = False) -> bytes:
    """A sine tone as wav, flac or mp3."""
    codec = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame"}[container]
    with tempfile.NamedTemporaryFile() as file:  # its length is written into the header at the end
        with av.open(file.name, "w", format=container) as output:
            stream = output.add_stream(codec, rate=rate, layout="stereo" if stereo else "mono")
            _encode_sound(output, stream, sine(seconds, rate), rate)
        return file.read()


def silent_wav() -> bytes:
    """A WAV of no samples at all."""
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setnchannels(1)
        output.setsampwidth(2)
        output.setframerate(16000)
    return file.getvalue()
