"""Exactly the frames that were asked for, by the number that each carries; and which frames are asked for."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_material import read_barcode, video

from llava_mcore.data.errors import SampleError
from llava_mcore.data.video import FrameChoice, decode_frames, scan_video

FRAMES = 72
CODECS = {
    "h264": ("mp4", "libx264", {}),
    "h264, references far apart": ("mp4", "libx264", {"x264-params": "bframes=5:b-pyramid=normal:ref=6"}),
    "h264, open groups": ("matroska", "libx264", {"x264-params": "open-gop=1:bframes=3"}),
    "h264, no keyframes": ("mp4", "libx264", {"x264-params": "intra-refresh=1"}),
    "hevc, open groups": ("mp4", "libx265", {"x265-params": "log-level=none:open-gop=1"}),
    "vp8, hidden frames": ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}),
    "vp9": ("webm", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"}),
    "av1": ("mp4", "libsvtav1", {"preset": "12"}),
    "mpeg4": ("mp4", "mpeg4", {"bf": "2"}),
    "mjpeg": ("mp4", "mjpeg", {}),
}


@pytest.mark.parametrize("name", CODECS)
def test_frames_are_exact(name: str) -> None:
    container, codec, options = CODECS[name]
    data = video(container, codec, frames=FRAMES, gop=12, options=options)
    assert len(scan_video(data).pts) == FRAMES
    for wanted in ([0], [FRAMES - 1], [11, 12, 13], [5, 40, 41, 70], [60, 3, 60], list(range(FRAMES))):
        assert [read_barcode(frame) for frame in decode_frames(data, wanted)] == wanted


def test_frames_are_those_of_a_sequential_read() -> None:
    """To the bit: leaving frames out changes nothing in the others."""
    data = video(frames=FRAMES, gop=30)
    with av.open(io.BytesIO(data)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for number, frame in zip([7, 29, 44, 66], decode_frames(data, [7, 29, 44, 66]), strict=True):
        assert np.array_equal(frame, every[number])


def test_variable_frame_rate() -> None:
    times = np.cumsum([0] + [20, 90, 33, 200] * 10).tolist()
    data = video("mp4", times=times, frames=41)
    assert [read_barcode(frame) for frame in decode_frames(data, [1, 17, 40])] == [1, 17, 40]


@pytest.mark.parametrize(("frames", "reason"), [([60], "no frame 60: it has 60"), ([3, -1], "no frame -1")])
def test_frames_that_are_not_there(frames: list[int], reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        decode_frames(video(), frames)


def test_damaged_packets() -> None:
    """Bytes overwritten in the middle: frames before them are there, the rest is concealed or named."""
    data = bytearray(video("mp4", "libx264", frames=60, gop=60, options={"x264-params": "slices=1"}))
    middle = len(data) // 2
    data[middle : middle + 600] = bytes(600)
    assert [read_barcode(frame) for frame in decode_frames(bytes(data), [0, 1])] == [0, 1]
    try:
        assert len(decode_frames(bytes(data), list(range(60)))) == 60
    except SampleError as error:
        assert "cannot be decoded" in error.reason


# ---- choice ----


def regular(frames: int, fps: float = 30.0) -> np.ndarray:
    return np.arange(frames) / fps


def test_documented_choices() -> None:
    assert FrameChoice("uniform", 8).choose(regular(240), 30, 0).tolist() == [15, 45, 75, 105, 135, 165, 195, 225]
    assert FrameChoice("uniform", 3).choose(regular(10), 30, 0).tolist() == [1, 5, 8]
    # LLaVA-NeXT: every round(average rate / fps)-th frame; more than the bound: linspace from the first to the last.
    assert FrameChoice("fps", 64, 1.0).choose(regular(100, 29.97), 29.97, 0).tolist() == [0, 30, 60, 90]
    expected = np.linspace(0, 99, 4, dtype=int).tolist()
    assert FrameChoice("fps", 4, 10.0).choose(regular(100), 30, 0).tolist() == expected
    # One second at 30 frames a second, then three at 1: most frames lie in the first quarter of the time.
    times = np.concatenate([np.arange(30) / 30, [1.0, 2.0, 3.0]])
    assert FrameChoice("uniform", 4).choose(times, 33 / 4, 0).tolist() == [4, 12, 20, 28]
    assert FrameChoice("time", 4).choose(times, 33 / 4, 0).tolist() == [11, 30, 30, 31]


@settings(max_examples=200, deadline=None)
@given(
    policy=st.sampled_from(["uniform", "segments", "time", "fps"]),
    most=st.integers(1, 40),
    frames=st.integers(1, 500),
    fps=st.floats(0.5, 120),
    rate=st.floats(0.1, 60),
    key=st.integers(0, 2**63),
    steps=st.randoms(use_true_random=False),
)
def test_any_choice_is_as_planned(policy, most, frames, fps, rate, key, steps) -> None:
    choice = FrameChoice(policy, most, rate)
    times = np.cumsum([0.0] + [steps.uniform(0.001, 1) for _ in range(frames - 1)])
    chosen = choice.choose(times, fps, key)
    assert len(chosen) == choice.count(frames, fps) <= most
    assert chosen.dtype == np.int64 and (np.diff(chosen) >= 0).all() and 0 <= chosen[0] and chosen[-1] < frames
    assert chosen.tolist() == choice.choose(times, fps, key).tolist()
    if policy == "segments":
        assert (chosen * len(chosen) // frames <= np.arange(len(chosen))).all()


def test_jitter_depends_on_its_key() -> None:
    choice = FrameChoice("segments", 8)
    drawn = {tuple(choice.choose(regular(240), 30, key).tolist()) for key in range(50)}
    assert len(drawn) == 50
    parts = np.array(sorted(drawn))
    assert (parts // 30 == np.arange(8)).all()  # each from its own eighth
