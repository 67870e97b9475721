"""From shards on disk to batches: reading, order, packing, tokens and pixels. No megatron, and no torch before ``loader``."""
