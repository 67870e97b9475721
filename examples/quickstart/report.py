"""Draws the loss curve and prints the table that the quickstart ends with: ``report.py runs/quickstart``."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

from llava_mcore.training.observe import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)

ROWS = (("untrained", "untrained", None), ("phase 1", "phase1", "phase1"), ("phase 2", "phase2", "phase2"))
KINDS = (("digit", "which digit"), ("parity", "even or odd"), ("kind", "digit or photo"), ("scene", "which photo"))


def accuracies(path: Path) -> dict[str, tuple[int, int]]:
    """Right and all answers by kind of question: the first word of a sample's key, see make_data.py."""
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for entry in json.loads(path.read_text(encoding="utf-8"))["answers"]:
        right = entry["answer"].strip() == entry["expected"].strip()
        for kind in (entry["key"].split("-")[0], "all"):
            counts[kind] = (counts[kind][0] + right, counts[kind][1] + 1)
    return dict(counts)


def table(run: Path) -> list[list[str]]:
    """A header and a row a stage, as text."""
    lines = [["held-out answers right", *(name for _, name in KINDS), "all", "steps", "tokens/s", "padding", "time"]]
    for name, evaluation, phase in ROWS:
        counts = accuracies(run / f"eval-{evaluation}.json")
        line = [name]
        for kind in (*(kind for kind, _ in KINDS), "all"):
            right, count = counts.get(kind, (0, 0))
            line.append(f"{right / count:.1%} of {count}" if count else "-")
        if phase:
            metrics = read_metrics(run / phase)
            seconds = sum(entry["step_ms"] for entry in metrics) / 1000
            line += [
                str(metrics[-1]["step"]),
                f"{statistics.median(entry['tokens_per_second'] for entry in metrics):,.0f}",
                f"{statistics.mean(entry['padding'] for entry in metrics):.1%}",
                f"{seconds:.0f} s",
            ]
        else:
            line += ["0", "-", "-", "-"]
        lines.append(line)
    return lines


def draw(run: Path) -> Path:
    """The loss of both phases, one after the other."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    start = 0.0
    for name, _, phase in ROWS:
        if phase:
            metrics = read_metrics(run / phase)
            steps = [start + entry["step"] for entry in metrics]
            axes.plot(steps, [entry["loss"] for entry in metrics], label=name, linewidth=1)
            start = steps[-1]
    axes.set(xlabel="step", ylabel="loss per answer token", yscale="log", title="Quickstart: digits and photographs")
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    axes.legend()
    path = run / "loss.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def text(run: Path, seconds: float | None) -> str:
    """The table, the comparison with transformers, and where everything lies."""
    lines = table(run)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    out = []
    for first, *others in lines:
        out.append(
            "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))])
        )
    out.insert(1, "-" * len(out[0]))
    comparison = json.loads((run / "transformers.json").read_text(encoding="utf-8"))
    out += ["", f"transformers gives {comparison['same']} of {comparison['count']} answers as this project does."]
    if seconds is not None:
        out.append(f"All of it took {seconds // 60:.0f} min {seconds % 60:.0f} s.")
    places = (
        ("loss curve", "loss.png"),
        ("data", "data and shards"),
        ("checkpoints", "phase1/checkpoints, phase2/checkpoints"),
        ("every step", "phase1/metrics.jsonl, phase2/metrics.jsonl; tensorboard --logdir " + str(run)),
        ("answers", "eval-untrained.json, eval-phase1.json, eval-phase2.json"),
        ("for transformers", "huggingface"),
    )
    out += ["", f"In {run}:", *(f"  {what:<17} {where}" for what, where in places)]
    return "\n".join(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the quickstart")
    parser.add_argument("--seconds", type=float, help="what everything took")
    arguments = parser.parse_args()
    draw(arguments.run)
    report = text(arguments.run, arguments.seconds)
    (arguments.run / "report.txt").write_text(report + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
