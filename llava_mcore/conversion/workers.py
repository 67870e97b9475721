"""A job cut into shares, each done by a process of its own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from llava_mcore.conversion.families import ConversionError

Share = TypeVar("Share")
Result = TypeVar("Result")
Progress = Callable[[int], object]


def nothing(count: int) -> None:
    """The progress nobody watches."""


def run(
    function: Callable[[Share, Progress], Result],
    shares: Sequence[Share],
    progress: Progress = nothing,
    *,
    apart: bool = False,
) -> list[Result]:
    """``function(share, progress)`` for every share; one share alone is done in this process, unless ``apart``.

    The processes are new interpreters, not multiprocessing's: those run the caller's script again, which only scripts that are
    written for it survive. A process reports after every tensor, so that none outlives this one: its next report finds nobody
    and ends it.

    Args:
        function: importable by name.
        shares: what each process gets; picklable.
        progress: called with counts as the processes report them.
        apart: in a process of its own even if it is one.

    Raises:
        what the first process to fail raised; ConversionError if one is killed. The others are ended.
    """
    if len(shares) == 1 and not apart:
        return [function(shares[0], progress)]
    results: dict[int, Result] = {}
    processes: list[subprocess.Popen[bytes]] = []
    numbers: dict[Connection, int] = {}
    try:
        for share in shares:
            process, pipe = _start(function, share)
            numbers[pipe] = len(processes)
            processes.append(process)
        while numbers:
            for ready in wait(list(numbers)):
                assert isinstance(ready, Connection)
                try:
                    kind, value = ready.recv()
                except EOFError:
                    number = numbers[ready]
                    raise ConversionError(
                        f"process {number + 1} of {len(shares)} ended early (exit code {processes[number].wait()}); was it "
                        "killed, or out of memory? Try fewer with --processes"
                    ) from None
                if kind == "failed":
                    raise value
                if kind == "moved":
                    progress(value)
                else:
                    results[numbers.pop(ready)] = value
                    ready.close()
    finally:
        for process in processes:
            if len(results) < len(shares):
                process.terminate()
            process.wait()
        for pipe in numbers:
            pipe.close()
    return [results[number] for number in range(len(shares))]


def _start(function: Callable[[Share, Progress], Result], share: Share) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", f"from {__name__} import serve; serve({theirs})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
    finally:
        os.close(theirs)  # so that the end of the process is the end of the pipe
    assert process.stdin is not None
    try:
        with process.stdin as job:
            pickle.dump((function, share), job)
    except BrokenPipeError:
        pass  # it has ended already; its pipe will say so
    return process, Connection(ours, writable=False)


def serve(descriptor: int) -> None:
    """What a process does: takes one share from its standard input, and reports through a pipe."""
    pipe = Connection(descriptor, readable=False)
    import torch

    torch.set_num_threads(1)
    function, share = pickle.load(sys.stdin.buffer)
    try:
        answer: tuple[str, Any] = ("done", function(share, lambda count: pipe.send(("moved", count))))
    except BrokenPipeError:  # the first process has gone
        return
    except Exception as error:
        answer = ("failed", error)
    pipe.send(answer)
