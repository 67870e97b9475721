"""Real processes that load, are killed at random instants, and go on in other numbers: the same global batches, nothing lost.

Here the loader and its books are alone, in up to 12 processes over gloo; ``tests/training/test_data_state.py`` kills whole runs.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from test_loader import DATA, make, streams

from llava_mcore.data.account import Account
from llava_mcore.data.position import Position
from llava_mcore.data.shards import ShardDataset
from llava_mcore.data.tokenizer import Tokenizer, load_tokenizer

SIZES, BATCH, STEPS, SEED = (8, 4, 6, 2, 12), 16, 33, 20
SAVED, LOG = "position.json", "steps.jsonl"


def digest(found: list[Any]) -> str:
    """Of the streams of a step, whatever rank had which."""
    return hashlib.sha256(b"".join(sorted(repr(stream).encode() for stream in found))).hexdigest()


def load(rank: int, size: int, folder: Path, dataset_path: Path, sp_file: Path) -> None:
    """One process: goes on from what is saved, and saves the position after every second step."""
    dist.init_process_group("gloo", f"file://{folder}/meeting-of-{size}", rank=rank, world_size=size)
    dataset, tokenizer = ShardDataset(dataset_path), load_tokenizer(sp_file)
    state = json.loads((folder / SAVED).read_text()) if (folder / SAVED).exists() else {"step": 0, "account": {}}
    first = state["step"]
    loader = make(dataset, tokenizer, rank=rank, size=size, start_step=first, total_samples=BATCH * STEPS)
    position = Position(loader.planner, DATA, 1, BATCH)
    if first:
        position.check(state)
    account, own = Account(state["account"]), Account()
    dist.barrier()  # all have read what is saved
    for step in loader:
        own.merge(step.account)
        parts: list[Any] = [None] * size
        dist.all_gather_object(parts, (own.state_dict(), [stream for stream in streams(step) if stream]))
        own = Account()
        for part, _ in parts:
            account.merge(Account(part))
        for source, epoch in loader.planner.epochs_over(step.index):
            problem = account.close(source, epoch, loader.planner.blend.sources[source].order)
            assert problem is None, problem
        if rank == 0:
            with (folder / LOG).open("a") as file:
                line = {"step": step.index, "size": size, "digest": digest([s for _, found in parts for s in found])}
                file.write(json.dumps(line) + "\n")
            if step.index % 2 or step.index == STEPS - 1:
                saved = position.state_dict(step.index + 1) | {"account": account.state_dict()}
                (folder / "new").write_text(json.dumps(saved))
                os.replace(folder / "new", folder / SAVED)
        time.sleep(0.05)
    dist.destroy_process_group()


def start(size: int, *arguments: Any) -> list[multiprocessing.process.BaseProcess]:
    # Torch takes seconds to import: the processes are forked from one that has.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "llava_mcore.data.loader", "llava_mcore.data.sources"])
    processes = [context.Process(target=load, args=(rank, size, *arguments), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def test_killed_and_resized(dataset: ShardDataset, tokenizer: Tokenizer, sp_file: Path, tmp_path: Path) -> None:
    """8 -> 4 -> 6 -> 2 -> 12 processes over ten epochs of 53 samples; the epochs' digests are compared on the way."""
    chance = random.Random(SEED)

    def reached() -> int:
        return json.loads((tmp_path / SAVED).read_text())["step"] if (tmp_path / SAVED).exists() else 0

    for size in SIZES:
        before = reached()
        processes = start(size, tmp_path, dataset.path, sp_file)
        try:
            deadline = time.monotonic() + 120
            if size == SIZES[-1]:
                for process in processes:
                    process.join(deadline - time.monotonic())
                assert [process.exitcode for process in processes] == [0] * size
            else:
                while reached() < before + 4:
                    assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
                    time.sleep(0.01)
                time.sleep(0.3 * chance.random())
        finally:
            for process in processes:
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
            for process in processes:
                process.join()
    # 528 samples: nine epochs are closed, the tenth is not over.
    assert reached() == STEPS and set(json.loads((tmp_path / SAVED).read_text())["account"]) == {"0:9"}
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert {line["size"] for line in lines} == set(SIZES)
    # Steps that a kill took back were made again, by other ranks, and every one is that of a single process.
    alone = {
        step.index: digest([stream for stream in streams(step) if stream])
        for step in make(dataset, tokenizer, total_samples=BATCH * STEPS)
    }
    assert {line["step"] for line in lines} == set(alone) and all(line["digest"] == alone[line["step"]] for line in lines)
