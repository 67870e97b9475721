"""Where merged patches stand in the decoder: what is left of a picture keeps the positions of its own patches.

Which patches are left is known on the first pipeline stage alone. Their numbers go to the later stages in rows behind the hidden
states, bit for bit whatever the type is, so that any schedule that moves hidden states moves them too.

Shape suffixes: T tokens of a micro-batch, S those of one sequence-parallel rank, F merged features of all tiles, N tiles, K
features of one, r rows that are carried, H width of the decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBER = torch.int32  # of a patch; as the bits of bfloat16 or float32 it is no NaN up to 32,639


def stand(position_ids_T: Tensor, merged_F: Tensor, patches_F: Tensor, each: int) -> Tensor:
    """The position ids with each feature at its tile's first position plus the number of its patch.

    Args:
        position_ids_T: int64; right for all other tokens, and for the first feature of each tile its first position.
        merged_F: int64, where the features are among the T, tile after tile.
        patches_F: int64, the patch that each stands for.
        each: K.
    """
    first_N = position_ids_T[merged_F[::each]]
    return position_ids_T.index_copy(0, merged_F, first_N.repeat_interleave(each, output_size=len(patches_F)) + patches_F)


def rows_for(tokens: int, width: int, dtype: torch.dtype) -> int:
    """Rows of hidden states that have room for a number of each of ``tokens``."""
    return -(-tokens * NUMBER.itemsize // (width * dtype.itemsize))


def append(hidden_S1H: Tensor, patches_F: Tensor, rows: int) -> Tensor:
    """Hidden states with the numbers of the patches behind them, [S + r, 1, H]; no gradient goes to these."""
    width, dtype = hidden_S1H.shape[-1], hidden_S1H.dtype
    numbers = patches_F.to(NUMBER).view(torch.uint8)
    room = rows * width * dtype.itemsize
    return torch.cat([hidden_S1H, F.pad(numbers, (0, room - len(numbers))).view(dtype).view(rows, 1, width)])


def take_off(carrying_S1H: Tensor, rows: int, features: int) -> tuple[Tensor, Tensor]:
    """What :func:`append` made: hidden states [S, 1, H], and the numbers [F] of the patches of ``features``, int64."""
    hidden_S1H, carried_r1H = carrying_S1H[:-rows], carrying_S1H[-rows:]
    numbers = carried_r1H.detach().flatten().clone().view(torch.uint8)[: features * NUMBER.itemsize]
    return hidden_S1H, numbers.view(NUMBER).long()
