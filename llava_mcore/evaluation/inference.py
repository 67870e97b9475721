"""A model that answers: loaded from a checkpoint into any layout, greedy decoding over packed prompts.

Every new token runs the whole sequence again (there is no key/value cache): simple, exact under every layout, and fast enough
to evaluate short answers, which is what it is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from llava_mcore.data.conversation import IGNORE, Rendering, answer_end
from llava_mcore.data.decode import Decoder
from llava_mcore.data.loader import Batch, Piece, lay_out
from llava_mcore.data.packing import pack
from llava_mcore.data.sample import Reading, positions_of
from llava_mcore.data.shards import ShardDataset
from llava_mcore.data.tokenizer import Tokenizer, load_tokenizer
from llava_mcore.geometry import Shape
from llava_mcore.models.initialize import initialize
from llava_mcore.models.llava import build_model
from llava_mcore.parallel import groups as process_groups
from llava_mcore.platform import device
from llava_mcore.settings import compose
from llava_mcore.settings.compose import SettingsError
from llava_mcore.settings.layouts import layout_problems
from llava_mcore.settings.schema import Settings
from llava_mcore.training import checkpoint_folder
from llava_mcore.training.checkpoint import load_model, sharding_metadata
from llava_mcore.training.engine import forward_logits


@dataclass
class Prompt:
    """A question ready for the model."""

    input_ids_L: np.ndarray  # int64, image_token_id at every image embedding
    pixels_nCHW: np.ndarray  # float32
    shapes: list[Shape]  # of the pictures and clips


class AnswerEnd:
    """Where an answer ends: at the end-of-sequence token, or with what the template writes instead, which is no part of it."""

    def __init__(self, tokenizer: Tokenizer, how: Rendering) -> None:
        self._tokenizer, self._text = tokenizer, answer_end(how)
        self._ids = tokenizer.encode(self._text)[0] if self._text else []

    def reached(self, ids: list[int]) -> bool:
        """Whether an answer of these ids is over."""
        if not ids or not self._text:
            return bool(ids) and ids[-1] == self._tokenizer.eos_id
        return ids[-1] == self._tokenizer.eos_id or self._has_ids(ids) or self._tokenizer.decode(ids).endswith(self._text)

    def text(self, ids: list[int]) -> str:
        """The answer without its end."""
        if self._has_ids(ids):  # a special token, that leaves no text, or one of several
            ids = ids[: -len(self._ids)]
        text = self._tokenizer.decode([number for number in ids if number != self._tokenizer.eos_id])
        return text.removesuffix(self._text)

    def _has_ids(self, ids: list[int]) -> bool:
        return bool(self._ids) and ids[-len(self._ids) :] == self._ids


class Inference:
    """One process's part of a model that answers.

    Args:
        settings: model, layout and how data becomes prompts.
        checkpoint: whose weights; None: random ones of ``train.seed``.

    Raises:
        SettingsError: the layout does not fit the model or the number of processes.
    """

    def __init__(self, settings: Settings, checkpoint: Path | None) -> None:
        self.settings = settings
        problems = layout_problems(settings, device.world_size())
        # Replicas answer each at its own pace; those that share experts would wait for each other for ever.
        for name in ("context", "expert", "virtual_pipeline"):
            if getattr(settings.parallel, name) > 1:
                problems.append(f"parallel.{name} must be 1 to generate; a checkpoint loads at any layout")
        if problems:
            raise SettingsError(problems)
        self.place = device.start(settings.parallel.timeout_minutes)
        self.groups = process_groups.build(settings.parallel)
        self.model = (
            build_model(settings.model, settings.parallel, settings.train.dtype, self.groups).to(self.place.device).eval()
        )
        if checkpoint is None:
            initialize(self.model, settings.train.seed, sharding_metadata(self.groups))
        else:
            load_model(checkpoint, self.model, self.groups)
        self.tokenizer: Tokenizer = load_tokenizer(settings.data.tokenizer or "")
        model = settings.model
        self._reading = Reading.from_settings(self.tokenizer, settings.data, model.geometry, model.image_token_id)
        self._end = AnswerEnd(self.tokenizer, self._reading.how)
        self._decoder = Decoder.from_settings(settings.data, model.geometry)

    def prompt(self, dataset: ShardDataset, index: int) -> Prompt:
        """The last question of a sample of a dataset.

        Raises:
            SampleError: there is none, or a medium cannot be decoded.
        """
        ids = self._reading.encode_prompt(dataset, index, dataset.read_record(index))
        return Prompt(ids, self._reading.pixels(self._decoder, dataset, index), self._reading.shapes(dataset, index))

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """The answers to this replica's prompts, greedy; every rank of the replica calls it with the same prompts.

        An answer ends with the end-of-sequence token, with what the template ends it by, at ``max_new_tokens``, or where the
        stream is full or the decoder's positions are at their end.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        for _ in range(max_new_tokens):
            active = [
                number
                for number in active
                if len(prompts[number].input_ids_L) + len(answers[number]) <= self._room(prompts[number])
                and not self._end.reached(answers[number])
            ]
            if not active:
                break
            for number, token in zip(
                active, self._next_tokens([prompts[n] for n in active], [answers[n] for n in active]), strict=True
            ):
                answers[number].append(token)
        return [self._end.text(answer) for answer in answers]

    def _room(self, prompt: Prompt) -> int:
        """The most tokens of a prompt and its answer."""
        model = self.settings.model
        beside = len(prompt.pixels_nCHW) * model.geometry.skipped
        return min(self.settings.data.sequence_length, model.language.max_position_embeddings - beside)

    def _next_tokens(self, prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> list[int]:
        """The likeliest next token of each sequence, the same on every rank of the replica."""
        capacity, image = self.settings.data.sequence_length, self.settings.model.image_token_id
        geometry = self.settings.model.geometry
        pieces = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = np.concatenate([prompt.input_ids_L, np.array(answer, dtype=np.int64)])
            slots = np.flatnonzero(prompt.input_ids_L == image) if len(prompt.pixels_nCHW) else np.empty(0, dtype=np.int64)
            positions = positions_of(len(ids), slots, geometry, prompt.shapes)
            pieces.append(Piece(ids, np.full_like(ids, IGNORE), slots, prompt.pixels_nCHW, prompt.shapes, positions))
        streams = pack([len(piece.input_ids_L) for piece in pieces], capacity)
        batches, lasts, order = [], [], []
        for batch, members in self._micro_batches(streams, pieces):
            batches.append(batch)
            order += [number for stream in members for number in stream]
            lasts.append(_last_tokens(members, pieces, capacity))
        logits = forward_logits(self.model, batches, lasts, self.groups, self.place.device)
        chosen = torch.empty(len(pieces), dtype=torch.int64, device=self.place.device)
        if self.groups.is_last_stage:
            chosen[torch.tensor(order, device=chosen.device)] = torch.cat(logits).argmax(dim=-1)
        if self.groups.pp.size() > 1:
            dist.broadcast(chosen, src=self.groups.last_stage_rank, group=self.groups.pp)
        return chosen.tolist()

    def _micro_batches(self, streams: list[list[int]], pieces: Sequence[Piece]) -> Iterator[tuple[Batch, list[list[int]]]]:
        """Micro-batches of one length, with the numbers of the pieces in each of their streams."""
        per_batch = self.settings.train.micro_batch_size
        for first in range(0, len(streams), per_batch):
            members = streams[first : first + per_batch]
            members += [[] for _ in range(per_batch - len(members))]
            filled = [[pieces[number] for number in stream] for stream in members]
            yield lay_out(filled, self.settings.data.sequence_length, self.settings.model.vision.image_size), members


def _last_tokens(members: Sequence[Sequence[int]], pieces: Sequence[Piece], capacity: int) -> list[int]:
    """Where in a micro-batch each piece ends."""
    found = []
    for place, stream in enumerate(members):
        at = place * capacity
        for number in stream:
            at += len(pieces[number].input_ids_L)
            found.append(at - 1)
    return found


def settings_of(checkpoint: Path, overrides: Sequence[str]) -> Settings:
    """The settings a checkpoint was saved with, its own tokenizer, and overrides on top. The layout is not taken over.

    An imported checkpoint holds only the model's; the other groups then have their defaults.

    Raises:
        CheckpointError: no checkpoint of this project.
        SettingsError: naming every problem found.
    """
    stored = checkpoint_folder.read_settings(checkpoint_folder.require_checkpoint(checkpoint))
    values = {"data": {}, "train": {"lr": 1.0}, **stored, "parallel": {}}  # nothing is trained here; lr is only required
    tokenizer = checkpoint / checkpoint_folder.TOKENIZER
    if tokenizer.is_dir():
        values["data"] = {**values["data"], "tokenizer": str(tokenizer)}
    return compose.from_stored(values, overrides)
