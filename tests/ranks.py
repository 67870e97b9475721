"""Runs functions on several ranks.

Importing torch and Megatron-Core takes seconds and half a gigabyte a process, so there is one set of processes for all tests. It
grows to the largest world size asked for, and each run joins as many of them as it needs over gloo.

    results = ranks(4).run(function, argument, ...)      # a list, one result a rank; an exception on any rank fails the test

Functions must be importable (module level), arguments and results picklable. Processes that need something before Megatron-Core
is imported are a set of their own: ``ranks(4, prepared_by=("module", *arguments))`` calls the module's ``prepare(*arguments)``.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_SECONDS = 240
GRACE_SECONDS = 2


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


class Ranks:
    """The first ``size`` processes, joined for one run at a time."""

    def __init__(self, size: int, prepared_by: tuple = ()) -> None:
        self.size, self.prepared_by = size, prepared_by

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(*arguments)`` on every rank."""
        workers = _workers(self.size, self.prepared_by)
        port = _free_port()
        for rank, (_, connection) in enumerate(workers):
            connection.send((rank, self.size, port, function, arguments))
        results, errors = [], []
        for rank, (_, connection) in enumerate(workers):
            # After one failure the others may wait in a collective for ever.
            if not connection.poll(GRACE_SECONDS if errors else TIMEOUT_SECONDS):
                errors.append(f"rank {rank}: no answer")
                continue
            try:
                ok, value = connection.recv()
            except EOFError:
                ok, value = False, "died"
            results.append(value)
            if not ok:
                errors.append(f"rank {rank}: {value}")
        if errors:
            close_all()  # some may still hang: the next test gets new ones
            raise RankError("\n".join(errors))
        return results


_pools: dict[tuple, list[tuple[multiprocessing.process.BaseProcess, Connection]]] = {}


def ranks(size: int, prepared_by: tuple = ()) -> Ranks:
    """``size`` ranks; the processes are started when they are first needed."""
    return Ranks(size, prepared_by)


def close_all() -> None:
    """Ends all processes."""
    for pool in _pools.values():
        for process, connection in pool:
            process.kill()
            process.join()
            connection.close()
    _pools.clear()


def _workers(size: int, prepared_by: tuple) -> list[tuple[multiprocessing.process.BaseProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    pool = _pools.setdefault(prepared_by, [])
    while len(pool) < size:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, *prepared_by), daemon=False)
        process.start()
        there.close()
        pool.append((process, here))
    return pool[:size]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(connection: Connection, preparation: str | None = None, *how: Any) -> None:
    if preparation is not None:
        importlib.import_module(preparation).prepare(*how)
    while True:
        try:
            rank, size, port, function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, _joined(rank, size, port, function, arguments)
        except BaseException:
            answer = False, "\n" + traceback.format_exc()
        connection.send(answer)


def _joined(rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple) -> Any:
    """Runs the function in a world of ``size`` processes, as torchrun would set it up."""
    import torch.distributed as dist

    from llava_mcore.parallel import groups
    from llava_mcore.platform import device

    if not gc.get_freeze_count():
        gc.freeze()  # what was imported stays: collecting looks at the rest only
    names = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update({name: str(value) for names_, value in zip(names, (rank, size), strict=True) for name in names_})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device.start(timeout_minutes=3)
    try:
        dist.barrier()  # a rank with little to do would leave before the others have found it
        return function(*arguments)
    finally:
        groups.destroy()
        device.stop()
        # Models lie in cycles that hold process groups, and each of those its threads: hundreds after some tests.
        gc.collect()
