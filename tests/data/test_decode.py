"""Both backends of the decoder: against transformers, against each other, alone and in company, among bad ones."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
from media_material import encode, photo, read_barcode, sound, video
from PIL import Image, ImageDraw

from llava_mcore.data import decode
from llava_mcore.data.dali_pipelines import Pipelines, PixelSettings, dali_version, nvdec_formats
from llava_mcore.data.decode import Decoder, Request
from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.image import open_rgb, preprocess, resize_exactly, resize_fast
from llava_mcore.data.video import FrameChoice, decode_frames
from llava_mcore.geometry import Geometry
from llava_mcore.settings.schema import DataSettings

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE = 224
SIZES = [(640, 480), (480, 641), (501, 333), (1280, 720), (300, 300), (224, 224), (97, 480), (223, 225)]
MODES: list[Literal["pad", "square"]] = ["pad", "square"]
needs_dali = pytest.mark.skipif(dali_version() is None, reason="DALI is not installed")
BACKENDS = [pytest.param("dali", marks=needs_dali), "python"]


def pixels(mode: Literal["pad", "square"] = "square", side: int = SIDE) -> PixelSettings:
    return PixelSettings(side, mode, MEAN, STD)


def levels(normalised: np.ndarray) -> np.ndarray:
    """From what a tower sees back to 0..255."""
    shape = (3, 1, 1)
    return (normalised * np.array(STD).reshape(shape) + np.array(MEAN).reshape(shape)) * 255


def numbers(clip: Any) -> list[int]:
    """The barcodes of padded frames of 192 x 128."""
    return [read_barcode(levels(frame).transpose(1, 2, 0)[SIDE // 6 : -SIDE // 6]) for frame in clip]


MEDIA: dict[str, Request] = {
    **{f"jpeg {w}x{h}": Request("jpg", encode(photo(w, h, w), "JPEG", quality=90)) for w, h in SIZES},
    "progressive": Request("jpg", encode(photo(333, 251), "JPEG", progressive=True)),
    "gray": Request("jpeg", encode(photo(333, 251).convert("L"), "JPEG")),
    "png": Request("png", encode(photo(333, 251), "PNG")),
    "webp": Request("webp", encode(photo(333, 251), "WEBP")),
    "cmyk": Request("jpg", encode(photo(333, 251).convert("CMYK"), "JPEG")),
    "transparent": Request("png", encode(photo(333, 251).convert("RGBA"), "PNG")),
    "palette": Request("png", encode(photo(333, 251).convert("P"), "PNG")),
    "png named jpg": Request("jpg", encode(photo(99, 251), "PNG")),
    "h264": Request("mp4", video(frames=40)),
    "vp9": Request("webm", video("webm", "libvpx-vp9", frames=40)),
    "vp8": Request("mkv", video("matroska", "libvpx", frames=5)),
    "wav": Request("wav", sound(seconds=0.5)),
    "video's sound": Request("mp3", video(frames=10, sound_seconds=0.5)),
}
BAD = {
    "JPEG cut in its pixels": (Request("jpg", MEDIA["jpeg 640x480"].data[:9000]), "corrupt or truncated"),
    "PNG cut in its pixels": (Request("png", MEDIA["png"].data[:9000]), "corrupt or truncated"),
    "empty": (Request("png", b""), "its .png is empty|not a JPEG"),
    "no picture": (Request("jpg", b"hello"), "not a JPEG"),
    "bomb": (Request("png", encode(Image.new("1", (20_000, 20_000)), "PNG")), "exceeds the limit"),
    "no moov": (Request("mp4", MEDIA["h264"].data[:4000]), "no moov"),
    "webm cut": (Request("webm", MEDIA["vp9"].data[:3000]), "cut short"),
    "video of no size": (Request("mp4", video(frames=3).replace(b"avc1", b"zzzz")), "unknown codec|0 x 0|cannot be decoded"),
    "no sound": (Request("wav", MEDIA["h264"].data), "holds no sound"),
}


@pytest.fixture(scope="module", params=BACKENDS)
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    with Decoder(pixels(), FrameChoice("uniform", 8), backend=request.param) as made:
        yield made


@pytest.fixture(scope="module")
def together(decoder: Decoder) -> dict[str, np.ndarray]:
    results = decoder.decode(list(MEDIA.values()))
    assert not any(isinstance(result, SampleError) for result in results), results
    return {name: result for name, result in zip(MEDIA, results, strict=True) if isinstance(result, np.ndarray)}


def test_shapes(together: dict[str, np.ndarray]) -> None:
    for name, result in together.items():
        assert result.dtype == np.float32 and np.isfinite(result).all()
        kind = MEDIA[name].kind
        frames = {"h264": 8, "vp9": 8, "vp8": 5}.get(name)
        assert result.shape == ((8000,) if kind in ("wav", "mp3") else (frames, 3, SIDE, SIDE) if frames else (3, SIDE, SIDE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_are_exact(backend: Any) -> None:
    """Every way a video can take gives the frames that were asked for, by the number in each."""
    with Decoder(pixels("pad"), FrameChoice("uniform", 8), backend=backend) as decoder:
        h264, vp9, vp8 = decoder.decode([MEDIA[name] for name in ("h264", "vp9", "vp8")])
    assert numbers(h264) == numbers(vp9) == [2, 7, 12, 17, 22, 27, 32, 37]
    assert numbers(vp8) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_are_those_of_transformers(backend: Any, mode: Literal["pad", "square"]) -> None:
    """To the bit with Pillow's resize, within 2/255 with torch's."""
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    size = {"shortest_edge": SIDE}
    processor = clip.CLIPImageProcessorPil(size=size, crop_size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD)
    names = [name for name, request in MEDIA.items() if request.kind in ("jpg", "jpeg", "png", "webp")]
    with Decoder(pixels(mode), backend=backend) as decoder:
        ours = decoder.decode([MEDIA[name] for name in names])
    means = []
    for name, result in zip(names, ours, strict=True):
        image = open_rgb(MEDIA[name].data)
        if mode == "pad":
            square = Image.new("RGB", (max(image.size),) * 2, (122, 116, 104))
            square.paste(image, tuple((square.width - side) // 2 for side in image.size))
            image = square
        theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
        assert isinstance(result, np.ndarray)
        difference = np.abs(levels(result) - levels(theirs))
        assert difference.max() < (2.001 if backend == "dali" else 1e-9), name
        means.append(float(difference.mean()))
    assert np.mean(means) < 0.02


def page() -> Image.Image:
    """Letters of full contrast."""
    image = Image.new("RGB", (640, 480), "white")
    for top in range(0, 480, 11):
        ImageDraw.Draw(image).text((3, top), "The quick brown fox jumps over the lazy dog. " * 3, fill="black")
    return image


@needs_dali
@pytest.mark.parametrize("mode", MODES)
def test_picture_pipeline(mode: Literal["pad", "square"]) -> None:
    """The graph that a GPU runs with nvJPEG, here on the CPU: within 8/255 of Pillow, at hard edges 30/255, as documented."""
    images = {name: open_rgb(MEDIA[name].data) for name in MEDIA if name.startswith(("jpeg", "progressive", "gray", "png"))}
    images["page"] = page()
    data = [encode(image, "PNG") for image in images.values()]
    results = Pipelines(pixels(mode), 1, len(images)).pictures(data, [image.size for image in images.values()])
    means = []
    for (name, image), result in zip(images.items(), results, strict=True):
        difference = np.abs(levels(result) - levels(preprocess(image, mode, SIDE, MEAN, STD)))
        assert difference.max() < (30 if name == "page" else 8), name
        means.append(float(difference.mean()))
    assert np.mean(means[:-1]) < 0.2 and means[-1] < 1


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 300), (300, 1), (2, 3), (335, 337), (336, 336), (4000, 30), (1500, 2500), (400, 1600), (400, 463), (400, 465)],
)
@pytest.mark.parametrize("mode", ["pad", "square", "stretch"])
def test_fast_resize(size: tuple[int, int], mode: str) -> None:
    """At most two of 255 steps from Pillow's, at letters and noise, from any size."""
    if mode == "square" and max(size) > 100 * min(size):
        pytest.skip("too narrow for this mode")
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for image in (page().resize(size, Image.Resampling.NEAREST), Image.fromarray(noise)):
        exact, fast = (preprocess(image, mode, 336, MEAN, STD, how) for how in (resize_exactly, resize_fast))
        assert np.abs(levels(exact) - levels(fast)).max() < 2.001
        assert np.array_equal(fast, preprocess(np.array(image), mode, 336, MEAN, STD, resize_fast))


