"""On a GPU: nvJPEG and NVDEC give the pictures and frames that the CPU gives, exact by number, close by colour."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from media_material import encode, photo, read_barcode, video  # noqa: E402

from llava_mcore.data.dali_pipelines import PixelSettings, dali_version, nvdec_formats  # noqa: E402
from llava_mcore.data.decode import Decoder, Request  # noqa: E402
from llava_mcore.data.errors import SampleError  # noqa: E402
from llava_mcore.data.video import FrameChoice, scan_video  # noqa: E402

pytestmark = pytest.mark.skipif(dali_version() is None, reason="DALI is not installed: install nvidia-dali-cuda130")

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# In 255ths. nvJPEG's transform and upsampling and NVDEC's colour conversion differ from the CPU's in their last bits.
PICTURE_MEAN, VIDEO_MEAN = 1.0, 4.0
VIDEOS = {
    "h264": ("mp4", "libx264", {}),
    "h264, open groups": ("matroska", "libx264", {"x264-params": "open-gop=1:bframes=3"}),
    "hevc": ("mp4", "libx265", {"x265-params": "log-level=none"}),
    "vp9": ("webm", "libvpx-vp9", {}),
    "av1": ("mp4", "libsvtav1", {"preset": "12"}),
}


def decoded(requests: list[Request], frames: FrameChoice, gpu: int | None) -> tuple[list[np.ndarray], dict[str, int]]:
    """Media in 0..255, and the ways they took."""
    settings = PixelSettings(224, "pad", MEAN, STD)
    with Decoder(settings, frames, backend="python" if gpu is None else "dali", gpu=gpu) as decoder:
        results = decoder.decode(requests)
        assert not any(isinstance(result, SampleError) for result in results), results
        return [(result * 0.5 + 0.5) * 255 for result in results if isinstance(result, np.ndarray)], dict(decoder.taken)


def test_pictures() -> None:
    sizes = [(640, 480), (480, 641), (1280, 720), (333, 251)] * 12
    requests = [Request("jpg", encode(photo(w, h, n), "JPEG", quality=90)) for n, (w, h) in enumerate(sizes)]
    ours, taken = decoded(requests, FrameChoice(), 0)
    theirs, _ = decoded(requests, FrameChoice(), None)
    assert taken == {"picture by dali": len(requests)}
    assert max(np.abs(a - b).mean() for a, b in zip(ours, theirs, strict=True)) < PICTURE_MEAN


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_exact(name: str) -> None:
    container, codec, options = VIDEOS[name]
    data = video(container, codec, frames=120, width=384, height=256, gop=30, options=options)
    scan = scan_video(data)
    if (scan.codec, scan.pixel_format) not in nvdec_formats(torch.cuda.get_device_capability(0)):
        pytest.skip(f"this GPU does not decode {scan.codec}")
    for choice in (FrameChoice("uniform", 8), FrameChoice("segments", 16), FrameChoice("uniform", 120)):
        requests = [Request("mp4", data, key) for key in range(3)]
        ours, taken = decoded(requests, choice, 0)
        theirs, _ = decoded(requests, choice, None)
        assert taken == {"video by dali": len(requests)}
        for mine, other in zip(ours, theirs, strict=True):
            rows = slice(224 // 6, -(224 // 6))  # without what fills up to a square
            numbers = [[read_barcode(frame.transpose(1, 2, 0)[rows]) for frame in clip] for clip in (mine, other)]
            assert numbers[0] == numbers[1]
            assert np.abs(mine - other).mean() < VIDEO_MEAN
