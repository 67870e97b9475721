"""DALI as decoder: pipelines without state that take a chunk of encoded media and give pixels.

On a GPU (nvJPEG and NVDEC: ``mixed`` operators) they are also resized and normalised there, as transformers' image processor
does: sizes computed alike, cubic with antialiasing, and only the part that the centre crop keeps. One thing differs: Pillow
rounds and clips between its two passes and DALI does not, which is up to 8/255 in photographs (0.2 on average) and 30/255 at
hard edges of full contrast, as in text. No GPU has run that yet; the same graph runs on a CPU, where ``image.resize_fast`` is
nearer and faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from llava_mcore.data.image import resized


@dataclass(frozen=True)
class PixelSettings:
    """How a picture or a frame becomes what the tower sees; the names are those of ``data`` and ``model.vision``."""

    image_size: int
    image_mode: Literal["pad", "square", "stretch"]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


@lru_cache(maxsize=1)
def dali_version() -> str | None:
    """The version of DALI, None where it is not installed."""
    try:
        import nvidia.dali
    except ImportError:
        return None
    return str(nvidia.dali.__version__)


def nvdec_formats(capability: tuple[int, int]) -> frozenset[tuple[str, str]]:
    """Codec and pixel format that NVDEC decodes on a GPU of this compute capability (NVDEC application note 13.0).

    Left out is what only some chips of a generation can; it goes to PyAV.
    """
    formats = {(codec, "yuv420p") for codec in ("h264", "hevc", "vp8", "vp9")} | {("hevc", "yuv420p10le")}
    if capability >= (8, 6) and capability != (9, 0):  # neither A100 nor Hopper
        formats |= {("av1", "yuv420p"), ("av1", "yuv420p10le")}
    return frozenset(formats)


class Pipelines:
    """One pipeline for each kind of medium, built when it is first needed. For one thread at a time.

    Args:
        pixels: how pictures and frames are resized and normalised.
        threads: of DALI.
        chunk: most media in a call.
        gpu: number of the GPU that decodes; None: the CPU does.
    """

    def __init__(self, pixels: PixelSettings, threads: int, chunk: int, gpu: int | None = None) -> None:
        self._settings, self._threads, self._chunk, self._gpu = pixels, threads, chunk, gpu

    def decoded(self, data: Sequence[bytes]) -> list[np.ndarray]:
        """Decodes pictures on the CPU: uint8 [height, width, 3] each, RGB. Arguments and errors as in ``pictures``."""
        return self._run(self._plain_pipeline, data, {})

    def pictures(self, data: Sequence[bytes], sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Decodes, resizes and normalises pictures.

        Args:
            data: of each, a JPEG, PNG or WebP.
            sizes: width and height of each, as its header says.

        Returns:
            float32 [3, S, S] each.

        Raises:
            RuntimeError: DALI cannot decode one of them (it does not say which). The pipeline goes on working.
        """
        return self._run(self._picture_pipeline, data, self._geometry(sizes))

    def videos(self, data: Sequence[bytes], sizes: Sequence[tuple[int, int]], frames: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Decodes some frames of each of some videos; float32 [F, 3, S, S] each. Arguments and errors as in ``pictures``."""
        chosen = {"frames": [numbers.astype(np.int32) for numbers in frames]}
        return self._run(self._video_pipeline, data, {**chosen, **self._geometry(sizes)})

    def _run(self, pipeline: Any, data: Sequence[bytes], more: dict[str, list[np.ndarray]]) -> list[np.ndarray]:
        inputs = {"encoded": [np.frombuffer(item, dtype=np.uint8) for item in data], **more}
        for name, values in inputs.items():
            pipeline.feed_input(name, values)
        (output,) = pipeline.run()
        output = output if self._gpu is None else output.as_cpu()
        # Copies, because DALI uses the memory again.
        return [np.array(output.at(number)) for number in range(len(data))]

    def _geometry(self, sizes: Sequence[tuple[int, int]]) -> dict[str, list[np.ndarray]]:
        """What the resizing operators take for each medium, as the image processor would compute it."""
        side = self._settings.image_size
        if self._settings.image_mode == "stretch":
            return {}
        if self._settings.image_mode == "pad":
            return {"side": [np.array(max(size), dtype=np.float32) for size in sizes]}
        begins, ends = [], []
        for width, height in sizes:
            to_width, to_height = resized(width, height, side)
            left, top = (to_width - side) // 2, (to_height - side) // 2
            scale = np.array([height / to_height, width / to_width])
            begins.append((np.array([top, left]) * scale).astype(np.float32))
            ends.append((np.array([top + side, left + side]) * scale).astype(np.float32))
        return {"begin": begins, "end": ends}

    @cached_property
    def _plain_pipeline(self) -> Any:
        with self._new() as pipeline:
            pipeline.set_outputs(self._decode_pictures())
        return _built(pipeline)

    @cached_property
    def _picture_pipeline(self) -> Any:
        with self._new() as pipeline:
            pipeline.set_outputs(self._resize(self._decode_pictures(), "CHW"))
        return _built(pipeline)

    def _decode_pictures(self) -> Any:
        from nvidia.dali import fn, types

        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        device = "cpu" if self._gpu is None else "mixed"
        # On a GPU: chroma as a CPU upsamples it.
        like_cpu = {} if self._gpu is None else {"jpeg_fancy_upsampling": True}
        return fn.decoders.image(encoded, device=device, output_type=types.RGB, adjust_orientation=False, **like_cpu)

    @cached_property
    def _video_pipeline(self) -> Any:
        from nvidia.dali import fn, types

        with self._new() as pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            device = "cpu" if self._gpu is None else "mixed"
            # pad_mode: without it DALI gives black frames for those that are not there.
            pixels = fn.decoders.video(encoded, device=device, frames=frames, pad_mode="none")
            pipeline.set_outputs(self._resize(pixels, "FCHW"))
        return _built(pipeline)

    def _new(self) -> Any:
        from nvidia.dali import Pipeline

        return Pipeline(batch_size=self._chunk, num_threads=self._threads, device_id=self._gpu, prefetch_queue_depth=1)

    def _resize(self, pixels: Any, layout: str) -> Any:
        from nvidia.dali import fn, types

        side = self._settings.image_size
        cubic = {"size": [side, side], "interp_type": types.INTERP_CUBIC, "antialias": True}
        if self._settings.image_mode == "pad":
            square = fn.external_source(name="side", dtype=types.FLOAT, ndim=0)
            colour = [int(255 * channel) for channel in self._settings.image_mean]
            pixels = fn.crop(
                pixels, crop_h=square, crop_w=square, out_of_bounds_policy="pad", fill_values=colour, rounding="truncate"
            )
            pixels = fn.resize(pixels, **cubic)
        elif self._settings.image_mode == "stretch":
            pixels = fn.resize(pixels, **cubic)
        else:
            begin = fn.external_source(name="begin", dtype=types.FLOAT, ndim=1)
            end = fn.external_source(name="end", dtype=types.FLOAT, ndim=1)
            pixels = fn.resize(pixels, roi_start=begin, roi_end=end, roi_relative=False, **cubic)
        return fn.crop_mirror_normalize(
            pixels,
            mean=[255 * channel for channel in self._settings.image_mean],
            std=[255 * channel for channel in self._settings.image_std],
            output_layout=layout,
            dtype=types.FLOAT,
        )


def _built(pipeline: Any) -> Any:
    pipeline.build()
    return pipeline
