"""Which layers and kernels a run uses on this machine, and what speaks against those it asked for.

The limits of FP8 are those of Transformer Engine 2.11.0: sizes in ``pytorch/utils.py``, ``tensor/mxfp8_tensor.py``; devices in
``pytorch/quantization.py``. So are those of its exchange between context-parallel ranks: ``dot_product_attention/utils.py``,
``dot_product_attention/context_parallel.py`` and ``common/fused_attn/fused_attn.cpp``.
"""

from __future__ import annotations

import dataclasses
from math import gcd
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.enums import AttnBackend

from llava_mcore.geometry import round_up
from llava_mcore.models import flash
from llava_mcore.settings.schema import PrecisionSettings, Settings

TE, TORCH_FLASH, FLASH_ATTN = "transformer_engine", "torch.varlen_attn", "flash_attn"
FUSED_GRADIENTS = "fused_weight_gradient_mlp_cuda"  # of Apex; platform/cpu.py has its like
INSTALL_TE = 'pip install --no-build-isolation "transformer_engine[pytorch]==2.11.0" (needs nvcc and a CUDA torch)'
INSTALL_APEX = "install NVIDIA's Apex with --cpp_ext --cuda_ext"
INSTALL_FLASH = "pip install --no-build-isolation flash-attn (needs nvcc and a CUDA torch)"

