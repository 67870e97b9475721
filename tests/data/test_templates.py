"""Renderings as LLaVA documents them, labels by the reference's rules, and a tokenizer's own template against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llava_mcore.data.conversation import (
    IGNORE,
    Medium,
    Rendering,
    encode_prompt_of,
    encode_sample,
    render,
)
from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.templates import CHAT_TEMPLATE, TEMPLATES
from llava_mcore.data.tokenizer import Tokenizer, load_tokenizer
from llava_mcore.settings.schema import TemplateName

CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
)
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
QWEN = "<|im_start|>user\n<image>\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n"
IMAGE_ID = 0


def chatml(system: str) -> str:
    return (
        f"<|im_start|>system\n{system}<|im_end|><|im_start|>user\n<image>\nq<|im_end|><|im_start|>assistant\na<|im_end|>"
        "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\na2<|im_end|>"
    )


def vicuna(who: str) -> str:
    return CURIOUS.format(who) + f"answers to the {who}'s questions. USER: <image>\nq ASSISTANT: a</s>USER: q2 ASSISTANT: a2</s>"


# Two rounds: (the whole text, what is learned by the default rule).
RENDERED = {
    "v0": (
        CURIOUS.format("human") + "answers to the human's questions.\n\n### Human: <image>\nq\n### Assistant: a\n### Human: q2\n"
        "### Assistant: a2\n###",
        [" a\n###", " a2\n###"],
    ),
    "v1": (vicuna("user"), [" a</s>", " a2</s>"]),
    "vicuna_v1": (vicuna("user"), [" a</s>", " a2</s>"]),
    "llava_v1": (vicuna("human"), [" a</s>", " a2</s>"]),
    "llava_llama_2": (
        f"[INST] <<SYS>>\n{HELPFUL}\n<</SYS>>\n\n<image>\nq [/INST] a </s><s>[INST] q2 [/INST] a2 </s>",
        [" a </s>", " a2 </s>"],
    ),
    "mistral_instruct": ("[INST] <image>\nq [/INST] a </s>[INST] q2 [/INST] a2 </s>", [" a </s>", " a2 </s>"]),
    "chatml": (chatml("Answer the questions."), ["a<|im_end|>", "a2<|im_end|>"]),
    "mpt": (chatml(MPT), ["a<|im_end|>", "a2<|im_end|>"]),
    **{
        name: (
            f"<|im_start|>system\n{system}<|im_end|>\n{QWEN}<|im_start|>assistant\na2<|im_end|>\n",
            ["a<|im_end|>", "a2<|im_end|>"],
        )
        for name, system in (
            ("qwen_1_5", "You are a helpful assistant."),
            ("qwen_2", "You are a helpful assistant."),
            ("qwen_2_5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        )
    },
}


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    said = [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]
    return said if system is None else [{"from": "system", "value": system}, *said]


def learned(segments: Any) -> list[str]:
    """Neighbouring learned segments, joined."""
    joined: list[str] = []
    open_ = False
    for segment in segments:
        if segment.supervised and open_:
            joined[-1] += segment.text
        elif segment.supervised:
            joined.append(segment.text)
        open_ = segment.supervised
    return joined


def test_settings_name_every_template() -> None:
    assert set(get_args(TemplateName)) == set(TEMPLATES) | {CHAT_TEMPLATE}
    assert set(RENDERED) | {"plain", "plain_eos"} == set(TEMPLATES)


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_as_documented(name: str) -> None:
    segments = render(turns("<image>\nq", "a", "q2", "a2"), name, "</s>", "<s>")
    text, answers = RENDERED[name]
    assert "".join(segment.text for segment in segments) == text
    assert learned(segments) == answers
    # A prompt is the beginning of it, up to where the answer begins.
    prompt = "".join(segment.text for segment in render(turns("<image>\nq", "a", "q2"), name, "</s>", "<s>"))
    assert text.startswith(prompt) and text[len(prompt) :].lstrip().startswith("a2")


def test_captions() -> None:
    assert [(s.text, s.supervised) for s in render(turns("Say: <image>", "a"), "plain")] == [("<image>", False), ("a\n", True)]
    assert [s.text for s in render(turns("Say: <image>", "a"), "plain_eos", "</s>")] == ["<image>", "a</s>"]


@pytest.mark.parametrize("name", ["v1", "llava_llama_2", "qwen_2"])
def test_system_prompts(name: str) -> None:
    def text(how: Rendering, system: str | None) -> str:
        return "".join(segment.text for segment in render(turns("q", "a", system=system), how, "</s>", "<s>"))

    own = TEMPLATES[name].system
    assert text(Rendering(name, "Be brief."), None) == text(Rendering(name), None).replace(own, "Be brief.")
    assert text(Rendering(name, "Be brief."), "Rhyme.") == text(Rendering(name), None).replace(own, "Rhyme.")
    assert text(Rendering("mistral_instruct"), "Rhyme.").startswith("[INST] <<SYS>>\nRhyme.\n<</SYS>>\n\nq [/INST]")


def test_a_template_that_needs_a_token_the_tokenizer_lacks() -> None:
    with pytest.raises(ValueError, match="beginning-of-sequence"):
        render(turns("q", "a", "q", "a"), "llava_llama_2", "</s>", None)


# ---- a byte-level tokenizer with ChatML's tokens ----

OWN_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ["It is a seven.<|im_end|>", "Two & more<|im_end|>"],
    ),
    "llama": (
        "{{ bos_token }}{% for message in messages %}\n{%- if message['role'] == 'system' %}{{ '<<SYS>>' + message['content'] }}"
        "\n    {%- elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
        "\n    {%- else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
        [" It is a seven. </s>", " Two & more </s>"],
    ),
    "generation": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}A:{% generation %}{{ message['content'] }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ message['role'] }}:{{ message['content'] | tojson }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
        ["It is a seven.</s>", "Two & more</s>"],
    ),
}
CHAT = turns("<image>\nWhich digit?", "It is a seven.", "How <many>?", "Two & more", system="Be brief.")
MESSAGES = [
    {"role": {"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in CHAT
]


def byte_tokenizer(folder: Path, template: str | None = None) -> Path:
    """A byte-level tokenizer.json with special tokens and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<image>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>"]
    backend = Backend(models.BPE({piece: number for number, piece in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def bytes_of(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


def spelled(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer._backend.decode([int(token) for token in ids], skip_special_tokens=False))


@pytest.mark.parametrize("name", OWN_TEMPLATES)
def test_own_template_equals_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    template, answers = OWN_TEMPLATES[name]
    tokenizer = load_tokenizer(byte_tokenizer(tmp_path, template))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    sample = encode_sample(
        CHAT, tokenizer, Rendering(CHAT_TEMPLATE), media=[Medium("picture", 1)], image_token_id=tokenizer.token_id("<image>")
    )
    expected = theirs.apply_chat_template(MESSAGES, tokenize=True, return_dict=True)
    assert sample.input_ids.tolist() == list(expected["input_ids"])
    assert spelled(tokenizer, sample.labels[sample.labels != IGNORE]) == "".join(answers)
    prompt = encode_prompt_of(CHAT, tokenizer, Rendering(CHAT_TEMPLATE), media=[Medium("picture", 1)], image_token_id=IMAGE_ID)
    opened = theirs.apply_chat_template(MESSAGES[:-1], tokenize=True, add_generation_prompt=True, return_dict=True)
    assert prompt.tolist() == list(opened["input_ids"])
    if name == "generation":
        mask = theirs.apply_chat_template(MESSAGES, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert (sample.labels != IGNORE)[:-1].tolist() == [bool(one) for one in mask["assistant_masks"]][1:]


def test_own_templates_that_cannot_be_used(tmp_path: Path, bytes_of: Tokenizer) -> None:
    def encode(template: str, name: str) -> None:
        tokenizer = load_tokenizer(byte_tokenizer(tmp_path / name, template))
        encode_sample(turns("q", "a", "q", "b"), tokenizer, Rendering(CHAT_TEMPLATE), media=[], image_token_id=IMAGE_ID)

    with pytest.raises(DatasetError, match="has no chat template"):
        encode_sample(turns("q", "a"), bytes_of, Rendering(CHAT_TEMPLATE), media=[], image_token_id=IMAGE_ID)
    with pytest.raises(DatasetError, match="no jinja"):
        encode("{% for %}", "broken")
    with pytest.raises(SampleError, match="refuses it: no such thing"):
        encode("{{ raise_exception('no such thing') }}", "refusing")
    with pytest.raises(SampleError, match="generation"):  # answers before the last are left out
        encode("{{ messages[-1]['content'] }}", "forgetful")


def test_published_rule_of_qwen(bytes_of: Tokenizer) -> None:
    """LLaVA-NeXT's preprocess_qwen: answer blocks as a whole, and every <|im_start|>, <|im_end|> and newline token."""
    conversations = turns("one\ntwo", "a\nb")
    sample = encode_sample(
        conversations, bytes_of, Rendering("qwen_2", label_rule="published"), media=[], image_token_id=IMAGE_ID
    )
    blocks = [
        ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False),
        ("<|im_start|>user\none\ntwo<|im_end|>\n", False),
        ("<|im_start|>assistant\na\nb<|im_end|>\n", True),
    ]
    kept = {bytes_of.encode(text)[0][0] for text in ("<|im_start|>", "<|im_end|>", "\n")}
    ids, target = [], []
    for text, answer in blocks:
        block = bytes_of.encode(text)[0]
        ids += block
        target += [token if answer or token in kept else IGNORE for token in block]
    assert sample.input_ids.tolist() == ids
    assert sample.labels.tolist() == [*target[1:], IGNORE]


def test_published_rule_of_v0() -> None:
    """LLaVA's preprocess: everything but the header and the questions; a question's ### is learned."""
    segments = render(turns("q", "a", "q2", "a2"), Rendering("v0", label_rule="published"))
    assert learned(segments) == ["###", "### Assistant: a\n###", "### Assistant: a2\n###"]


# ---- media ----


def encode(tokenizer: Tokenizer, text: str, media: list[Medium], **how: Any) -> Any:
    return encode_sample(turns(text, "It is."), tokenizer, Rendering("chatml", **how), media=media, image_token_id=IMAGE_ID)


def test_media_of_all_kinds_in_one_sample(bytes_of: Tokenizer) -> None:
    media = [Medium("picture", 3), Medium("sound"), Medium("video", 8), Medium("picture", 5)]
    sample = encode(bytes_of, "a <image> b <audio> c <video> d <image> e", media)
    runs = np.split(sample.image_slots, np.flatnonzero(np.diff(sample.image_slots) > 1) + 1)
    assert [len(run) for run in runs] == [3, 8, 5]
    assert (sample.input_ids[sample.image_slots] == IMAGE_ID).all() and not np.isin(sample.labels, IMAGE_ID).any()
    between = bytes_of.decode(sample.input_ids[runs[0][-1] + 1 : runs[1][0]].tolist())
    assert between == " b  c "  # the sound takes no place yet
    # LLaVA's data writes <image> for videos too, and nothing for a sound that is only carried along.
    assert encode(bytes_of, "a <image> b  c <image> d <image> e", media).input_ids.tolist() == sample.input_ids.tolist()


def test_html_is_no_placeholder(bytes_of: Tokenizer) -> None:
    sample = encode(bytes_of, "What does <video> do, and <audio>?", [])
    assert "<video> do, and <audio>?" in bytes_of.decode(sample.input_ids.tolist())


@pytest.mark.parametrize(
    ("text", "media", "reason"),
    [
        ("<video> x", [Medium("picture", 1)], "0 `<image>` in the text, but 1 pictures"),
        (
            "<image> x",
            [Medium("video", 1), Medium("picture", 1)],
            "1 `<image>` or `<video>` in the text, but 2 pictures and videos",
        ),
        (
            "<image> <video>",
            [Medium("video", 1), Medium("picture", 1)],
            "`<video>` stands in the text where the sample has a picture",
        ),
        ("<audio> <audio> x", [Medium("sound")], "2 `<audio>` in the text, but 1 sounds"),
    ],
)
def test_placeholders_that_do_not_fit(bytes_of: Tokenizer, text: str, media: list[Medium], reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        encode(bytes_of, text, media)


def test_start_and_end_tokens(bytes_of: Tokenizer) -> None:
    sample = encode(bytes_of, "x <image>", [Medium("picture", 2)], image_start_token="<im_start>", image_end_token="<im_end>")
    assert "<im_start><image><image><im_end>\nx" in spelled(bytes_of, sample.input_ids)
    with pytest.raises(DatasetError, match="data.image_start_token '<begin>' is not in the tokenizer's vocabulary"):
        encode(bytes_of, "x <image>", [Medium("picture", 2)], image_start_token="<begin>")


LASTS = "The video lasts for 8.00 seconds, and 2 frames are uniformly sampled from it. These frames are located at 2.00s,5.97s."
ASKED = "Please answer the following questions related to this video."


@pytest.mark.parametrize(
    ("text", "kinds", "expected"),
    [
        ("<image>\nWhat happens?", "v", f"<image>\n{LASTS}{ASKED}\nWhat happens?"),
        ("What happens? <video>", "v", f"<video>\n{LASTS}{ASKED}\nWhat happens?"),
        ("<video>", "v", f"<video>\n{LASTS}{ASKED}\n"),
        ("<image> then <video>, so?", "pv", f"<image> then <video>\n{LASTS}{ASKED}\n, so?"),
        ("<image> <video> <image>", "vvp", f"<image>\n{LASTS}{ASKED}\n <video>\n{LASTS}{ASKED}\n <image>"),
        ("<image>", "p", "<image>"),
    ],
)
def test_times_of_frames_are_told(text: str, kinds: str, expected: str) -> None:
    """The line that LLaVA-Video's trainer writes after the video, also where a sample has several media."""
    media = [Medium("video", 4, (2.0, 5.966), 8.0) if kind == "v" else Medium("picture", 3) for kind in kinds]
    conversations = turns(text, "a", "And then?", "b")
    rendered = "".join(segment.text for segment in render(conversations, "v1", "</s>", "<s>", media))
    assert rendered.split("USER: ")[1:] == [f"{expected} ASSISTANT: a</s>", "And then? ASSISTANT: b</s>"]
    wrapped = Rendering("v1", image_start_token="<s>", image_end_token="<e>")
    framed = expected.replace("<image>", "<s><image><e>").replace("<video>", "<s><video><e>")
    assert framed in "".join(segment.text for segment in render(conversations, wrapped, "</s>", "<s>", media))
    captions = "".join(segment.text for segment in render(turns(text, "a"), "plain", "</s>", "<s>", media))
    assert "lasts" not in captions  # of a question that is thrown away only the media stay
