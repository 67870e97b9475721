"""What can be wrong with data: one sample, or the whole dataset."""

from __future__ import annotations


class SampleError(ValueError):
    """One sample cannot be used; the rest of the dataset can. ``reason`` says why, without the sample's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DatasetError(ValueError):
    """A dataset, an index or a tokenizer cannot be used at all. The message names the file and the fix."""
