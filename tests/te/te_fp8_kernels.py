"""FP8 by its definition: how each recipe of Transformer Engine scales numbers, and the values that its tensors stand for.

Tensors are flattened to rows T and columns H. A tensor may hold two copies, scaled (and laid out) for products along its rows and
along its columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from te_types import TORCH, DType
from torch import Tensor

BLOCK, MX_BLOCK = 128, 32  # numbers that share a scale


def values(tensor: Any, columns: bool = False) -> Tensor:
    """What a tensor stands for, float32; of a quantized one the copy for products along its columns, or its rows."""
    kind = type(tensor).__name__
    if kind.startswith("Float8Tensor"):
        if columns:
            assert not tensor._transpose_invalid
            return _decoded(tensor._transpose, tensor).movedim(0, -1) * tensor._scale_inv
        return _decoded(tensor._data, tensor) * tensor._scale_inv
    if kind.startswith("Float8Blockwise"):
        other = "_rowwise_data" if columns else "_columnwise_data"
        kept = getattr(tensor, other)
        setattr(tensor, other, None)  # it dequantizes the copy it has
        found = tensor.dequantize(dtype=torch.float32)
        setattr(tensor, other, kept)
        return found
    if kind.startswith("MXFP8"):
        data, exponents = (
            (tensor._columnwise_data, tensor._columnwise_scale_inv)
            if columns
            else (tensor._rowwise_data, tensor._rowwise_scale_inv)
        )
        decoded_TH = _decoded(data, tensor).reshape(-1, data.shape[-1])
        rows, width = decoded_TH.shape
        scale = torch.exp2(exponents.float() - 127)
        scale_TH = (
            scale[: rows // MX_BLOCK, :width].repeat_interleave(MX_BLOCK, 0)
            if columns
            else scale[:rows, : width // MX_BLOCK].repeat_interleave(MX_BLOCK, 1)
        )
        return (decoded_TH * scale_TH).reshape(data.shape)
    assert type(tensor) in (Tensor, torch.nn.Parameter), kind
    return tensor.float()


def _decoded(data: Tensor, tensor: Any) -> Tensor:
    return data.view(TORCH[tensor._fp8_dtype]).float()


def codes(numbers: Tensor, dtype: DType) -> Tensor:
    """The nearest FP8 numbers, as bytes."""
    top = torch.finfo(TORCH[dtype]).max
    return numbers.clamp(-top, top).to(TORCH[dtype]).view(torch.uint8)


def scale_of(amax: Tensor, top: float, epsilon: float, powers_of_two: bool) -> Tensor:
    """The factor that takes the largest magnitude to the largest FP8 number; 1 where all numbers are zero."""
    scale = torch.where(amax == 0, 1.0, top / amax.clamp(min=epsilon)).clamp(max=torch.finfo(torch.float32).max)
    return torch.exp2(scale.log2().floor()) if powers_of_two else scale


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """The tensor in FP8, into ``output`` where there is one."""
    if noop is not None and noop.item() == 1:
        return output
    out = output if output is not None else quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=torch.device("cpu"))
    fill = {"Float8BlockQuantizer": _fill_blocks, "MXFP8Quantizer": _fill_mx}.get(type(quantizer).__name__, _fill_tensor)
    fill(tensor.detach().float(), quantizer, out)
    if output is None and quantizer.internal:
        storage = next(base for base in type(out).__mro__ if base.__name__.endswith("Storage"))
        bare = storage(**out.get_metadata())
        if hasattr(out, "_transpose_invalid"):
            bare._transpose_invalid = out._transpose_invalid
        return bare
    return out


def _fill_tensor(numbers: Tensor, quantizer: Any, out: Any) -> None:
    """One scale: of the tensor itself, or the quantizer's, which follows from earlier steps."""
    amax = numbers.abs().max() if numbers.numel() else numbers.new_zeros(())
    if type(quantizer).__name__ == "Float8CurrentScalingQuantizer":
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, quantizer._canonicalized_amax_reduction_group())
        top = torch.finfo(TORCH[quantizer.dtype]).max
        quantizer.scale.copy_(scale_of(amax, top, quantizer.amax_epsilon, quantizer.force_pow_2_scales))
    if quantizer.amax.numel():
        quantizer.amax.copy_(amax.reshape(quantizer.amax.shape))
    found = codes(numbers * quantizer.scale, quantizer.dtype)
    out._scale_inv.copy_(1 / quantizer.scale)
    if out._data is not None:
        out._data.copy_(found)
    if out._transpose is not None:
        out._transpose.copy_(found.movedim(-1, 0))
        out._transpose_invalid = False


