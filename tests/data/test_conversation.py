from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from llava_mcore.data.conversation import IGNORE, encode_conversation, encode_prompt, render
from llava_mcore.data.errors import SampleError
from llava_mcore.data.tokenizer import Tokenizer, load_tokenizer

IMAGE_ID = 3
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]


def encode(conversations: Any, tokenizer: Tokenizer, template: str = "vicuna_v1", images: int = 0, each: int = 4):
    return encode_conversation(
        conversations, tokenizer, template, num_images=images, image_tokens_each=each, image_token_id=IMAGE_ID
    )


def text_of(tokenizer: Tokenizer, sample: Any) -> str:
    """What the supervised labels spell, EOS shown."""
    labels = [int(label) for label in sample.labels if label != IGNORE]
    return "".join("</s>" if label == tokenizer.eos_id else tokenizer.decode([label]) for label in labels)


class LlavaOracle:
    """LLaVA's own preprocessing, restated: a legacy LlamaTokenizer and labels by counting tokens."""

    image = -200

    def __init__(self, model: sentencepiece.SentencePieceProcessor) -> None:
        self.model = model

    def tokenize(self, text: str) -> list[int]:
        ids = [self.model.bos_id()]
        for number, piece in enumerate(text.split("</s>")):
            ids += [self.model.eos_id()] * (number > 0) + self.model.encode(piece)
        return ids

    def tokenizer_image_token(self, prompt: str) -> list[int]:
        chunks = [self.tokenize(chunk) for chunk in prompt.split("<image>")]
        ids = chunks[0][:1]
        for number, chunk in enumerate(chunks):
            ids += [self.image] * (number > 0) + chunk[1:]
        return ids

    def preprocess_v1(self, conversations: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        prompt = SYSTEM + " "
        for turn in conversations:
            value = turn["value"]
            if "<image>" in value:
                value = ("<image>\n" + value.replace("<image>", "").strip()).strip()
            prompt += "USER: " + value + " " if turn["from"] == "human" else "ASSISTANT: " + value + "</s>"
        ids = self.tokenizer_image_token(prompt)
        target = list(ids)
        target[0] = IGNORE
        position = 1
        for part in prompt.split("</s>"):
            if part == "":
                break
            instruction = part.split(" ASSISTANT: ")[0] + " ASSISTANT: "
            length = len(self.tokenizer_image_token(part))
            masked = len(self.tokenizer_image_token(instruction)) - 2
            target[position : position + masked] = [IGNORE] * masked
            position += length
        target[position:] = [IGNORE] * (len(target) - position)
        assert position == len(ids), "LLaVA would mask the whole sample"
        return ids, target

    def preprocess_plain(self, conversations: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        ids = self.tokenizer_image_token("<image>" + conversations[1]["value"] + "\n")
        masked = len(self.tokenizer_image_token("<image>"))
        return ids, [IGNORE] * masked + ids[masked:]


@pytest.fixture(scope="module")
def oracle(sp_file: Path) -> LlavaOracle:
    return LlavaOracle(sentencepiece.SentencePieceProcessor(model_file=str(sp_file)))


CONVERSATIONS = [
    turns("<image>\nWhich digit is this?", "It is a seven."),
    turns("Which digit is this?\n<image>", "It is a seven."),
    turns("Which digit <image> is this?", "It is a seven.", "And this?", "A dog, and 日本 é!"),
    turns("What is the cat doing?", " It sleeps. ", "Why?", "It is  old.\nAnd tired."),
    turns("<image>", "7"),
    turns("One: a", "b", "c", "d", "e", "f\n"),
]


@pytest.mark.parametrize("conversations", CONVERSATIONS)
def test_vicuna_equals_llava(tokenizer: Tokenizer, oracle: LlavaOracle, conversations: list[dict[str, str]]) -> None:
    images = sum(turn["value"].count("<image>") for turn in conversations)
    ids, target = oracle.preprocess_v1(conversations)
    ours = encode(conversations, tokenizer, images=images, each=1)
    assert ours.input_ids.tolist() == [IMAGE_ID if token == oracle.image else token for token in ids]
    assert ours.labels.tolist() == [*target[1:], IGNORE]
    assert (ours.labels != IGNORE).any()


@pytest.mark.parametrize("caption", ["A photograph of a cat", " two people ", "日本 é", "a\nb"])
def test_plain_equals_llava(tokenizer: Tokenizer, oracle: LlavaOracle, caption: str) -> None:
    conversations = turns("<image>\nDescribe the picture.", caption)
    ids, target = oracle.preprocess_plain(conversations)
    ours = encode(conversations, tokenizer, "plain", images=1, each=1)
    assert ours.input_ids.tolist() == [IMAGE_ID if token == oracle.image else token for token in ids]
    # Pre-shifted, so what stands at the picture predicts the caption's first token; the picture itself is never predicted.
    assert ours.labels.tolist() == [*target[1:], IGNORE]


def test_hugging_face_form_of_the_same_model_agrees(tokenizer: Tokenizer, sp_file: Path, tmp_path: Path) -> None:
    """The same model as a Llama-like tokenizer.json: same ids and labels, from another library's offsets."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    proto = sentencepiece_model_pb2.ModelProto.FromString(sp_file.read_bytes())
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    rank = {piece.piece: -piece.score for piece in proto.pieces if piece.type == 1}
    merges = sorted(
        (rank[piece], piece[:cut], piece[cut:])
        for piece in rank
        for cut in range(1, len(piece))
        if piece[:cut] in rank and piece[cut:] in rank
    )
    backend = Backend(models.BPE(vocab, [merge[1:] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>", "<image>")])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id) == (1, 2)
    for conversations in CONVERSATIONS:
        images = sum(turn["value"].count("<image>") for turn in conversations)
        theirs, ours = (encode(conversations, each, images=images) for each in (loaded, tokenizer))
        assert theirs.input_ids.tolist() == ours.input_ids.tolist()
        assert theirs.labels.tolist() == ours.labels.tolist()


def test_rendered_text() -> None:
    rendered = "".join(segment.text for segment in render(turns("<image>\nq", "a", "q2", "a2"), "vicuna_v1", "</s>"))
    assert rendered == f"{SYSTEM} USER: <image>\nq ASSISTANT: a</s>USER: q2 ASSISTANT: a2</s>"
    assert "".join(segment.text for segment in render(turns("<image>\nq", "a"), "plain")) == "<image>a\n"
    supervised = [segment.text for segment in render(turns("q", "a", "q2", "a2"), "vicuna_v1", "</s>") if segment.supervised]
    assert supervised == [" a</s>", " a2</s>"]


def test_answers_and_their_ends_are_learned(tokenizer: Tokenizer) -> None:
    sample = encode(turns("Which digit?", "It is a seven.", "And?", "a dog"), tokenizer)
    assert text_of(tokenizer, sample).replace(" ", "") == "Itisaseven.</s>adog</s>"
    assert sample.input_ids[0] == tokenizer.bos_id
    shifted = np.flatnonzero(sample.labels != IGNORE)
    assert (sample.labels[shifted] == sample.input_ids[shifted + 1]).all()


@pytest.mark.parametrize("each", [1, 4, 9])
def test_one_placeholder_per_embedding(tokenizer: Tokenizer, each: int) -> None:
    sample = encode(turns("first <image> then <image> end", "It is."), tokenizer, images=2, each=each)
    assert (sample.input_ids[sample.image_slots] == IMAGE_ID).all()
    assert len(sample.image_slots) == 2 * each
    first, second = sample.image_slots[:each], sample.image_slots[each:]
    assert (np.diff(first) == 1).all() and (np.diff(second) == 1).all() and second[0] > first[-1] + 1
    before = tokenizer.decode(sample.input_ids[: first[0]].tolist())
    assert before.endswith("USER: first ")  # several pictures keep their places
    assert not np.isin(sample.labels, IMAGE_ID).any()


def test_image_in_an_answer_is_not_predicted(tokenizer: Tokenizer) -> None:
    sample = encode(turns("q", "see <image> <image> here"), tokenizer, images=2)
    assert not np.isin(sample.labels, IMAGE_ID).any()
    assert text_of(tokenizer, sample).replace(" ", "") == "seehere</s>"


def test_text_only(tokenizer: Tokenizer) -> None:
    sample = encode(turns("q", "a"), tokenizer)
    assert sample.image_slots.shape == (0,) and not np.isin(sample.input_ids, IMAGE_ID).any()


def test_leading_answer_is_dropped_as_in_llava(tokenizer: Tokenizer) -> None:
    led = [{"from": "gpt", "value": "Hello"}, *turns("q", "a")]
    assert encode(led, tokenizer).input_ids.tolist() == encode(turns("q", "a"), tokenizer).input_ids.tolist()


@pytest.mark.parametrize(
    ("conversations", "images", "template", "reason"),
    [
        (None, 0, "vicuna_v1", "no `conversations`"),
        ("text", 0, "vicuna_v1", "no `conversations`"),
        ([], 0, "vicuna_v1", "empty"),
        ([{"from": "gpt", "value": "a"}], 0, "vicuna_v1", "empty"),
        ([{"from": "human"}, {"from": "gpt", "value": "a"}], 0, "vicuna_v1", "turn 1 is not"),
        (["q", "a"], 0, "vicuna_v1", "turn 1 is not"),
        ([{"from": "robot", "value": "q"}, {"from": "gpt", "value": "a"}], 0, "vicuna_v1", "unknown role 'robot'"),
        ([*turns("q", "a"), {"from": "system", "value": "s"}], 0, "vicuna_v1", "system prompt can only come first"),
        ([{"from": "system", "value": "s"}, *turns("q", "a")], 0, "plain", "template plain has no place for"),
        ([{"from": "human", "value": "q"}] * 2 + [{"from": "gpt", "value": "a"}], 0, "vicuna_v1", "do not alternate at turn 2"),
        (turns("q", "a", "q"), 0, "vicuna_v1", "ends with a human turn"),
        (turns("q", "  "), 0, "vicuna_v1", r"turn 2 \(gpt\) has no text"),
        (turns("", "a"), 0, "vicuna_v1", r"turn 1 \(human\) has no text"),
        (turns("<image>\nq", "a"), 0, "vicuna_v1", "1 `<image>` in the text, but 0 pictures"),
        (turns("q", "a"), 1, "vicuna_v1", "0 `<image>` in the text, but 1 pictures"),
        (turns("<image><image> q", "a"), 1, "vicuna_v1", "2 `<image>` in the text, but 1 pictures"),
        (turns("q", "a", "q", "a"), 0, "plain", "4 turns, but this template takes 2"),
    ],
)
def test_bad_conversations(tokenizer: Tokenizer, conversations: Any, images: int, template: str, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        encode(conversations, tokenizer, template, images=images)


def test_picture_id_in_text_is_refused(tokenizer: Tokenizer) -> None:
    digit = tokenizer.encode("seven")[0][0]
    with pytest.raises(SampleError, match="kept for pictures"):
        encode_conversation(
            turns("seven", "seven"), tokenizer, "vicuna_v1", num_images=0, image_tokens_each=4, image_token_id=digit
        )


def test_template_that_needs_eos(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="end-of-sequence"):
        render(turns("q", "a"), "vicuna_v1", None)


@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
def test_prompt_is_the_beginning_of_the_training_sample(tokenizer: Tokenizer, template: str) -> None:
    conversations = turns("<image>\nWhich digit is this?", "It is a seven.")
    prompt = encode_prompt(conversations, tokenizer, template, num_images=1, image_tokens_each=4, image_token_id=IMAGE_ID)
    sample = encode(conversations, tokenizer, template, images=1)
    assert prompt.tolist() == sample.input_ids[: len(prompt)].tolist()
    first = int(np.flatnonzero(sample.labels != IGNORE)[0])
    assert len(prompt) == first + 1  # the first prediction is made at the prompt's last token
    opened = encode_prompt(conversations[:1], tokenizer, template, num_images=1, image_tokens_each=4, image_token_id=IMAGE_ID)
    assert opened.tolist() == prompt.tolist()


def test_prompt_keeps_earlier_turns(tokenizer: Tokenizer) -> None:
    prompt = encode_prompt(
        turns("q", "a", "q2"), tokenizer, "vicuna_v1", num_images=0, image_tokens_each=4, image_token_id=IMAGE_ID
    )
    assert tokenizer.decode([t for t in prompt.tolist() if t > 2]).endswith("USER: q ASSISTANT: a USER: q2 ASSISTANT:")
    with pytest.raises(SampleError, match="no human turn"):
        encode_prompt([], tokenizer, "vicuna_v1", num_images=0, image_tokens_each=4, image_token_id=IMAGE_ID)
