"""What headers say, and every kind of file that cannot be used."""

from __future__ import annotations

import io

import numpy as np
import pytest
from media_material import encode, photo, silent_wav, sound, video
from PIL import Image

from llava_mcore.data.errors import SampleError
from llava_mcore.data.probe import Probe, picture_header, probe
from llava_mcore.data.video import scan_video

VIDEOS = [
    ("mp4", "libx264", {}),
    ("matroska", "libx264", {"x264-params": "open-gop=1"}),
    ("mp4", "libx265", {"x265-params": "log-level=none"}),
    ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}),
    ("webm", "libvpx-vp9", {"deadline": "realtime"}),
    ("mp4", "mpeg4", {"bf": "2"}),
    ("mp4", "mjpeg", {}),
]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16", "1"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_picture_headers_agree_with_pillow(mode: str, format: str) -> None:
    image = Image.new("I;16", (37, 21), 999) if mode == "I;16" else photo(37, 21).convert(mode)
    try:
        data = encode(image, format)
    except (OSError, KeyError):
        return  # the format has no such mode
    header = picture_header(data)
    assert (header.format, header.width, header.height) == (format, 37, 21)
    assert probe("jpg", data) == Probe(width=37, height=21)
    stored = Image.open(io.BytesIO(data)).mode
    assert header.plain == (stored in ("RGB", "L") and not (format == "PNG" and mode == "1"))


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"subsampling": 0}, {"comment": b"x" * 60_000}, {"exif": b"Exif\0\0" + b"x" * 900}]
)
def test_jpeg_variants(options: dict[str, object]) -> None:
    assert probe("jpeg", encode(photo(301, 77), "JPEG", **options)) == Probe(width=301, height=77)


@pytest.mark.parametrize("options", [{"lossless": True}, {"exif": b"Exif\0\0xx"}, {"quality": 30}])
def test_webp_variants(options: dict[str, object]) -> None:
    assert probe("webp", encode(photo(301, 77), "WEBP", **options)) == Probe(width=301, height=77)


@pytest.mark.parametrize(("container", "codec", "options"), VIDEOS)
def test_frames_of_a_video(container: str, codec: str, options: dict[str, str]) -> None:
    found = probe("mp4", video(container, codec, frames=50, options=options))
    assert (found.width, found.height, found.frames, found.vfr, found.audio_samples) == (192, 128, 50, False, 0)
    assert found.fps == pytest.approx(30, rel=1e-3)  # Matroska counts in milliseconds


def test_variable_frame_rate_and_sound() -> None:
    times = np.cumsum([0] + [20, 50, 33] * 10).tolist()
    found = probe("webm", video("webm", "libvpx-vp9", frames=31, times=times))
    assert found.vfr and found.frames == 31 and found.fps == pytest.approx(30 / 1.03, rel=1e-3)
    scan = scan_video(video("webm", "libvpx-vp9", frames=31, times=times))
    np.testing.assert_allclose(scan.times, np.array(times) / 1000, atol=1e-9)
    assert probe("mp4", video(frames=20, sound_seconds=2.0)).audio_samples == 32_000


@pytest.mark.parametrize("container", ["wav", "flac", "mp3"])
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_sound_lengths(container: str, rate: int) -> None:
    assert probe(container, sound(container, seconds=2.5, rate=rate, stereo=True)).audio_samples == 40_000


H264, VP9 = video(), video("webm", "libvpx-vp9")
FAST = video(faststart=True)
JPEG, PNG = encode(photo(300, 200), "JPEG"), encode(photo(300, 200), "PNG")
WAV, FLAC = sound(seconds=3), sound("flac", seconds=3)

BAD = {
    "empty picture": ("jpg", b"", "its .jpg is empty"),
    "empty video": ("mp4", b"", "its .mp4 is empty"),
    "empty sound": ("wav", b"", "its .wav is empty"),
    "text as picture": ("jpg", b"<html>404</html>", "not a JPEG, PNG or WebP picture: text"),
    "gif as picture": ("png", encode(photo(20, 20), "GIF"), "GIF picture"),
    "video as picture": ("jpg", H264, "MP4 file"),
    "picture as video": ("mp4", JPEG, "not a video: JPEG picture"),
    "sound as video": ("mp4", WAV, "not a video: WAV file"),
    "video without sound as sound": ("mp3", H264, "holds no sound: MP4 file"),
    "picture as sound": ("flac", PNG, "holds no sound: PNG picture"),
    "zeros as picture": ("webp", bytes(5000), "unknown bytes"),
    "zeros as video": ("webm", bytes(5000), "not a readable video"),
    "zeros as sound": ("mp3", bytes(50), "not a readable sound"),
    "JPEG cut in its header": ("jpg", JPEG[:100], "ends inside its header"),
    "PNG cut in its header": ("png", PNG[:30], "ends inside its header"),
    "mp4 without moov": ("mp4", H264[: len(H264) // 2], "no moov atom"),
    "mp4 cut behind its moov": ("mp4", FAST[: len(FAST) * 2 // 3], "cut short: [0-9]+ frames .* of 60 frames"),
    "webm cut": ("webm", VP9[: len(VP9) // 2], "cut short"),
    "wav without samples": ("wav", silent_wav(), "no samples"),
    "wav cut": ("wav", WAV[: len(WAV) // 2], "cut short: 1.50 s"),
    "flac cut": ("flac", FLAC[: len(FLAC) // 2], "cut short"),
    "bomb": ("png", encode(Image.new("1", (20_000, 20_000)), "PNG"), "20000 x 20000 pixels exceeds"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_from_their_headers(name: str) -> None:
    kind, data, reason = BAD[name]
    with pytest.raises(SampleError, match=reason):
        probe(kind, data)


def test_a_wrong_extension_among_pictures_is_no_error() -> None:
    assert probe("jpg", PNG) == probe("png", JPEG) == Probe(width=300, height=200)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="'bmp'; known are flac, jpeg, jpg"):
        probe("bmp", b"BM")


@pytest.mark.parametrize("share", np.linspace(0, 1, 40).tolist())
def test_no_cut_breaks_the_probe(share: float) -> None:
    """Every cut gives a result or a SampleError, nothing else."""
    for kind, data in (("jpg", JPEG[:2000]), ("png", PNG[:100]), ("mp4", FAST), ("webm", VP9), ("flac", FLAC)):
        try:
            probe(kind, data[: int(share * len(data))])
        except SampleError as error:
            assert error.reason