def _tiles(numbers_TH: Tensor, down: int, right: int) -> Tensor:
    """[rows of tiles, down, columns of tiles, right], filled up with zeros."""
    rows, width = numbers_TH.shape
    grown = F.pad(numbers_TH, (0, -width % right, 0, -rows % down))
    return grown.reshape(grown.shape[0] // down, down, grown.shape[1] // right, right)


def _untiled(tiles: Tensor, like_TH: Tensor) -> Tensor:
    rows, width = like_TH.shape
    return tiles.reshape(tiles.shape[0] * tiles.shape[1], -1)[:rows, :width]


def _put(into: Tensor, scales: Tensor) -> None:
    into.zero_()
    into[: scales.shape[0], : scales.shape[1]] = scales


def _fill_blocks(numbers: Tensor, quantizer: Any, out: Any) -> None:
    """A scale for each 128 numbers of a row (of a column), or each square of 128 x 128 of a weight."""
    numbers_TH = numbers.reshape(-1, numbers.shape[-1])
    square = quantizer.block_scaling_dim == 2
    compact = quantizer.all_gather_usage and not square
    top = torch.finfo(TORCH[quantizer.dtype]).max

    def cast(down: int, right: int) -> tuple[Tensor, Tensor]:
        tiles = _tiles(numbers_TH, down, right)
        scale = scale_of(tiles.abs().amax((1, 3)), top, quantizer.amax_epsilon, quantizer.force_pow_2_scales)
        return codes(_untiled(tiles * scale[:, None, :, None], numbers_TH), quantizer.dtype), 1 / scale

    if out._rowwise_data is not None:
        found, inverse = cast(BLOCK if square else 1, BLOCK)
        out._rowwise_data.copy_(found.reshape(out._rowwise_data.shape))
        _put(out._rowwise_scale_inv, inverse if square or compact else inverse.t())
    if out._columnwise_data is not None:
        found, inverse = cast(BLOCK, BLOCK if square else 1)
        out._columnwise_data.copy_((found if compact else found.t()).reshape(out._columnwise_data.shape))
        _put(out._columnwise_scale_inv, inverse.t() if square else inverse)


def _fill_mx(numbers: Tensor, quantizer: Any, out: Any) -> None:
    """A power of two for each 32 numbers of a row (of a column): OCP Microscaling Formats 1.0."""
    numbers_TH = numbers.reshape(-1, numbers.shape[-1])
    top = torch.finfo(TORCH[quantizer.dtype]).max
    copies = (
        (out._rowwise_data, out._rowwise_scale_inv, (1, MX_BLOCK)),
        (out._columnwise_data, out._columnwise_scale_inv, (MX_BLOCK, 1)),
    )
    for data, exponents, shape in copies:
        if data is not None:
            tiles = _tiles(numbers_TH, *shape)
            power = (tiles.abs().amax((1, 3)) / top).log2().ceil().clamp(-127, 127)
            found = codes(_untiled(tiles / torch.exp2(power)[:, None, :, None], numbers_TH), quantizer.dtype)
            data.copy_(found.reshape(data.shape))
            _put(exponents, (power + 127).to(torch.uint8))


def dequantize(tensor: Any, dtype: DType) -> Tensor:
    return values(tensor).to(TORCH[dtype])


def fp8_transpose(data: Tensor, dtype: DType, out: Tensor | None = None) -> Tensor:
    turned = data.movedim(-1, 0).contiguous()
    return turned if out is None else out.copy_(turned)


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The gradient of a bias, and the gradient in FP8."""
    return gradient.float().sum(tuple(range(gradient.dim() - 1))).to(gradient.dtype), quantizer(gradient)


# ---- weights that are kept in FP8, from the part of their float32 copy that a rank has ----


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    amax.copy_(tensor.abs().max().reshape(amax.shape))


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, flag: Tensor, lists: list[list[Tensor]], top: float, powers_of_two: bool, epsilon: float
) -> None:
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(scale_of(amax, top, epsilon, powers_of_two))
        inverse.copy_(1 / scale)


def _square_of(part: Tensor, start: int, width: int, block: int) -> tuple[Tensor, Tensor]:
    """Row and column of the square that each number of a flat part of a matrix lies in."""
    places = torch.arange(start, start + part.numel())
    return places // width // block, places % width // block


def fp8_block_scaling_compute_partial_amax(part: Tensor, amax: Tensor, height: int, width: int, start: int, block: int) -> None:
    row, column = _square_of(part, start, width, block)
    amax.view(-1).scatter_reduce_(0, row * amax.shape[1] + column, part.detach().float().abs().reshape(-1), "amax")


def fp8_block_scaling_partial_cast(
    part: Tensor, out: Tensor, scale: Tensor, height: int, width: int, start: int, block: int, dtype: DType
) -> None:
    row, column = _square_of(part, start, width, block)
    out.copy_(codes(part.detach().float().reshape(-1) * scale[row, column], dtype))