def test_alone_or_in_company(decoder: Decoder, together: dict[str, np.ndarray]) -> None:
    """The same bits alone, in another order, and beside bad media."""
    for name, request in MEDIA.items():
        (alone,) = decoder.decode([request])
        assert np.array_equal(alone, together[name]), name
    shuffled = [*MEDIA, *BAD]
    random.Random(0).shuffle(shuffled)
    results = decoder.decode([MEDIA[name] if name in MEDIA else BAD[name][0] for name in shuffled])
    for name, result in zip(shuffled, results, strict=True):
        if name in MEDIA:
            assert np.array_equal(result, together[name]), name
        else:
            assert isinstance(result, SampleError), name


@pytest.mark.parametrize("name", BAD)
def test_bad_media(decoder: Decoder, name: str) -> None:
    request, reason = BAD[name]
    before = MEDIA["jpeg 640x480"]
    good, bad, again = decoder.decode([before, request, before])
    assert isinstance(bad, SampleError)
    assert re.search(reason, bad.reason), bad.reason
    assert np.array_equal(good, again)


def test_damage_of_any_kind(decoder: Decoder) -> None:
    """Cut, altered and blanked files give pixels or a SampleError: no other exception, no hang, no crash."""
    rng = random.Random(3)
    for _ in range(25):
        damaged = []
        for request in MEDIA.values():
            data = bytearray(request.data)
            begin = rng.randrange(len(data))
            how = rng.randrange(3)
            if how == 0:
                del data[begin:]
            elif how == 1:
                data[begin : begin + 2000] = bytes(len(data[begin : begin + 2000]))
            else:
                for _ in range(10):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            damaged.append(Request(request.kind, bytes(data)))
        for result in decoder.decode(damaged):
            assert isinstance(result, SampleError) or np.isfinite(result).all()


