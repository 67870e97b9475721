"""Runs functions on several ranks.

Ranks are started once for each world size and kept, as importing torch and Megatron-Core takes seconds; each case builds and
destroys its own groups in them.

    results = ranks(4).run(function, argument, ...)      # a list, one result a rank; an exception on any rank fails the test

Functions must be importable (module level), arguments and results picklable.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_SECONDS = 240


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


class Ranks:
    """``size`` processes joined over gloo."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, size, port), daemon=False)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(*arguments)`` on every rank."""
        for connection in self._connections:
            connection.send((function, arguments))
        results, errors = [], []
        for rank, connection in enumerate(self._connections):
            if errors or not connection.poll(TIMEOUT_SECONDS):
                # After one failure the others may wait in a collective for ever: these ranks are of no more use.
                if not connection.poll(2):
                    errors.append(f"rank {rank}: no answer")
                    continue
            try:
                ok, value = connection.recv()
            except EOFError:
                errors.append(f"rank {rank} died")
                continue
            results.append(value)
            if not ok:
                errors.append(f"rank {rank}:\n{value}")
        if errors:
            self.close()
            raise RankError("\n".join(errors))
        return results

    def close(self) -> None:
        """Ends the ranks."""
        for process in self._processes:
            process.kill()
            process.join()
        _pool.pop(self.size, None)


_pool: dict[int, Ranks] = {}


def ranks(size: int) -> Ranks:
    """The ranks of this world size, started when first asked for."""
    if size not in _pool:
        _pool[size] = Ranks(size)
    return _pool[size]


def close_all() -> None:
    """Ends all ranks."""
    for pool in list(_pool.values()):
        pool.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(connection: Connection, rank: int, size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from llava_mcore.parallel import groups
    from llava_mcore.platform import device

    device.start(timeout_minutes=5)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        groups.destroy()
        connection.send(answer)
