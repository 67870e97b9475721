"""On a GPU: copies run beside what it computes, are there when they are read, and the host waits for neither."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llava_mcore.parallel import groups as process_groups
from llava_mcore.parallel.broadcast import share_steps
from llava_mcore.platform import device
from llava_mcore.platform.copies import SideCopy, upload
from llava_mcore.settings.schema import ParallelSettings

HERE = torch.device("cuda", 0)


def long_work() -> torch.cuda.Event:
    """Some tenths of a second of work on the current stream; the event is its end."""
    torch.cuda._sleep(1_000_000_000)  # cycles
    return torch.cuda.current_stream().record_event()


def test_a_side_copy_does_not_wait_for_the_work_before_it() -> None:
    SideCopy(torch.arange(2_000_000), HERE).arrived()  # memory on both sides is made once, and that waits
    torch.cuda.synchronize()
    done = long_work()
    copy = SideCopy(torch.arange(2_000_000), HERE)
    while not copy._done.query():  # type: ignore[union-attr]
        assert not done.query(), "the copy came after the work"
        time.sleep(0.001)
    assert not done.query()
    assert torch.equal(copy.arrived().cpu(), torch.arange(2_000_000))


def test_an_upload_does_not_hold_up_the_host() -> None:
    upload(torch.arange(2_000_000), HERE)
    torch.cuda.synchronize()
    done = long_work()
    there = upload(torch.arange(2_000_000), HERE)
    assert not done.query()
    assert torch.equal(there.cpu(), torch.arange(2_000_000))


def test_memory_is_not_given_away_while_it_is_read() -> None:
    sums = []
    for number in range(20):
        copy = SideCopy(torch.full((4_000_000,), number), HERE)
        here = copy.arrived()
        torch.cuda._sleep(10_000_000)  # the sum is late, and by then nobody holds the tensor
        sums.append(here.sum())
        del here, copy
    assert [int(total) for total in sums] == [number * 4_000_000 for number in range(20)]


@dataclass
class Batch:
    """What the broadcast knows of a batch."""

    pixel_values_NCHW: torch.Tensor


@dataclass
class Step:
    """What it knows of a step."""

    batches: list[Batch]


def test_steps_arrive_whole_and_an_error_in_its_place() -> None:
    def steps() -> Iterator[Step]:
        for number in range(4):
            if number == 3:
                raise OSError("step 3 is lost")
            yield Step([Batch(torch.full((2, 3, 336, 336), 10.0 * number + at)) for at in range(2)])

    device.start(timeout_minutes=5)
    groups = process_groups.build(ParallelSettings())
    found, error = [], ""
    try:
        for step in share_steps(steps(), groups, HERE):
            torch.cuda._sleep(10_000_000)
            found.append([batch.pixel_values_NCHW.unique() for batch in step.batches])
    except OSError as caught:
        error = str(caught)
    finally:
        process_groups.destroy()
    assert error == "step 3 is lost"
    assert [[values.tolist() for values in step] for step in found] == [[[10.0 * n], [10.0 * n + 1]] for n in range(3)]
