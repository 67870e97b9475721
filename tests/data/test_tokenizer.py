from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llava_mcore.data.errors import DatasetError
from llava_mcore.data.tokenizer import Tokenizer, load_tokenizer

TEXT = "USER: Which digit  is this?\nIt is é 日本."


def hf_folder(folder: Path, config: dict | None = None, post_processor: bool = True) -> Path:
    """A byte-level BPE tokenizer in Hugging Face's format."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 10, trainer)
    if post_processor:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["sentencepiece", "huggingface"])
def either(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path: Path) -> Tokenizer:
    if request.param == "sentencepiece":
        return tokenizer
    return load_tokenizer(hf_folder(tmp_path, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}))


def test_offsets_name_the_characters_of_each_token(either: Tokenizer) -> None:
    ids, offsets = either.encode(TEXT)
    assert len(ids) == len(offsets)
    assert either.decode(ids) == TEXT
    for token, (begin, end) in zip(ids, offsets, strict=True):
        decoded = either.decode([token])
        if decoded.strip() and "\ufffd" not in decoded:
            assert decoded.strip() == TEXT[begin:end].strip()
    covered = {place for begin, end in offsets for place in range(begin, end)}
    assert covered == set(range(len(TEXT)))


def test_eos_text_becomes_the_eos_id(either: Tokenizer) -> None:
    text = "It is.</s>USER: two</s></s>"
    ids, offsets = either.encode(text)
    spans = [offset for token, offset in zip(ids, offsets, strict=True) if token == either.eos_id]
    assert spans == [(6, 10), (19, 23), (23, 27)]
    assert either.eos_token == "</s>"


def test_no_special_tokens_are_added(either: Tokenizer) -> None:
    assert either.encode("") == ([], [])
    ids, _ = either.encode("digit")
    assert either.bos_id not in ids and either.eos_id not in ids


def test_saved_tokenizer_is_the_same(either: Tokenizer, tmp_path: Path) -> None:
    either.save(tmp_path / "saved")
    for again in (load_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(either))):
        assert again.encode(TEXT) == either.encode(TEXT)
        for name in ("bos_id", "eos_id", "eos_token", "vocab_size"):
            assert getattr(again, name) == getattr(either, name)


def test_token_id(either: Tokenizer) -> None:
    assert either.token_id("<image>") is not None
    assert either.token_id("</s>") == either.eos_id
    assert either.token_id("no such piece") is None
    assert 0 < either.token_id("<image>") < either.vocab_size


@pytest.mark.parametrize(
    ("config", "post_processor", "bos", "eos"),
    [
        (None, True, 0, 1),
        (None, False, 0, 1),
        ({"bos_token": "<s>", "eos_token": "</s>"}, True, 0, 1),
        ({"bos_token": None, "eos_token": "</s>"}, True, None, 1),  # Qwen
        ({"bos_token": "</s>", "eos_token": "</s>"}, True, None, 1),  # GPT-2: named, never written
        ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}, True, None, 1),
        ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}, False, 0, 1),
    ],
)
def test_hugging_face_bos_and_eos(tmp_path: Path, config: dict | None, post_processor: bool, bos: int | None, eos: int) -> None:
    loaded = load_tokenizer(hf_folder(tmp_path, config, post_processor))
    assert (loaded.bos_id, loaded.eos_id) == (bos, eos)


def test_eos_that_the_file_does_not_mark_as_one_token(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("It</s>")[0][-1] == loaded.eos_id == 1


def test_ids_from_generation_config(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [2, 1]}))
    assert load_tokenizer(tmp_path).eos_id == 2


def test_hugging_face_agrees_with_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(hf_folder(tmp_path))
    file = str(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>", eos_token="</s>")
    assert [ours.bos_id, *ours.encode(TEXT + "</s>")[0]] == theirs(TEXT + "</s>")["input_ids"]


def test_sentencepiece_ids_are_the_models_own(tokenizer: Tokenizer, sp_file: Path) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(sp_file))
    assert tokenizer.encode(TEXT)[0] == model.encode(TEXT)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 400)
    assert tokenizer.decode([1, *model.encode("It is a seven."), 2]) == "It is a seven."


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\x01garbage"])
def test_broken_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="data.tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
