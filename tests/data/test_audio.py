"""A tone comes out as the tone it was, of the length the index says."""

from __future__ import annotations

import numpy as np
import pytest
from media_material import sine, sound, video

from llava_mcore.data.audio import SAMPLE_RATE, decode_sound, scan_audio
from llava_mcore.data.errors import SampleError


@pytest.mark.parametrize("container", ["wav", "flac", "mp3"])
@pytest.mark.parametrize("rate", [16_000, 22_050, 48_000])
@pytest.mark.parametrize("stereo", [False, True])
def test_tone(container: str, rate: int, stereo: bool) -> None:
    data = sound(container, seconds=1.5, rate=rate, stereo=stereo)
    heard = decode_sound(data)
    assert heard.dtype == np.float32 and len(heard) == scan_audio(data).samples == 1.5 * SAMPLE_RATE
    inner = slice(800, -800)  # resamplers and codecs ring at the ends
    error = np.abs(heard - sine(1.5, SAMPLE_RATE))[inner].max()
    assert error < (0.05 if container == "mp3" else 1e-4)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_sound_of_a_video(container: str, codec: str) -> None:
    data = video(container, codec, frames=30, sound_seconds=1.0)
    heard = decode_sound(data)
    assert len(heard) == scan_audio(data).samples == pytest.approx(SAMPLE_RATE, abs=16)
    spectrum = np.abs(np.fft.rfft(heard[:SAMPLE_RATE]))
    assert int(spectrum.argmax()) == 440


def test_damaged_sound() -> None:
    data = bytearray(sound("flac", seconds=3))
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    with pytest.raises(SampleError, match="sound"):
        decode_sound(bytes(data))
