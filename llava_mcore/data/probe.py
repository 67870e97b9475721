"""What a medium is, from its headers: the numbers an index holds and a plan is made of. Nothing is decoded.

Pictures are read in pure Python (10 times Pillow's speed); video and audio containers are demultiplexed by PyAV, which counts
frames where a header is silent (WebM) or wrong.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from llava_mcore.data.errors import SampleError

PICTURES = frozenset({"jpg", "jpeg", "png", "webp"})
VIDEOS = frozenset({"mp4", "webm", "mkv"})
AUDIOS = frozenset({"mp3", "wav", "flac"})

# A picture of more pixels than this is a mistake or an attack (Pillow's own limit, where it only warns): 268 MB decoded.
MAX_PIXELS = 89_478_485

_SIGNATURES = [
    (b"\xff\xd8\xff", "JPEG picture"),
    (b"\x89PNG\r\n\x1a\n", "PNG picture"),
    (b"GIF8", "GIF picture"),
    (b"BM", "BMP picture"),
    (b"II*\0", "TIFF picture"),
    (b"MM\0*", "TIFF picture"),
    (b"%PDF", "PDF document"),
    (b"PK\x03\x04", "zip archive"),
    (b"\x1f\x8b", "gzip file"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM file"),
    (b"fLaC", "FLAC file"),
    (b"ID3", "MP3 file"),
    (b"OggS", "Ogg file"),
    (b"<", "text (XML or HTML)"),
    (b"{", "text (JSON)"),
]


@dataclass(frozen=True)
class Probe:
    """Numbers of one medium; zero where they do not apply."""

    width: int = 0  # pixels, as stored: no rotation applied
    height: int = 0
    frames: int = 0  # frames that decoding gives
    fps: float = 0.0  # frames a second on average
    vfr: bool = False  # frames are not equally far apart
    audio_samples: int = 0  # of one channel at 16 kHz; also of a video's sound


@dataclass(frozen=True)
class PictureHeader:
    """``plain``: 8 bits a channel, gray or RGB, no palette, opaque: what every decoder agrees on."""

    format: Literal["JPEG", "PNG", "WEBP"]
    width: int
    height: int
    plain: bool


def looks_like(data: bytes) -> str:
    """What some bytes are, in words, for messages."""
    if not data:
        return "empty"
    if data[4:8] == b"ftyp":
        return "MP4 file"
    if data[:4] == b"RIFF":
        return {b"WEBP": "WebP picture", b"WAVE": "WAV file"}.get(data[8:12], "RIFF file")
    found = next((name for signature, name in _SIGNATURES if data.startswith(signature)), None)
    return found or f"unknown bytes ({data[:8].hex()}...)"


def probe(kind: str, data: bytes) -> Probe:
    """Reads the headers of one medium.

    A picture may be of another picture format than its extension says, a video in another video container: the bytes decide.

    Args:
        kind: extension of the file: jpg, jpeg, png, webp, mp4, webm, mkv, mp3, wav or flac.
        data: the file.

    Raises:
        SampleError: the bytes are no such medium, are cut short where that can be told from headers, hold no frame or sound, or
            are too large to be decoded.
    """
    if not data:
        raise SampleError(f"its .{kind} is empty")
    if kind in PICTURES:
        header = picture_header(data)
        return Probe(width=header.width, height=header.height)
    # PyAV takes 0.1 s to import, which a dataset of pictures need not pay.
    from llava_mcore.data.audio import scan_audio
    from llava_mcore.data.video import scan_video

    if kind in VIDEOS:
        return scan_video(data).probe
    if kind in AUDIOS:
        return Probe(audio_samples=scan_audio(data).samples)
    known = ", ".join(sorted(PICTURES | VIDEOS | AUDIOS))
    raise ValueError(f"unknown kind of medium {kind!r}; known are {known}")


def picture_header(data: bytes) -> PictureHeader:
    """Format and size of a JPEG, PNG or WebP.

    Raises:
        SampleError: it is none of them, ends inside its header, or has more than ``MAX_PIXELS``.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            header = _jpeg(data)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            header = _png(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            header = _webp(data)
        else:
            raise SampleError(f"not a JPEG, PNG or WebP picture: {looks_like(data)}")
    except (struct.error, IndexError) as error:
        raise SampleError(f"picture ends inside its header ({len(data)} bytes)") from error
    check_size("picture", header.width, header.height)
    return header


def check_size(what: str, width: int, height: int) -> None:
    """Raises SampleError for more than ``MAX_PIXELS``, and for none."""
    if width <= 0 or height <= 0:
        raise SampleError(f"{what} of {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise SampleError(f"{what} of {width} x {height} pixels exceeds the limit of {MAX_PIXELS} pixels")


def _jpeg(data: bytes) -> PictureHeader:
    """ITU T.81, annex B: segments up to the frame header (SOFn)."""
    at = 2
    while True:
        while data[at] == 0xFF and data[at + 1] == 0xFF:  # fill bytes
            at += 1
        marker, code = data[at], data[at + 1]
        if marker != 0xFF:
            raise SampleError("picture has a broken JPEG header")
        if code == 0x01 or 0xD0 <= code <= 0xD8:
            at += 2
            continue
        if code in (0xD9, 0xDA):
            raise SampleError("picture has a JPEG header without a size")
        (length,) = struct.unpack_from(">H", data, at + 2)
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            return PictureHeader("JPEG", width, height, bits == 8 and channels in (1, 3) and code in (0xC0, 0xC1, 0xC2))
        at += 2 + length


def _png(data: bytes) -> PictureHeader:
    """PNG specification, chapter 11: IHDR, and whether a tRNS stands before the pixels."""
    if data[12:16] != b"IHDR":
        raise SampleError("picture has a broken PNG header")
    width, height, bits, color = struct.unpack_from(">IIBB", data, 16)
    at, transparent = 33, False
    while (name := data[at + 4 : at + 8]) not in (b"IDAT", b"IEND"):
        (length,) = struct.unpack_from(">I", data, at)
        transparent = transparent or name == b"tRNS"
        at += 12 + length
    return PictureHeader("PNG", width, height, bits == 8 and color in (0, 2) and not transparent)


def _webp(data: bytes) -> PictureHeader:
    """RFC 9649: simple lossy (VP8), simple lossless (VP8L) and extended (VP8X) files."""
    chunk = data[12:16]
    if chunk == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise SampleError("picture has a broken WebP header")
        width, height = struct.unpack_from("<HH", data, 26)
        return PictureHeader("WEBP", width & 0x3FFF, height & 0x3FFF, True)
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return PictureHeader("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, not bits >> 28 & 1)
    if chunk == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        if len(data) < 30:
            raise IndexError
        return PictureHeader("WEBP", width, height, False)
    raise SampleError("picture has a broken WebP header")
