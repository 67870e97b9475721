"""The decoder of media: bytes in, what a tower sees out. It holds no state, so order and resuming are no business of its.

Two backends. ``python`` decodes pictures with Pillow and videos with PyAV, and gives the very numbers of transformers' image
processor. ``dali`` gives what DALI can decode to pipelines of DALI, fed with chunks of requests, and resizes fast: within 2/255
of those numbers on a CPU. ``auto`` is ``dali`` that does without DALI where it is not installed: on a CPU with the same bits.
Which way a medium takes depends on its own bytes alone (and on whether DALI and a GPU are there), so its pixels are the same to
the bit alone or in any company.

===================================  ==============================  ==============================
medium                               dali on a CPU                   dali on a GPU
===================================  ==============================  ==============================
JPEG, PNG, WebP: plain               DALI                            nvJPEG and DALI
the same, of many tiles              DALI                            Pillow
other pictures                       Pillow                          Pillow
H.264, HEVC, VP8, VP9, AV1           PyAV                            NVDEC, where the chip can
other videos                         PyAV                            PyAV
sounds                               PyAV                            PyAV
===================================  ==============================  ==============================

A plain picture has 8 bits a channel, no palette and no transparency. DALI could decode VP8 and VP9 on a CPU too, but a damaged
file ends the whole process there (2.4.0). What DALI refuses is tried once more the Python way, which then says what is wrong.
"""

from __future__ import annotations

import os
import queue
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from llava_mcore.data.audio import decode_sound
from llava_mcore.data.dali_pipelines import Pipelines, PixelSettings, dali_version, nvdec_formats
from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.image import open_rgb, preprocess, preprocess_tiles, resize_exactly, resize_fast, resized
from llava_mcore.data.probe import AUDIOS, PICTURES, VIDEOS, picture_header
from llava_mcore.data.video import FrameChoice, VideoScan, decode_frames, scan_video
from llava_mcore.geometry import Geometry, Shape
from llava_mcore.settings.schema import DataSettings

Result = np.ndarray | SampleError
# DALI works on a chunk as a whole, and a bad medium in it costs its neighbours a second attempt.
PICTURES_IN_CHUNK, VIDEOS_IN_CHUNK = 8, 2


@dataclass(frozen=True)
class Request:
    """One medium to decode."""

    kind: str  # its extension: jpg, jpeg, png, webp, mp4, webm, mkv, mp3, wav, flac
    data: bytes
    key: int = 0  # of the random choice of a video's frames, where there is one
    tiled: bool = False  # a picture of several tiles


@dataclass
class _Item:
    """A request on its way."""

    request: Request
    medium: Literal["picture", "video", "sound"]
    by_dali: bool = False
    size: tuple[int, int] = (0, 0)  # width, height
    frames: np.ndarray | None = None
    result: Result | None = None


