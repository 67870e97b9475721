"""One line a step for the eye::

step   12/300 | loss 2.3456 | lr 1.00e-03 | norm 1.23 | 9,345 tok/s | pad 4.2% | wait 0.3% | 234 ms | 0.0123 TFLOP/s | eta 0:01:07
"""

from __future__ import annotations

from collections.abc import Mapping


def format_line(step: int, steps: int, metrics: Mapping[str, float], eta_seconds: float | None) -> str:
    """The line of one step.

    Args:
        step: the step just finished, from 1.
        steps: the last step of the run.
        metrics: the numbers as ``Observer`` names them.
        eta_seconds: what is left, where it is known.
    """
    parts = [f"step {step:>{len(str(steps))}}/{steps}", f"loss {metrics['loss']:.4f}", f"lr {_learning_rates(metrics)}"]
    if "grad_norm" in metrics:
        parts.append(f"norm {metrics['grad_norm']:.3g}")
    parts += [
        f"{metrics['tokens_per_second']:,.0f} tok/s",
        f"pad {metrics['padding']:.1%}",
        f"wait {metrics['data_wait']:.1%}",
        f"{metrics['step_ms']:,.0f} ms",
        f"{metrics['model_tflops']:.3g} TFLOP/s",
    ]
    if "mfu" in metrics:
        parts.append(f"mfu {metrics['mfu']:.1%}")
    if metrics["bad_samples"]:
        parts.append(f"bad {metrics['bad_samples']:.0f}")
    parts.append(f"eta {'?' if eta_seconds is None else duration(eta_seconds)}")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as ``h:mm:ss``, days in front where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days}d ' if days else ''}{hour}:{minute:02d}:{second:02d}"


def _learning_rates(metrics: Mapping[str, float]) -> str:
    rates = {name.removeprefix("lr/"): value for name, value in metrics.items() if name.startswith("lr/")}
    if not rates:
        return f"{metrics['lr']:.2e}"
    if len(set(rates.values())) == 1:
        return f"{next(iter(rates.values())):.2e}"
    return " ".join(f"{module} {rate:.2e}" for module, rate in rates.items())
