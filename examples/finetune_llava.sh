#!/usr/bin/env bash
''':'
# Phase 2 of LLaVA-1.5 7B: projector and decoder learn to follow instructions, the tower stays as it is. Any of
#   bash examples/finetune_llava.sh key=value ...                                     (every GPU of this machine, or one process)
#   torchrun --nproc-per-node 8 examples/finetune_llava.sh key=value ...
#   torchrun --no-python --nproc-per-node 8 examples/finetune_llava.sh key=value ...
# with data.path=SHARDS data.tokenizer=FOLDER train.init_from=PHASE_1_CHECKPOINT at least; --help lists every setting.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch experiment=finetune_llava_7b "$@"
exit
'''
import os, sys  # torchrun runs this file with Python: hand it back to bash, and say which Python it was
os.execvpe("bash", ["bash", __file__, *sys.argv[1:]], {**os.environ, "PYTHON": sys.executable})
#'
