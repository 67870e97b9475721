"""One face for the two kinds of tokenizer files: Hugging Face's ``tokenizer.json`` and SentencePiece's bare ``tokenizer.model``.

``encode`` never adds BOS or EOS by itself and gives character offsets, which the label rule of ``conversation`` needs. Their
texts (``<s>``, ``</s>``) inside a text always become their ids: SentencePiece would spell them out, so texts
are cut there and each piece is encoded on its own, which is what LLaVA's ``LlamaTokenizer`` does too.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from llava_mcore.data.errors import DatasetError

HF_FILE = "tokenizer.json"
SP_FILE = "tokenizer.model"
# Files that say something about a tokenizer beside the tokenizer itself; they travel with it in ``save``.
SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)

Offsets = list[tuple[int, int]]


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer."""

    bos_id: int | None
    eos_id: int | None
    bos_token: str | None
    eos_token: str | None
    vocab_size: int

    @property
    def digest(self) -> str:
        """Of everything that decides which ids a text becomes."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The jinja template that stands beside it."""
        ...

    @property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token``, ``eos_token``, ... as the files beside it spell them."""
        ...

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        """Token ids, without BOS and EOS, and the characters [begin, end) of ``text`` that each stands for."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of some ids, special tokens left out."""
        ...

    def token_id(self, piece: str) -> int | None:
        """The id of one piece of the vocabulary, None if it is not in it."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes the files this tokenizer came from, so that ``load_tokenizer(folder)`` gives the same one."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        path: a folder with ``tokenizer.json`` (preferred) or ``tokenizer.model``, or such a file.

    Raises:
        DatasetError: there is nothing at ``path``, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (HF_FILE, SP_FILE) if (path / name).is_file()]
        if not found:
            raise DatasetError(f"{path} holds neither {HF_FILE} nor {SP_FILE}; point data.tokenizer at a folder that does")
        file = found[0]
    elif path.is_file():
        file = path
    else:
        raise DatasetError(f"no tokenizer at {path}: no such file or folder; check data.tokenizer")
    side = {name: file.with_name(name).read_bytes() for name in SIDE_FILES if file.with_name(name).is_file()}
    data = file.read_bytes()
    kind = HuggingFaceTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    try:
        return kind(data, side)
    except DatasetError:
        raise
    except Exception as error:  # the libraries raise anything from RuntimeError to bare Exception
        wanted = "Hugging Face tokenizer.json" if kind is HuggingFaceTokenizer else "SentencePiece model"
        raise DatasetError(
            f"{file} is not a readable {wanted} ({str(error).splitlines()[0]}); copy it again from its source"
        ) from error


class _Files(ABC):
    """The bytes a tokenizer was made of: kept, so that it can be saved after its source is gone, and pickled."""

    own_name: str

    def __init__(self, data: bytes, side: dict[str, bytes]) -> None:
        self._data = data
        self._side = side
        self._build()

    @abstractmethod
    def _build(self) -> None: ...

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for name, data in sorted({self.own_name: self._data, **self._side}.items()):
            digest.update(json.dumps([name, len(data)]).encode() + data)
        return digest.hexdigest()

    def _configs(self) -> list[dict[str, Any]]:
        """The side files that are JSON objects, those that outrank others first."""
        names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
        loaded = []
        for name in names:
            try:
                loaded.append(json.loads(self._side.get(name, b"{}")))
            except ValueError as error:
                raise DatasetError(f"{name} beside {self.own_name} is not JSON ({error})") from error
        return [config for config in loaded if isinstance(config, dict)]

    @cached_property
    def chat_template(self) -> str | None:
        """The jinja template that stands beside the tokenizer."""
        if "chat_template.jinja" in self._side:
            return self._side["chat_template.jinja"].decode("utf-8")
        found = self._configs()[0].get("chat_template")
        if isinstance(found, list):  # several, by name
            found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
        return found

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token``, ``eos_token``, ... as the files beside the tokenizer spell them."""
        found: dict[str, str] = {}
        for config in self._configs():
            for name, token in config.items():
                spelled = token.get("content") if isinstance(token, dict) else token
                if re.fullmatch("(bos|eos|unk|sep|pad|cls|mask)_token", name) and isinstance(spelled, str):
                    found.setdefault(name, spelled)
        return found

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in {self.own_name: self._data, **self._side}.items():
            (folder / name).write_bytes(data)

    def __getstate__(self) -> dict[str, Any]:
        return {"_data": self._data, "_side": self._side}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._data, self._side = state["_data"], state["_side"]
        self._build()