ATTENTION = {"auto": AttnBackend.auto, "sdpa": AttnBackend.local, "flash": AttnBackend.flash, "fused": AttnBackend.fused}
CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def installed() -> set[str]:
    """What of the optional packages can be used here."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    found = {
        TE: HAVE_TE,
        TORCH_FLASH: flash.torch_kernel() is not None,
        FLASH_ATTN: flash.package_kernel() is not None,
        FUSED_GRADIENTS: layers._grad_accum_fusion_available,
    }
    return {name for name, usable in found.items() if usable}


def resolve(precision: PrecisionSettings, dtype: str, cuda: bool, present: set[str]) -> PrecisionSettings:
    """The same with ``auto`` decided; what cannot work is left as it was asked for (:func:`backend_problems` names it).

    ``attention`` stays ``auto`` under Transformer Engine, which chooses among its own by shape and device.

    Args:
        precision: what was asked for.
        dtype: ``train.dtype``.
        cuda: whether there is a GPU.
        present: of :func:`installed`.
    """
    fast = cuda and dtype == "bfloat16"
    backend, attention, fusion = precision.backend, precision.attention, precision.gradient_accumulation_fusion
    if backend == "auto":
        backend = "transformer_engine" if fast and TE in present else "torch"
    if attention == "auto" and backend == "torch":
        attention = "flash" if fast and present & {TORCH_FLASH, FLASH_ATTN} else "sdpa"
    if fusion is None:
        fusion = backend == "transformer_engine" or FUSED_GRADIENTS in present
    return dataclasses.replace(precision, backend=backend, attention=attention, gradient_accumulation_fusion=fusion)


def resolve_here(precision: PrecisionSettings, dtype: str) -> PrecisionSettings:
    """:func:`resolve` for this machine."""
    return resolve(precision, dtype, torch.cuda.is_available(), installed())


def precision_fields(precision: PrecisionSettings, module: str) -> dict[str, Any]:
    """What ``TransformerConfig`` is told.

    Args:
        precision: of :func:`resolve`.
        module: ``language_model``, ``projector`` or ``vision_tower``.
    """
    te = precision.backend == "transformer_engine"
    fields: dict[str, Any] = {
        "transformer_impl": "transformer_engine" if te else "local",
        "attention_backend": ATTENTION[precision.attention],
        "gradient_accumulation_fusion": precision.gradient_accumulation_fusion,
        # Its kernel for unpacked streams takes the angle of each token, so it is exact for packed ones too.
        "apply_rope_fusion": te and module == "language_model" and rope_utils.fused_apply_rotary_pos_emb is not None,
    }
    if precision.fp8 is None or module not in precision.fp8_modules:
        return fields
    fields |= {"fp8": precision.fp8, "fp8_recipe": precision.fp8_recipe, "fp8_param": precision.fp8_param_gather}
    if precision.fp8_recipe == "delayed":
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    if module == "language_model" and precision.fp8_first_last_bf16:
        ends = precision.fp8_first_last_bf16
        fields |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": ends,
            "num_layers_at_end_in_bf16": ends,
        }
    return fields


def padded_pictures(pictures: int, rows_each: int, multiple: int) -> int:
    """Pictures after blank ones are added so that all their rows together are a multiple of what FP8 needs.

    >>> padded_pictures(3, 577, 16)
    16
    """
    return round_up(pictures, multiple // gcd(rows_each, multiple))


def blank_pictures(pictures: int, ranks: int, rows_each: int, multiple: int) -> int:
    """Blank pictures that an FP8 tower adds to a micro-batch whose pictures are dealt over ``ranks``.

    >>> blank_pictures(3, 2, 577, 16)
    29
    """
    shares = [(pictures + rank) // ranks for rank in range(ranks)]
    return sum(padded_pictures(max(share, 1), rows_each, multiple) - share for share in shares)


def backend_problems(settings: Settings, cuda: bool, capability: tuple[int, int] | None, present: set[str]) -> list[str]:
    """Why the layers and kernels that were asked for cannot run here, each reason with its fix; an empty list if they can.

    Args:
        settings: the composed settings.
        cuda: whether there is a GPU.
        capability: its compute capability, for instance (9, 0).
        present: of :func:`installed`.
    """
    asked, dtype = settings.precision, settings.train.dtype
    precision = resolve(asked, dtype, cuda, present)
    problems = []
    if precision.backend == "transformer_engine":
        if not cuda:
            problems.append("precision.backend=transformer_engine needs a GPU; set precision.backend=torch")
        elif TE not in present:
            problems.append(
                f"precision.backend=transformer_engine: not installed; {INSTALL_TE}, take NVIDIA's PyTorch container, or set "
                f"precision.backend=torch"
            )
        if dtype != "bfloat16":
            problems.append(f"precision.backend=transformer_engine needs train.dtype=bfloat16, not {dtype}")
    elif precision.gradient_accumulation_fusion and FUSED_GRADIENTS not in present:
        problems.append(
            f"precision.gradient_accumulation_fusion=true: {FUSED_GRADIENTS} is not there; {INSTALL_APEX}, or set it to null"
        )
    problems += _attention_problems(settings, precision, cuda, present)
    if settings.parallel.te_exchange is not None:
        problems += _exchange_problems(settings, precision, capability, present)
    if settings.parallel.tp_comm_overlap:
        problems += _overlap_problems(settings, precision)
    if precision.fp8 is not None:
        problems += _fp8_problems(settings, precision, capability)
    return problems


def problems_here(settings: Settings) -> list[str]:
    """:func:`backend_problems` for this machine."""
    cuda = torch.cuda.is_available()
    return backend_problems(settings, cuda, torch.cuda.get_device_capability() if cuda else None, installed())


def _attention_problems(settings: Settings, precision: PrecisionSettings, cuda: bool, present: set[str]) -> list[str]:
    attention, te = precision.attention, precision.backend == "transformer_engine"
    if attention in ("auto", "sdpa"):
        return []
    asked, problems = f"precision.attention={attention}", []
    if attention == "fused" and not te:
        problems.append(f"{asked} is Transformer Engine's; set precision.backend=transformer_engine or precision.attention=auto")
    if attention == "flash" and not cuda:
        problems.append(f"{asked} needs a GPU; set precision.attention=sdpa")
    elif attention == "flash" and te and FLASH_ATTN not in present:
        problems.append(f"{asked} with Transformer Engine needs flash-attn; {INSTALL_FLASH}, or set precision.attention=auto")
    elif attention == "flash" and not present & {TORCH_FLASH, FLASH_ATTN}:
        problems.append(f"{asked} needs torch 2.11 or flash-attn; {INSTALL_FLASH}, or set precision.attention=sdpa")
    if attention == "flash" and settings.train.dtype != "bfloat16":
        problems.append(f"{asked} needs train.dtype=bfloat16; set it, or precision.attention=sdpa")
    if settings.model.language.head_dim % 8:
        problems.append(
            f"{asked} needs heads of a multiple of 8, these are {settings.model.language.head_dim} wide; set "
            f"precision.attention=sdpa"
        )
    exchanges = settings.parallel.context > 1 and settings.parallel.te_exchange is None
    if exchanges and precision.attention == settings.precision.attention:
        problems.append(
            f"{asked}: context parallelism (parallel.context={settings.parallel.context}) attends by its own exchange; set "
            f"precision.attention=auto"
        )
    return problems


def _exchange_problems(
    settings: Settings, precision: PrecisionSettings, capability: tuple[int, int] | None, present: set[str]
) -> list[str]:
    """What Transformer Engine's exchange asks of the machine and of the attention; of the layout: settings/layouts.py."""
    asked, instead = f"parallel.context_exchange={settings.parallel.context_exchange}", "parallel.context_exchange=ring"
    if precision.backend != "transformer_engine":
        return [f"{asked} is Transformer Engine's; set precision.backend=transformer_engine, or {instead}"]
    problems = []
    if precision.attention == "sdpa":
        problems.append(
            f"{asked} attends by Transformer Engine, not by precision.attention=sdpa; set precision.attention=auto, or {instead}"
        )
    width = settings.model.language.head_dim
    if width % 8 or width > 256:
        problems.append(
            f"{asked} needs heads of a multiple of 8 and at most 256, these are {width} wide (model.language.kv_channels); set "
            f"{instead}"
        )
    # Only cuDNN and flash-attn attend over ranks there, cuDNN to packed samples on some devices alone.
    fused = capability is None or (9, 0) <= capability < (12, 0)
    if not fused and (FLASH_ATTN not in present or precision.attention == "fused"):
        assert capability is not None
        problems.append(
            f"{asked} on compute capability {capability[0]}.{capability[1]} needs flash-attn; {INSTALL_FLASH} and leave "
            f"precision.attention=auto, or set {instead}"
        )
    return problems


