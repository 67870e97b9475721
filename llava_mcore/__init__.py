"""LLaVA-style vision-language models on Megatron-Core: the same code and the same numbers on a CPU and on a cluster.

Importing this package imports neither torch nor megatron, so that ``--help`` answers at once.
"""

__version__ = "0.1.0"
