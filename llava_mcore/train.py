"""Trains a model: ``torchrun --nproc-per-node 2 -m llava_mcore.train experiment=quickstart [group=name] [key=value ...]``.

``--help`` lists every setting, ``--print-config`` shows what was composed, ``--dry-run`` checks a run before it is paid for.
"""

from __future__ import annotations

import sys

from llava_mcore.settings import cli
from llava_mcore.settings.compose import SettingsError, dump_yaml

PROG = "python -m llava_mcore.train"


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit code."""
    command = cli.parse(sys.argv[1:] if argv is None else argv, PROG, "Train a LLaVA-style model on Megatron-Core.")
    if command.print_config:
        print(dump_yaml(command.settings), end="")
        return 0
    if command.dry_run:
        from llava_mcore.training import dry_run

        return dry_run.report(command.settings)

    from llava_mcore.conversion.families import ConversionError
    from llava_mcore.data.errors import DatasetError
    from llava_mcore.platform import device, failures
    from llava_mcore.training.checkpoint_folder import CheckpointError
    from llava_mcore.training.trainer import Trainer, TrainingError

    try:
        with failures.shared():
            Trainer(command.settings).fit()
    except SettingsError as error:
        cli.fail(error, PROG)
    except (CheckpointError, ConversionError, DatasetError, TrainingError) as error:
        cli.stop(str(error), PROG)
    device.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
