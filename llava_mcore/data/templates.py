"""Conversation templates: how turns become text, and what of it is learned. Each is an entry of data that ``conversation`` reads.

The wording is that of LLaVA and LLaVA-NeXT: their ``llava/conversation.py`` and the functions ``preprocess_*`` of their trainers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# The template that a tokenizer brings along (jinja, as transformers renders it).
CHAT_TEMPLATE = "chat_template"


@dataclass(frozen=True)
class Template:
    """A conversation is written as::

        [system] ([mark] [human + question + human_end] [mark] [opening] [glue + answer + end] [after])... [mark]

    ``{bos}`` and ``{eos}`` stand for the tokenizer's tokens. Learned are the answers with ``glue`` and ``end`` (and the mark that
    follows); ``published_opening`` and ``published_tokens`` say what the published models learned besides.
    """

    system: str = ""
    system_around: tuple[str, str] | None = ("", "")  # None: there is no place for a system prompt
    system_in_question: bool = False  # it stands inside the first question
    mark: str = ""  # before every turn and at the end
    human: str = ""
    human_end: str = ""
    later_human: str = ""  # in front of every question but the first
    opening: str = ""
    glue: str = ""  # belongs to the answer: tokenizers glue a blank to the word that follows
    end: str = ""
    after: str = ""
    keeps_questions: bool = True  # False: only their pictures stay
    max_turns: int | None = None
    published_opening: bool = False  # the opening, and every mark
    published_tokens: tuple[str, ...] = ()  # these single tokens, wherever they stand


_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_CURIOUS_HUMAN = _CURIOUS_USER.replace("user", "human")

_PLAIN = Template(system_around=None, end="\n", keeps_questions=False, max_turns=2)
_VICUNA = Template(
    system=_CURIOUS_USER,
    system_around=("", " "),
    human="USER: ",
    human_end=" ",
    opening="ASSISTANT:",
    glue=" ",
    end="{eos}",
)
_LLAMA_2 = Template(
    system=(
        "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
    ),
    system_around=("<<SYS>>\n", "\n<</SYS>>\n\n"),
    system_in_question=True,
    later_human="{bos}",
    human="[INST] ",
    human_end=" [/INST]",
    glue=" ",
    end=" {eos}",
)
_CHATML = Template(
    system="Answer the questions.",
    system_around=("<|im_start|>system\n", "<|im_end|>"),
    human="<|im_start|>user\n",
    human_end="<|im_end|>",
    opening="<|im_start|>assistant\n",
    end="<|im_end|>",
)
# Here every block ends its line, and LLaVA-NeXT also learned the openings, and all of these tokens everywhere.
_QWEN = replace(
    _CHATML,
    system="You are a helpful assistant.",
    system_around=("<|im_start|>system\n", "<|im_end|>\n"),
    human_end="<|im_end|>\n",
    after="\n",
    published_opening=True,
    published_tokens=("<|im_start|>", "<|im_end|>", "\n"),
)

TEMPLATES = {
    # Captions: the question is thrown away and only its pictures stay. No end of sequence, as published.
    "plain": _PLAIN,
    "plain_eos": replace(_PLAIN, end="{eos}"),
    "v0": Template(
        system=_CURIOUS_HUMAN,
        system_around=("", "\n\n"),
        mark="###",
        human=" Human: ",
        human_end="\n",
        opening=" Assistant:",
        glue=" ",
        end="\n",
        published_opening=True,
    ),
    "v1": _VICUNA,
    "vicuna_v1": _VICUNA,
    "llava_v1": replace(_VICUNA, system=_CURIOUS_HUMAN),
    "llava_llama_2": _LLAMA_2,
    "mistral_instruct": replace(_LLAMA_2, system="", later_human=""),
    "chatml": _CHATML,
    "mpt": replace(
        _CHATML,
        system=("A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."),
    ),
    "qwen_1_5": _QWEN,
    "qwen_2": _QWEN,
    "qwen_2_5": replace(_QWEN, system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
}
