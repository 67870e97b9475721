"""Where a generated answer ends: exactly where the learned one does, for every template."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llava_mcore.data.conversation import IGNORE, Rendering, encode_sample
from llava_mcore.data.templates import TEMPLATES
from llava_mcore.data.tokenizer import Tokenizer, load_tokenizer
from llava_mcore.evaluation.inference import AnswerEnd


@pytest.fixture(scope="module", params=[True, False], ids=["special", "plain text"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes; with the marks of ChatML as tokens of their own, which decoding leaves out, or without."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({piece: number for number, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", *(["<|im_start|>", "<|im_end|>"] if request.param else [])]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ends_where_the_learned_answer_does(tokenizer: Tokenizer, name: str) -> None:
    answer = "It is # a <seven>, s|im."
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": answer}]
    sample = encode_sample(turns, tokenizer, Rendering(name), media=[], image_token_id=0)
    learned = sample.labels[sample.labels != IGNORE].tolist()
    end = AnswerEnd(tokenizer, Rendering(name))
    assert [end.reached(learned[:length]) for length in range(len(learned) + 1)] == [False] * len(learned) + [True]
    assert end.text(learned).strip() == answer
    assert end.text(learned[:8]).strip() == answer[: 8 - (TEMPLATES[name].glue == " ")].strip()  # where generation is cut short
