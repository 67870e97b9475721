"""Where the code runs: CUDA over NCCL, or the CPU over gloo with the same Megatron-Core code.

Importing this package (no torch, no megatron) quietens warnings that tell a user of this project nothing: what is missing is said
in one line at start, and the rest is about the insides of pinned versions.
"""

import warnings

NOISE = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "The .grad attribute of a Tensor that is not a leaf",
    r"`torch\.distributed\.\w+` is deprecated",
    "MLP requires ffn_hidden_size",
    "full scope is deprecated",
    "`load_state_dict` is deprecated",
    "When using (async grad allreduce|sequence parallelism) it is recommended to set the environment variable",
)

for message in NOISE:
    warnings.filterwarnings("ignore", message=message)