class HuggingFaceTokenizer(_Files):
    """``tokenizer.json``, read by the ``tokenizers`` library."""

    own_name = HF_FILE

    def _build(self) -> None:
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_str(self._data.decode("utf-8"))
        self._backend.no_truncation()
        self._backend.no_padding()
        # Ids may have gaps, and then the count of pieces is not the size of the table.
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = self._special("eos", ("</s>",))
        self.eos_token = None if self.eos_id is None else self._backend.id_to_token(self.eos_id)
        if self.eos_token is not None:  # where the file does not say that this is one token, its text would be spelled out
            self._backend.add_special_tokens([self.eos_token])
        self.bos_id = self._special("bos", ("<s>",))
        if self.bos_id is not None and not self._adds_bos(self.bos_id):
            self.bos_id = None
        self.bos_token = None if self.bos_id is None else self._backend.id_to_token(self.bos_id)

    def _special(self, name: str, usual: tuple[str, ...]) -> int | None:
        """The id of the ``name`` token as the files beside the tokenizer give it, else of a usual spelling."""
        spelled = False
        for config in self._configs():
            spelled = spelled or f"{name}_token" in config
            token = config.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                found = self.token_id(token)
                if found is None:
                    raise DatasetError(f"{name}_token {token!r} of the tokenizer's configuration is not in {HF_FILE}")
                return found
            ids = config.get(f"{name}_token_id")
            if ids is not None and not spelled:
                return int(ids[0] if isinstance(ids, list) else ids)
        if spelled:  # named, and null: there is none
            return None
        return next((found for token in usual if (found := self.token_id(token)) is not None), None)

    def _adds_bos(self, bos_id: int) -> bool:
        """Whether Hugging Face would put BOS in front: GPT-2-like tokenizers name one and never write it."""
        explicit = next((config["add_bos_token"] for config in self._configs() if "add_bos_token" in config), None)
        if explicit is not None:
            return bool(explicit)
        if self._backend.post_processor is None:
            return True
        return self._backend.encode("a", add_special_tokens=True).ids[:1] == [bos_id]

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_id(self, piece: str) -> int | None:
        return self._backend.token_to_id(piece)


class SentencePieceTokenizer(_Files):
    """A bare SentencePiece model."""

    own_name = SP_FILE

    def _build(self) -> None:
        from sentencepiece import SentencePieceProcessor

        if not self._data:
            raise DatasetError(f"{SP_FILE} is empty; copy it again from its source")
        self._backend = SentencePieceProcessor(model_proto=self._data)
        self.vocab_size = self._backend.get_piece_size()
        self.bos_id = self._backend.bos_id() if self._backend.bos_id() >= 0 else None
        self.eos_id = self._backend.eos_id() if self._backend.eos_id() >= 0 else None
        self.bos_token = None if self.bos_id is None else self._backend.id_to_piece(self.bos_id)
        self.eos_token = None if self.eos_id is None else self._backend.id_to_piece(self.eos_id)
        self._control = {
            token: number
            for token, number in ((self.bos_token, self.bos_id), (self.eos_token, self.eos_id))
            if token is not None and number is not None
        }

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        ids: list[int] = []
        offsets: Offsets = []
        begin = 0
        pieces = re.split(f"({'|'.join(map(re.escape, self._control))})", text) if self._control else [text]
        for piece in pieces:
            if piece in self._control:
                ids.append(self._control[piece])
                offsets.append((begin, begin + len(piece)))
                begin += len(piece)
            elif piece:
                mapping = self._backend.encode(piece, out_type="offset_mapping")
                ids.extend(mapping["ids"])
                offsets.extend((begin + first, begin + last) for first, last in mapping["offsets"])
                begin += len(piece)
        return ids, offsets

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode([int(i) for i in ids])

    def token_id(self, piece: str) -> int | None:
        found = self._backend.piece_to_id(piece)
        return found if self._backend.id_to_piece(found) == piece else None
