"""Do a checkpoint and the published model it came from, or became, answer alike? Ours against transformers, in float32."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from llava_mcore.conversion import workers
from llava_mcore.conversion.families import ConversionError
from llava_mcore.conversion.workers import Progress
from llava_mcore.training import checkpoint_folder as folder

TOLERANCE = 1e-4  # of the largest absolute value
SPARE_BYTES = 2 << 30
TEXT = 12  # tokens


class Job(NamedTuple):
    """What the process that compares is told."""

    published: Path
    checkpoint: Path
    kind: str
    dtype: torch.dtype | None


def compare(published: Path, checkpoint: Path, kind: str, dtype: torch.dtype | None = None) -> tuple[str, bool]:
    """Compares logits on one picture and a prompt, in a process of its own (two models, one after the other).

    Of LLaVA-NeXT and LLaVA-OneVision, whose picture geometry is not built, and of decoders the prompt has no picture.

    Args:
        published: the folder that transformers reads.
        checkpoint: the checkpoint of this project.
        kind: of the published model, as in ``layouts.Layout``.
        dtype: what the weights were cast to in between; both models' are rounded to it.

    Returns:
        what was found, or why it was not looked at; and whether the logits are further apart than ``TOLERANCE``.
    """
    if kind == "original":
        return "not compared (transformers has no class for the original layout)", False
    if importlib.util.find_spec("transformers") is None:
        return "not compared (transformers is not installed)", False
    import psutil

    needed = 4 * _parameters(checkpoint) + SPARE_BYTES
    free = psutil.virtual_memory().available
    if needed > free:
        return f"not compared (needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free)", False
    try:
        (found,) = workers.run(_compare, [Job(published, checkpoint, kind, dtype)], apart=True)
    except ConversionError as error:  # the process was killed: the tensors have been compared all the same
        return f"not compared ({error})", False
    return found


def _parameters(checkpoint: Path) -> int:
    from llava_mcore.conversion.distributed import DistributedReader

    return sum(info.nbytes // info.dtype.itemsize for info in DistributedReader(checkpoint / folder.WEIGHTS).infos.values())


def _compare(job: Job, progress: Progress) -> tuple[str, bool]:
    warnings.simplefilter("ignore")
    from llava_mcore.settings.schema import ModelSettings

    model: ModelSettings = folder.read_model_settings(job.checkpoint)
    picture = job.kind == "llava"
    ids_L, pixels_nCHW = _prompt(model, picture)
    try:
        theirs, problem = _transformers(job, ids_L, pixels_nCHW)
    except (ValueError, OSError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        return f"not compared (transformers cannot run {job.published}: {str(error).splitlines()[0]})", False
    if problem:
        return problem, True
    if not theirs.isfinite().all():
        return "not compared (transformers' are not finite)", False
    ours = _ours(job, model, ids_L, pixels_nCHW)[:, : theirs.shape[1]]
    scale = float(theirs.abs().max())
    gap = float((ours - theirs).abs().max())
    what = f"{'one picture and ' if picture else ''}{TEXT} tokens"
    differ = not gap <= TOLERANCE * scale
    says = f"FURTHER APART THAN {TOLERANCE:g}" if differ else "match"
    return f"{says} on {what} (largest difference {gap:.2e}, largest value {scale:.2e})", differ


def _prompt(model: Any, picture: bool) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [L] with a picture in their middle, and its pixels [n, 3, H, W]."""
    random = np.random.default_rng(0)
    ids = random.integers(1, model.language.vocab_size, TEXT)
    ids[ids == model.image_token_id] = 0 if model.image_token_id else 1
    size = model.vision.image_size
    pixels = random.standard_normal((int(picture), 3, size, size)).astype(np.float32)
    slots = np.full(model.embeddings_per_image * int(picture), model.image_token_id)
    return np.concatenate([ids[:3], slots, ids[3:]]), pixels


def _transformers(job: Job, ids_L: np.ndarray, pixels_nCHW: np.ndarray) -> tuple[torch.Tensor, str | None]:
    """Logits [L, V], and what went wrong while loading."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = transformers.AutoModelForCausalLM if job.kind == "decoder" else transformers.AutoModelForImageTextToText
    model, loading = kind.from_pretrained(
        job.published, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = [f"{key}: {', '.join(sorted(map(str, found))[:3])}" for key, found in loading.items() if found]
    ids = torch.from_numpy(ids_L)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if len(pixels_nCHW):
        inputs["pixel_values"] = torch.from_numpy(pixels_nCHW)
    _round(model, job.dtype)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0].float()
    return logits, f"transformers does not load it whole ({'; '.join(problems)})" if problems else None


def _ours(job: Job, settings: Any, ids_L: np.ndarray, pixels_nCHW: np.ndarray) -> torch.Tensor:
    """Logits [L, V] of the checkpoint."""
    from llava_mcore.data.loader import Piece, lay_out
    from llava_mcore.evaluation.pretrained import LlavaModel
    from llava_mcore.models.llava import ModelParts
    from llava_mcore.training.engine import forward_logits

    model = LlavaModel.from_pretrained(job.checkpoint)
    _round(model, job.dtype)
    slots = np.flatnonzero(ids_L == settings.image_token_id) if len(pixels_nCHW) else np.empty(0, dtype=np.int64)
    piece = Piece(ids_L, np.full_like(ids_L, -100), slots, pixels_nCHW)
    batch = lay_out([[piece]], len(ids_L), settings.vision.image_size)
    device = next(model.parameters()).device
    (logits,) = forward_logits(ModelParts([model]), [batch], [range(len(ids_L))], model.groups, device)
    return logits.cpu()


def _round(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Rounds weights to a type; they stay float32."""
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
