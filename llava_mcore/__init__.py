"""LLaVA-style vision-language models on Megatron-Core: the same code and the same numbers on a CPU and on a cluster.

Importing this package imports neither torch nor megatron, so that ``--help`` answers at once; what is named below comes with its
first use.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

LAZY = {
    "LlavaModel": "llava_mcore.evaluation.pretrained",
    "import_hf": "llava_mcore.conversion.convert",
    "export_hf": "llava_mcore.conversion.convert",
}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(LAZY[name]), name)
