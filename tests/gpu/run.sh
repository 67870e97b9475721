#!/usr/bin/env bash
# Everything that needs a GPU: its tests, then the benchmark, whose record goes to benchmarks/results/gpu_step.json.
#   bash tests/gpu/run.sh [--quick]
# Works with and without Transformer Engine and flash-attn and builds nothing: what needs them is skipped and says what to install.
# The Python is the one of tools/install.sh; an environment that already holds torch with CUDA is used as it is with
#   LLAVA_MCORE_PYTHON=python bash tests/gpu/run.sh
set -uo pipefail
cd "$(dirname "$0")/../.."
if ! command -v nvidia-smi > /dev/null && [ ! -e /dev/nvidia0 ]; then
    echo "this machine has no NVIDIA GPU; nothing was run" >&2
    exit 1
fi
source tools/install.sh
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device is visible to $PYTHON; nothing was run" >&2
    exit 1
fi
"$PYTHON" -c 'import torch; from llava_mcore.models.backend import installed
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda, "with", *sorted(installed()))'
"$PYTHON" -m pytest -m gpu tests/gpu -rs
tests=$?
"$PYTHON" tests/gpu/measure.py "$@" --json benchmarks/results/gpu_step.json
measured=$?
exit $((tests > measured ? tests : measured))
