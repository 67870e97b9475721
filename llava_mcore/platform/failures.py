"""One rank's error ends all of them, in its own words and within seconds.

Without this the others would wait in a collective until its timeout, or say that a connection was closed. torchrun ends the ranks
of its own machine when one leaves, but those of other machines learn nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

KEY = "llava_mcore/failure"
EVERY_SECONDS = 3.0


@contextmanager
def shared() -> Iterator[None]:
    """Runs the body; if it raises, every rank that runs it under this is ended with that error, wherever it waits.

    An error of a rank goes through the store the process group was made with. The first one stands; ranks that fail because of
    it (a closed connection) leave with exit code 1 and the first one's words. An error that all ranks raise is each one's own.
    """
    done = threading.Event()
    threading.Thread(target=_watch, args=(done,), name="failures", daemon=True).start()
    try:
        yield
    except Exception as error:
        done.set()
        first = _first_failure(error)
        if first is not None:
            _leave(first)
        raise
    finally:
        done.set()


def _store() -> dist.Store | None:
    """A connection of its own, as another thread may be waiting on the first."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store: dist.Store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return store


def _first_failure(error: Exception) -> str | None:
    """Tells the others of an error; the words of another rank's error if that came before."""
    try:
        store = _store()
        if store is None:
            return None
        own = "".join(traceback.format_exception_only(error)).strip()
        first = store.compare_set(KEY, "", f"rank {dist.get_rank()}: {own}").decode()
        return None if first.endswith(f": {own}") else first
    except dist.DistError:  # the process that keeps the store has gone: nobody is left to tell
        return None


def _watch(done: threading.Event) -> None:
    store = None
    while not done.wait(EVERY_SECONDS):
        try:
            store = store or _store()
            if store is not None and store.check([KEY]) and not done.is_set():
                _leave(store.get(KEY).decode())
        except dist.DistError:
            return


def _leave(first: str) -> None:
    """Ends this process at once: its other threads may hang in a collective."""
    print(f"stopped, as another rank failed: {first}", file=sys.stderr, flush=True)
    os._exit(1)
