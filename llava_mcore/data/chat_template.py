"""A tokenizer's own chat template: jinja, rendered as transformers' ``apply_chat_template`` renders it.

Templates that ask for the date find none, and write what they write then: tokens must not change from day to day.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llava_mcore.data.errors import DatasetError, SampleError

# Enclose what stands between {% generation %} tags, by which a template says what is learned; of Unicode's private use.
BEGIN, END = "\ue000", "\ue001"

Message = dict[str, str]


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}``, which transformers added to jinja."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (BEGIN, END))
        return [begin, *body, end]


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise DatasetError(f"the tokenizer's chat template is no jinja ({error}); name another data.template") from error


def _render(source: str, messages: Sequence[Message], special_tokens: Mapping[str, str], opened: bool) -> str:
    try:
        return str(_compiled(source).render(messages=list(messages), add_generation_prompt=opened, **special_tokens))
    except TemplateError as error:
        raise SampleError(f"the tokenizer's chat template refuses it: {error}") from error


def render_chat(source: str, messages: Sequence[Message], special_tokens: Mapping[str, str]) -> list[tuple[str, bool]]:
    """Renders messages; if the last is the user's, the answer is opened.

    Learned is what stands between the template's own generation tags; in a template without them the answers, from where
    ``add_generation_prompt`` leaves off, to the end of their turn without the blanks behind it.

    Args:
        source: the template.
        messages: ``{"role": "system" | "user" | "assistant", "content": text}``.
        special_tokens: ``bos_token``, ``eos_token`` and so on, as the tokenizer's configuration names them.

    Returns:
        Pieces of the text, and whether each is learned.

    Raises:
        SampleError: the template refuses these messages, or writes earlier turns differently once others follow, so that it
            cannot be told what an answer is.
        DatasetError: it is no jinja.
    """
    opened = messages[-1]["role"] == "user"
    whole = _render(source, messages, special_tokens, opened)
    if BEGIN in whole:
        pieces = [part.partition(END) for part in whole.split(BEGIN)]
        marked = [(pieces[0][0], False)]
        for learned, _, rest in pieces[1:]:
            marked += [(learned, True), (rest, False)]
        return [piece for piece in marked if piece[0]]
    segments: list[tuple[str, bool]] = []
    at = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(source, messages[:number], special_tokens, True)
        until = _render(source, messages[: number + 1], special_tokens, False)
        if not whole.startswith(until) or not until.startswith(before) or len(before) < at:
            raise SampleError(
                "the tokenizer's chat template writes a turn differently once others follow, so that it cannot be told what is "
                "learned; put {% generation %} tags around its answers, or name another data.template"
            )
        answer = until[len(before) :]
        # What ends the turn is learned, the line break behind it is not; unless that is all there is.
        ending = answer[answer.rfind(message["content"].strip()) + len(message["content"].strip()) :]
        tail = len(ending) - len(ending.rstrip()) if ending.strip() else 0
        end = len(until) - tail
        segments += [(whole[at : len(before)], False), (whole[len(before) : end], True)]
        at = end
    return [piece for piece in [*segments, (whole[at:], False)] if piece[0]]