@needs_dali
def test_video_pipeline() -> None:
    """The graph that a GPU runs with NVDEC, here with DALI's own decoder: frames exact, sizes and layout as everywhere."""
    requests = [MEDIA["vp9"], MEDIA["vp8"]]
    chosen = [np.array([2, 7, 39]), np.array([4, 0, 0, 1])]
    clips = Pipelines(pixels("pad"), 1, 2).videos([request.data for request in requests], [(192, 128)] * 2, chosen)
    for clip, frames in zip(clips, chosen, strict=True):
        assert clip.shape == (len(frames), 3, SIDE, SIDE) and numbers(clip) == frames.tolist()
    with pytest.raises(RuntimeError):  # not a black frame
        Pipelines(pixels("square"), 1, 2).videos([MEDIA["vp8"].data], [(192, 128)], [np.array([5])])


@needs_dali
def test_ways_taken() -> None:
    with Decoder(pixels(), backend="dali") as decoder:
        decoder.decode(list(MEDIA.values()))
        plain = len(SIZES) + 5
        assert decoder.taken == {
            "picture by dali": plain,
            "picture by python": 3,
            "video by python": 3,
            "sound by python": 2,
        }
        assert "DALI" in decoder.describe()
    with Decoder(pixels(), backend="python") as decoder:
        decoder.decode(list(MEDIA.values()))
        assert not any("dali" in way for way in decoder.taken) and "DALI" not in decoder.describe()


@needs_dali
def test_without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as with it."""
    with Decoder(pixels(), backend="auto") as decoder:
        with_dali = dict(zip(MEDIA, decoder.decode(list(MEDIA.values())), strict=True))
        assert decoder.taken["picture by dali"]
    monkeypatch.setattr(decode, "dali_version", lambda: None)
    with Decoder(pixels(), backend="auto") as decoder:
        results = decoder.decode(list(MEDIA.values()))
        assert not any("dali" in way for way in decoder.taken)
    for name, result in zip(MEDIA, results, strict=True):
        assert np.array_equal(result, with_dali[name]), name
    with pytest.raises(DatasetError, match="install nvidia-dali-cuda130, or set data.decoder=python"):
        Decoder(pixels(), backend="dali")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match="decode_on=gpu needs DALI"):
        Decoder(pixels(), backend="python", gpu=0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(decode, "dali_version", lambda: "2.4.0")
    with pytest.raises(DatasetError, match="no CUDA device: set data.decode_on=cpu"):
        Decoder.from_settings(DataSettings(decode_on="gpu"), Geometry(28, 2))


def test_settings_reach_the_decoder() -> None:
    data = DataSettings(video_frames=3, video_frames_by="fps", video_fps=10.0, image_mode="pad", decoder="python")
    with Decoder.from_settings(data, Geometry(56, 4)) as decoder:
        (result,) = decoder.decode([MEDIA["h264"]])
    frames = decode_frames(MEDIA["h264"].data, [0, 19, 39])  # more than 3 at 10 a second: from the first to the last
    assert isinstance(result, np.ndarray)
    for ours, frame in zip(result, frames, strict=True):
        assert np.array_equal(ours, preprocess(Image.fromarray(frame), "pad", 56, MEAN, STD))


def test_key_chooses_frames() -> None:
    with Decoder(pixels("pad"), FrameChoice("segments", 4), backend="python") as decoder:
        request = MEDIA["h264"]
        clips = decoder.decode([Request("mp4", request.data, key) for key in (1, 2, 1)])
    assert np.array_equal(clips[0], clips[2]) and not np.array_equal(clips[0], clips[1])


def test_strip_fails_alike_in_both() -> None:
    strip = Request("png", encode(Image.new("RGB", (1, 60_000)), "PNG"))
    reasons = []
    for backend in ("dali", "python") if dali_version() else ("python",):
        with Decoder(pixels("square", 336), backend=backend) as decoder:
            (result,) = decoder.decode([strip])
            assert isinstance(result, SampleError)
            reasons.append(result.reason)
    assert len(set(reasons)) == 1 and "data.image_mode=pad" in reasons[0]


def test_unknown_kind_is_the_callers_mistake(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="unknown kind of medium 'bmp'"):
        decoder.decode([Request("bmp", b"BM")])


def test_nvdec_formats() -> None:
    assert ("av1", "yuv420p") not in nvdec_formats((8, 0)) | nvdec_formats((9, 0)) and ("av1", "yuv420p") in nvdec_formats((8, 9))
    assert ("h264", "yuv420p10le") not in nvdec_formats((10, 0)) and ("h264", "yuv420p") in nvdec_formats((7, 0))
