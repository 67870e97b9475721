"""Exact-match accuracy by generation over a dataset of shards:

    torchrun --nproc-per-node 2 -m llava_mcore.evaluation.exact_match --checkpoint DIR --data SHARDS [parallel.tensor=2 ...]

The last human turn of each sample is the question, the answer that follows it is what is expected. An answer counts if it is the
expected one up to letter case and surrounding blanks. Samples are dealt over the data-parallel ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llava_mcore import platform  # noqa: F401  quietens what a user cannot use
from llava_mcore.data.errors import SampleError
from llava_mcore.data.shards import ShardDataset
from llava_mcore.evaluation.inference import Inference, settings_of
from llava_mcore.platform import device
from llava_mcore.settings import cli, compose
from llava_mcore.settings.compose import SettingsError
from llava_mcore.training.checkpoint_folder import CheckpointError

PROG = "python -m llava_mcore.evaluation.exact_match"


def evaluate(inference: Inference, dataset: ShardDataset, count: int, max_new_tokens: int) -> dict[str, Any]:
    """Accuracy over the first ``count`` samples; collective, the whole result on every rank.

    Returns:
        ``accuracy``, ``count``, ``by_question`` (accuracy of each question asked), ``answers`` (key, question, expected,
        answer) and ``skipped`` (samples that are no question, with the reason).
    """
    groups = inference.groups
    asked, prompts, skipped = [], [], []
    for index in range(groups.dp.rank(), count, groups.dp.size()):
        try:
            question, expected = _last_exchange(dataset, index)
            prompts.append(inference.prompt(dataset, index))
            asked.append((dataset.key(index), question, expected))
        except SampleError as error:
            skipped.append(f"{dataset.name(index)}: {error.reason}")
    answers = inference.answer(prompts, max_new_tokens)
    mine = [
        {"key": key, "question": question, "expected": expected, "answer": answer.strip()}
        for (key, question, expected), answer in zip(asked, answers, strict=True)
    ]
    parts: list[tuple[list[dict[str, str]], list[str]]] = [([], []) for _ in range(groups.dp.size())]
    dist.all_gather_object(parts, (mine, skipped), group=groups.dp)
    rows = sorted((row for part, _ in parts for row in part), key=lambda row: row["key"])
    by_question: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_question[row["question"]].append(row["answer"].lower() == row["expected"].lower())
    hits = [hit for hits in by_question.values() for hit in hits]
    return {
        "accuracy": sum(hits) / max(len(hits), 1),
        "count": len(hits),
        "by_question": {question: sum(hits) / len(hits) for question, hits in sorted(by_question.items())},
        "skipped": [name for _, names in parts for name in names],
        "answers": rows,
    }


def _last_exchange(dataset: ShardDataset, index: int) -> tuple[str, str]:
    """The last question, without its pictures, and the answer to it."""
    turns = dataset.read_record(index).get("conversations")
    if not isinstance(turns, list) or len(turns) < 2 or [turn.get("from") for turn in turns[-2:]] != ["human", "gpt"]:
        raise SampleError("does not end with a question and its answer")
    return turns[-2]["value"].replace("<image>", "").strip(), turns[-1]["value"].strip()


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", type=Path, help="a checkpoint of this project")
    which.add_argument("--untrained", action="store_true", help="random weights of the settings given (experiment=NAME ...)")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards")
    parser.add_argument("--limit", type=int, help="only the first samples")
    parser.add_argument("--output", type=Path, help="write everything here as JSON")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="tokens of an answer at most (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the checkpoint's")
    arguments = parser.parse_intermixed_args(argv)
    try:
        if arguments.untrained:
            settings = compose.compose(arguments.overrides)
        else:
            settings = settings_of(arguments.checkpoint, arguments.overrides)
        inference = Inference(settings, arguments.checkpoint)
        dataset = ShardDataset(arguments.data)
    except SettingsError as error:
        cli.fail(error, PROG)
    except CheckpointError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    count = min(arguments.limit or len(dataset), len(dataset))
    result = evaluate(inference, dataset, count, arguments.max_new_tokens)
    if inference.place.is_first:
        for name in result["skipped"]:
            print(f"skipped: {name}", file=sys.stderr)
        print(f"exact match: {result['accuracy']:.2%} of {result['count']} samples")
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    device.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