def _overlap_problems(settings: Settings, precision: PrecisionSettings) -> list[str]:
    """What the user buffers ask of layers and stream (``pytorch/module/base.py: initialize_ub``)."""
    asked, instead = "parallel.tp_comm_overlap=true", "parallel.tp_comm_overlap=false"
    problems = []
    if precision.backend != "transformer_engine":
        problems.append(f"{asked} is Transformer Engine's; set precision.backend=transformer_engine, or {instead}")
    parallel, fp8 = settings.parallel, precision.fp8 is not None and "language_model" in precision.fp8_modules
    if fp8 and precision.fp8_recipe == "blockwise":
        problems.append(
            f"{asked} gathers no numbers of precision.fp8_recipe=blockwise; set precision.fp8_recipe=tensorwise, or {instead}"
        )
    tokens = settings.data.sequence_length * settings.train.micro_batch_size // parallel.context
    parts = parallel.tensor * (128 if fp8 and precision.fp8_recipe == "mxfp8" else 4)
    if tokens % parts:
        problems.append(
            f"{asked} needs the {tokens} tokens of a micro-batch on a context-parallel rank to be a multiple of {parts}; make "
            f"data.sequence_length a multiple of {parts * parallel.context}, or set {instead}"
        )
    return problems


def _fp8_problems(settings: Settings, precision: PrecisionSettings, capability: tuple[int, int] | None) -> list[str]:
    problems, asked = [], f"precision.fp8={precision.fp8}"
    if precision.backend == "torch":
        problems.append(
            f"{asked} needs Transformer Engine; set precision.backend=transformer_engine ({INSTALL_TE}), or precision.fp8=null"
        )
    needed = CAPABILITY[precision.fp8_recipe]
    if capability is not None and capability < needed:
        fix = "precision.fp8_recipe=tensorwise" if capability >= CAPABILITY["tensorwise"] else "precision.fp8=null"
        problems.append(
            f"{asked} with precision.fp8_recipe={precision.fp8_recipe} needs compute capability {needed[0]}.{needed[1]}, this "
            f"GPU has {capability[0]}.{capability[1]}; set {fix}"
        )
    if precision.fp8_recipe == "mxfp8" and capability is not None and capability >= (12, 0):
        problems.append(f"{asked} with precision.fp8_recipe=mxfp8 does not run on compute capability 12; use tensorwise")
    if settings.train.dtype != "bfloat16":
        problems.append(f"{asked} needs train.dtype=bfloat16, not {settings.train.dtype}")
    ends, layers = precision.fp8_first_last_bf16, settings.model.language.num_layers // settings.parallel.pipeline
    if ends > layers:
        problems.append(f"precision.fp8_first_last_bf16={ends} is more than the {layers} layers of a pipeline stage; lower it")
    multiple = precision.fp8_multiple
    problems += [
        f"{asked}: {name} ({size}) is not a multiple of {multiple}; {fix}"
        for name, size, fix in _fp8_sizes(settings, precision)
        if size % multiple
    ]
    return problems


def _fp8_sizes(settings: Settings, precision: PrecisionSettings) -> list[tuple[str, int, str]]:
    """Rows and columns of the FP8 products as one rank has them: (name, size, what to do if it doesn't fit)."""
    parallel, language, vision = settings.parallel, settings.model.language, settings.model.vision
    tensor = parallel.tensor
    inner = tensor if parallel.encoder == "tensor_parallel" else 1
    sizes: list[tuple[str, int, str]] = []

    def add(module: str, *named: tuple[str, int]) -> None:
        if module in precision.fp8_modules:
            sizes.extend((name, size, f"leave {module} out of precision.fp8_modules") for name, size in named)

    if "language_model" in precision.fp8_modules:
        rows = settings.data.sequence_length * settings.train.micro_batch_size // parallel.context
        rows //= tensor if parallel.sequence_parallel else 1
        sizes.append(("tokens of a micro-batch on one rank", rows, "change data.sequence_length"))
    add(
        "language_model",
        ("model.language.hidden_size", language.hidden_size),
        ("model.language.ffn_hidden_size / parallel.tensor", language.ffn_hidden_size // tensor),
        ("query width / parallel.tensor", language.num_attention_heads * language.head_dim // tensor),
        ("key and value width / parallel.tensor", 2 * language.query_groups * language.head_dim // tensor),
    )
    add(
        "vision_tower",
        ("model.vision.hidden_size", vision.hidden_size),
        ("model.vision.hidden_size / its tensor-parallel ranks", vision.hidden_size // inner),
        ("model.vision.ffn_hidden_size / its tensor-parallel ranks", vision.ffn_hidden_size // inner),
    )
    add(
        "projector",
        ("embeddings of a picture", settings.model.projected_per_image),
        ("the width of the projector's input", settings.model.feature_size),
        ("model.language.hidden_size / its tensor-parallel ranks", language.hidden_size // inner),
    )
    return sizes
