"""The enumerations of ``transformer_engine_torch`` 2.11.0, by name; their numbers mean nothing outside of it."""

from __future__ import annotations

import enum

import torch


def _numbered(name: str, prefix: str, values: str) -> type[enum.IntEnum]:
    return enum.IntEnum(name, {prefix + value: number for number, value in enumerate(values.split())})  # type: ignore[return-value]


DType = _numbered("DType", "k", "Byte Int16 Int32 Int64 Float32 Float16 BFloat16 Float8E4M3 Float8E5M2 Float8E8M0 Float4E2M1")
NVTE_Bias_Type = _numbered("NVTE_Bias_Type", "NVTE_", "NO_BIAS PRE_SCALE_BIAS POST_SCALE_BIAS ALIBI")
NVTE_Mask_Type = _numbered(
    "NVTE_Mask_Type",
    "NVTE_",
    "NO_MASK PADDING_MASK CAUSAL_MASK PADDING_CAUSAL_MASK CAUSAL_BOTTOM_RIGHT_MASK PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
)
NVTE_Softmax_Type = _numbered("NVTE_Softmax_Type", "NVTE_", "VANILLA_SOFTMAX OFF_BY_ONE_SOFTMAX LEARNABLE_SOFTMAX")
NVTE_Fused_Attn_Backend = _numbered("NVTE_Fused_Attn_Backend", "NVTE_", "F16_max512_seqlen F16_arbitrary_seqlen FP8 No_Backend")
NVTE_QKV_Format = _numbered("NVTE_QKV_Format", "NVTE_", "SBHD BSHD THD BSHD_2SBHD SBHD_2BSHD THD_2BSHD THD_2SBHD")
NVTE_QKV_Layout = _numbered(
    "NVTE_QKV_Layout",
    "NVTE_",
    "SB3HD SBH3D SBHD_SB2HD SBHD_SBH2D SBHD_SBHD_SBHD BS3HD BSH3D BSHD_BS2HD BSHD_BSH2D BSHD_BSHD_BSHD T3HD TH3D THD_T2HD "
    "THD_TH2D THD_THD_THD SBHD_BSHD_BSHD BSHD_SBHD_SBHD THD_BSHD_BSHD THD_SBHD_SBHD Paged_KV_BSHD_BSHD_BSHD "
    "Paged_KV_BSHD_SBHD_SBHD Paged_KV_SBHD_BSHD_BSHD Paged_KV_SBHD_SBHD_SBHD Paged_KV_THD_BSHD_BSHD Paged_KV_THD_SBHD_SBHD",
)
FP8FwdTensors = _numbered(
    "FP8FwdTensors",
    "GEMM",
    "1_INPUT 1_WEIGHT 1_OUTPUT 2_INPUT 2_WEIGHT 2_OUTPUT 3_INPUT 3_WEIGHT 3_OUTPUT",
)
FP8BwdTensors = _numbered("FP8BwdTensors", "GRAD_", "OUTPUT1 INPUT1 OUTPUT2 INPUT2 OUTPUT3 INPUT3")
Float8BlockScaleTensorFormat = _numbered("Float8BlockScaleTensorFormat", "", "GEMM_READY COMPACT")
CommOverlapType = _numbered("CommOverlapType", "", "RS AG")

TORCH = {
    DType["kByte"]: torch.uint8,
    DType["kInt32"]: torch.int32,
    DType["kInt64"]: torch.int64,
    DType["kFloat32"]: torch.float32,
    DType["kFloat16"]: torch.float16,
    DType["kBFloat16"]: torch.bfloat16,
    DType["kFloat8E4M3"]: torch.float8_e4m3fn,
    DType["kFloat8E5M2"]: torch.float8_e5m2,
}
