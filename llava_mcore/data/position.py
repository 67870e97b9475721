"""Where a run stands in its data: a step number, and digests of everything that decides what comes next."""

from __future__ import annotations

import hashlib
from typing import Any

from llava_mcore.data.errors import DatasetError
from llava_mcore.data.plan import Planner
from llava_mcore.geometry import SINGLE, Geometry
from llava_mcore.settings.schema import DataSettings

STATE_VERSION = 2


class Position:
    """Where a run stands in its data: what a checkpoint keeps, the same on every rank.

    Args:
        planner: of the run.
        data: settings the order depends on.
        seed: likewise.
        global_batch_size: likewise.
    """

    _NAMES = {
        "version": "format of the data position",
        "data": "index of the shards, text lengths, mixture or data.shuffle (digest)",
        "seed": "train.seed",
        "global_batch_size": "train.global_batch_size",
        "sequence_length": "data.sequence_length",
        "packing": "data.packing, packing_window, streams_multiple",
        "pictures": "tiles and embeddings of pictures, data.video_frames, video_frames_by, video_fps",
        "quarantine": "data.quarantine up to here (digest)",
    }

    def __init__(self, planner: Planner, data: DataSettings, seed: int, global_batch_size: int) -> None:
        self._planner, self._data = planner, data
        self._seed, self._global_batch_size = seed, global_batch_size

    def state_dict(self, step: int) -> dict[str, Any]:
        """The position after ``step`` finished steps, and what it was counted in."""
        data = self._data
        return {
            "version": STATE_VERSION,
            "step": step,
            "data": self._planner.blend.digest,
            "seed": self._seed,
            "global_batch_size": self._global_batch_size,
            "sequence_length": data.sequence_length,
            "packing": [data.packing, data.packing_window, data.streams_multiple],
            "pictures": [_short(self._planner.geometry_at(step)), data.video_frames, data.video_frames_by, data.video_fps],
            "quarantine": self._planner.quarantine.digest(self._planner.window_start(step)),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Refuses a position that was counted in other data or another order.

        Raises:
            DatasetError: names everything that differs.
        """
        now = self.state_dict(state.get("step", 0))
        differing = [
            f"{what}: {state.get(name)!r} in the checkpoint, {now[name]!r} now"
            for name, what in self._NAMES.items()
            if state.get(name) != now[name]
        ]
        if differing:
            raise DatasetError(
                "the data position of the checkpoint does not fit: "
                + "; ".join(differing)
                + ". Set them back, or start a new run from its weights with train.init_from and another train.output_dir"
            )


def _short(geometry: Geometry) -> int | str:
    """Embeddings of a picture; where that depends on its size, a digest of how."""
    if geometry.plain:
        return geometry.embeddings(SINGLE)
    return hashlib.sha256(repr(geometry).encode()).hexdigest()[:16]
