"""A job cut into shares, each done by a process of its own."""

from __future__ import annotations

import multiprocessing
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
    function: Callable[[Share, Progress], Result], shares: Sequence[Share], progress: Progress = nothing, *, apart: bool = False
) -> list[Result]:
    """``function(share, progress)`` for every share; one share alone is done in this process, unless ``apart``.

    A process reports after every tensor, so that none outlives this one: its next report finds nobody and ends it.

    Args:
        function: importable by name.
        shares: what each process gets; picklable.
        progress: called with counts as the processes report them.

    Raises:
        what the first process to fail raised; ConversionError if one is killed. The others are ended.
    """
    if len(shares) == 1 and not apart:
        return [function(shares[0], progress)]
    context = multiprocessing.get_context("spawn")
    results: dict[int, Result] = {}
    processes = []
    numbers: dict[Connection, int] = {}
    try:
        for number, share in enumerate(shares):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(function, share, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            processes.append(process)
            numbers[ours] = number
        while numbers:
            for pipe in wait(list(numbers)):
                assert isinstance(pipe, Connection)
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    process = processes[numbers[pipe]]
                    process.join()
                    raise ConversionError(
                        f"process {numbers[pipe]} of {len(shares)} ended early (exit code {process.exitcode}); was it killed, "
                        "or out of memory? Try fewer with --processes"
                    ) from None
                if kind == "failed":
                    raise value
                if kind == "moved":
                    progress(value)
                else:
                    results[numbers.pop(pipe)] = value
    finally:
        for process in processes:
            if len(results) < len(shares):
                process.terminate()
            process.join()
    return [results[number] for number in range(len(shares))]


def _work(function: Callable[[Any, Progress], Any], share: Any, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send(("done", function(share, lambda count: pipe.send(("moved", count)))))
    except BrokenPipeError:  # the first process has gone
        return
    except Exception as error:
        pipe.send(("failed", error))