class Decoder:
    """Decodes media on some threads. Use it as a context manager, or close it.

    Args:
        pixels: how pictures and frames are resized and normalised.
        frames: which frames of a video are decoded.
        geometry: how pictures of several tiles are cut; None: there are none.
        backend: ``python``, ``dali``, or ``auto``.
        threads: media, or chunks of them, decoded at a time; each on one core.
        gpu: DALI decodes on this GPU; None: on the CPU.

    Raises:
        DatasetError: what is asked for is not there: DALI, or a GPU.
    """

    def __init__(
        self,
        pixels: PixelSettings,
        frames: FrameChoice | None = None,
        geometry: Geometry | None = None,
        *,
        backend: Literal["auto", "dali", "python"] = "auto",
        threads: int = 2,
        gpu: int | None = None,
    ) -> None:
        self._pixels, self._frames, self._gpu, self._threads = pixels, frames or FrameChoice(), gpu, threads
        self._tiling = geometry
        self._resize = resize_exactly if backend == "python" else resize_fast
        self._version = None if backend == "python" else dali_version()
        if backend == "python" and gpu is not None:
            raise DatasetError("data.decode_on=gpu needs DALI: set data.decoder=auto, or data.decode_on=cpu")
        if self._version is None and (backend == "dali" or gpu is not None):
            raise DatasetError(
                "DALI is not installed: install nvidia-dali-cuda130, or set data.decoder=python and data.decode_on=cpu"
            )
        self._dali_video = frozenset() if gpu is None else nvdec_formats(_capability(gpu))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decoder")
        # On a CPU as many single-threaded pipelines as threads: no chunk waits for the slowest medium of another.
        self._pipelines: queue.SimpleQueue[Pipelines] = queue.SimpleQueue()
        for _ in range(threads if gpu is None else 1):
            self._pipelines.put(Pipelines(pixels, 1 if gpu is None else threads, self._most("picture"), gpu))
        self.taken: Counter[str] = Counter()

    @classmethod
    def from_settings(cls, data: DataSettings, geometry: Geometry) -> Decoder:
        """The decoder that a run's settings ask for; on the GPU of this process, if on one.

        Raises:
            DatasetError: as the class does.
        """
        gpu = int(os.environ.get("LOCAL_RANK", 0)) if data.decode_on == "gpu" else None
        pixels = PixelSettings(geometry.image_size, data.image_mode, data.image_mean, data.image_std)
        frames = FrameChoice(data.video_frames_by, data.video_frames, data.video_fps)
        return cls(pixels, frames, geometry, backend=data.decoder, threads=data.decode_threads, gpu=gpu)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

    def describe(self) -> str:
        """Which decoders are used, for a log."""
        resize = (
            "resized exactly as transformers does" if self._resize is resize_exactly else "resized within 2/255 of transformers"
        )
        if self._version is None:
            return f"pictures by Pillow, video and sound by PyAV, on the CPU; {resize}"
        if self._gpu is None:
            return f"pictures by DALI {self._version} where it can, else by Pillow, video and sound by PyAV, on the CPU; {resize}"
        return (
            f"pictures and video by DALI {self._version} on GPU {self._gpu} where it can, else by Pillow and PyAV; sound by PyAV"
        )

    def decode(self, requests: Sequence[Request]) -> list[Result]:
        """Decodes some media, whatever their kinds.

        Args:
            requests: the media.

        Returns:
            For each, in order: float32 [3, S, S] of a picture, [tiles, 3, S, S] of one of several, [F, 3, S, S] of a video,
            [samples] at 16 kHz of a sound; or the SampleError that says why there is none, which touches none of the others.
            ``taken`` counts which way they went.

        Raises:
            ValueError: the kind of a request is none of those known.
        """
        items = list(self._pool.map(self._plan, requests))
        chunks = [[item] for item in items if item.result is None and not item.by_dali]
        for medium in ("video", "picture"):
            group = [item for item in items if item.by_dali and item.medium == medium]
            size = self._most(medium)
            if self._gpu is None:
                size = min(size, max(1, -(-len(group) // self._threads)))
            chunks += [group[first : first + size] for first in range(0, len(group), size)]
        chunks.sort(key=lambda chunk: chunk[0].medium != "video")  # those that take long first
        for _ in self._pool.map(self._decode, chunks):
            pass
        self.taken.update(f"{item.medium} by {'dali' if item.by_dali else 'python'}" for item in items)
        return [item.result for item in items if item.result is not None]

    def _most(self, medium: str) -> int:
        return (PICTURES_IN_CHUNK if medium == "picture" else VIDEOS_IN_CHUNK) * (1 if self._gpu is None else 4)

    def _plan(self, request: Request) -> _Item:
        """Which way a medium takes; by its own bytes alone."""
        if request.kind in AUDIOS:
            return _Item(request, "sound")
        if request.kind not in PICTURES | VIDEOS:
            raise ValueError(f"unknown kind of medium {request.kind!r}")
        item = _Item(request, "picture" if request.kind in PICTURES else "video")
        try:
            if item.medium == "picture":
                header = picture_header(request.data)
                item.size, item.by_dali = (header.width, header.height), header.plain and self._version is not None
                if self._gpu is not None and request.tiled:
                    item.by_dali = False
                if self._pixels.image_mode == "square" and not request.tiled:
                    resized(*item.size, self._pixels.image_size)  # raises before anything is decoded
            elif self._dali_video:
                scan = scan_video(request.data)
                item.size, item.frames = (scan.width, scan.height), self._choose(request, scan)
                item.by_dali = (scan.codec, scan.pixel_format) in self._dali_video and scan.packets == len(scan.pts)
        except SampleError as error:
            item.result, item.by_dali = error, False
        return item

    def _choose(self, request: Request, scan: VideoScan) -> np.ndarray:
        return self._frames.choose(scan.times, scan.probe.fps, request.key)

    def _decode(self, chunk: list[_Item]) -> None:
        """Fills in the results of some media that go the same way."""
        if chunk[0].by_dali:
            self._by_dali(chunk)
        else:
            chunk[0].result = self._by_python(chunk[0])

    def _by_dali(self, chunk: list[_Item]) -> None:
        pipelines = self._pipelines.get()
        try:
            data, sizes = [item.request.data for item in chunk], [item.size for item in chunk]
            if self._gpu is None:
                results = [self._see(pixels, item.request) for item, pixels in zip(chunk, pipelines.decoded(data), strict=True)]
            elif chunk[0].medium == "picture":
                results = pipelines.pictures(data, sizes)
            else:
                results = pipelines.videos(data, sizes, [item.frames for item in chunk if item.frames is not None])
            for item, result in zip(chunk, results, strict=True):
                item.result = result
            return
        except RuntimeError:
            pass  # one of them is bad
        finally:
            self._pipelines.put(pipelines)
        if len(chunk) > 1:
            for item in chunk:
                self._by_dali([item])
        else:
            chunk[0].by_dali = False
            chunk[0].result = self._by_python(chunk[0])

    def _by_python(self, item: _Item) -> Result:
        try:
            if item.medium == "sound":
                return decode_sound(item.request.data)
            if item.medium == "picture":
                return self._see(np.asarray(open_rgb(item.request.data)), item.request)
            frames = decode_frames(item.request.data, partial(self._choose, item.request))
            return np.stack([self._see(frame, item.request) for frame in frames])
        except SampleError as error:
            return error

    def _see(self, pixels: np.ndarray, request: Request) -> np.ndarray:
        """What the tower sees of a decoded picture or frame, uint8 [height, width, 3]."""
        how = self._pixels
        if not request.tiled:
            return preprocess(pixels, how.image_mode, how.image_size, how.image_mean, how.image_std, self._resize)
        if self._tiling is None or self._tiling.anyres is None:
            raise ValueError("a picture of several tiles needs a geometry with anyres")
        cut, base = self._tiling.cut(Shape(*pixels.shape[1::-1])), self._tiling.anyres.base
        return preprocess_tiles(pixels, cut, base, how.image_size, how.image_mean, how.image_std, self._resize)


def _capability(gpu: int) -> tuple[int, int]:
    import torch  # takes seconds; only a GPU needs it

    if not torch.cuda.is_available():
        raise DatasetError("data.decode_on=gpu, but this machine has no CUDA device: set data.decode_on=cpu")
    return torch.cuda.get_device_capability(gpu)
