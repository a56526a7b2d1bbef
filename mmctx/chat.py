"""From chat messages to one document, by a tokenizer's chat template, and which of its tokens are answers.

    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image", "image": "0.png"}]},
                  {"role": "assistant", "content": "A cat."}]}

The template is rendered once with a mark in place of each text and medium. What stands between the marks is the template's own: special
tokens written out there are read as such, while in what people wrote they are plain characters. Imports no torch: index workers start fast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from mmctx.errors import SampleError

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerFast

DEFAULT_TEMPLATE = """\
{%- for message in messages %}
{{- message['role'] | capitalize + ':\\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{{- part['text'] if part['type'] == 'text' else '<|' + part['type'] + '|>' }}
{%- endfor %}
{%- endif %}
{{- eos_token if message['role'] == 'assistant' }}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'Assistant:\\n' }}
{%- endif %}
"""
"""For tokenizers without a template of their own: `User:`, a line, `Assistant:`, and the end of text behind each answer."""

ANSWERS = "assistant"
"""The role whose messages are predicted."""

_MARK = re.compile("\ue000(\\d+)\ue001")


class Part(NamedTuple):
    """A piece of a conversation, in reading order.

    Attributes:
        kind: `text`, `image` or `audio`.
        value: the text, or what the message names the medium.
        learned: whether it belongs to an answer.
        control: a text of the template, in which special tokens are written out.
    """

    kind: str
    value: str
    learned: bool = False
    control: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template as Transformers renders it; may be pickled.

    Attributes:
        source: the template.
        special: the tokenizer's special tokens. One that follows an answer ends it, and is part of it.
        names: such as `bos_token` and `eos_token`, for the template.
        begin: left out where the template writes it first of all: documents begin with it anyway.
    """

    source: str = DEFAULT_TEMPLATE
    special: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=lambda: {"eos_token": ""})
    begin: str = ""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, bos: bool = False) -> ChatTemplate:
        """The template of a Transformers tokenizer, `DEFAULT_TEMPLATE` where it has none; `bos`: documents begin with its `bos_token`."""
        source = tokenizer.get_chat_template() if tokenizer.chat_template else DEFAULT_TEMPLATE
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        names = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return cls(source, tuple(sorted(special, key=len, reverse=True)), names, names["bos_token"] if bos else "")

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """The conversation as one text, as `apply_chat_template(tokenize=False)` gives it.

        Raises:
            SampleError: ``bad_json``: the template refuses the messages.
        """
        from jinja2 import TemplateError

        options = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None}
        try:
            return _compile(self.source).render(**options, **self.names)
        except (TemplateError, TypeError) as error:
            raise SampleError("bad_json", f"the chat template refuses the messages: {error}") from None

    def lay_out(self, messages: Any) -> list[Part]:
        """The pieces of a conversation: answers are learned, with the special token that ends each.

        Args:
            messages: each with `role` and `content`, a text or a list of `{"type": "text" | "image" | "audio", TYPE: ...}`. `"loss": false`
                beside the content of an answer leaves it unlearned; true makes a message of any role learned.

        Raises:
            SampleError: ``bad_json``: they are no messages, or the template changes what they say; ``empty`` without any.
        """
        contents = [_contents(number, message) for number, message in enumerate(_listed(messages))]
        if not any(value.strip() for parts in contents for _, value in parts):
            raise SampleError("empty", f"{len(contents)} messages hold neither text nor media")
        learned = [_is_learned(number, message) for number, message in enumerate(messages)]
        owners = [number for number, parts in enumerate(contents) for _ in parts]
        pieces = _MARK.split(self.render(_with_contents(messages, _marked(contents, lambda _, value: None))))
        if list(map(int, pieces[1::2])) != list(range(len(owners))):
            raise SampleError("bad_json", "the chat template leaves out, repeats or moves what messages say")
        contents = self._as_rendered(messages, contents, pieces[::2])
        parts = [Part("text", pieces[0].removeprefix(self.begin), control=True)]
        for owner, (kind, value), after in zip(
            owners, (p for parts in contents for p in parts), pieces[2::2], strict=True
        ):
            parts.append(Part(kind, value, learned=learned[owner]))
            end = self._ending(after) if learned[owner] else ""
            parts += [Part("text", end, learned=True, control=True), Part("text", after[len(end) :], control=True)]
        return [part for part in parts if part.value]

    def _as_rendered(
        self, messages: Sequence[Mapping[str, Any]], contents: list[list[tuple[str, str]]], literals: Sequence[str]
    ) -> list[list[tuple[str, str]]]:
        """The contents as the template writes them: many strip white space off both ends of a message."""
        marked = _marked(contents, lambda kind, value: value if kind == "text" else None)
        rendered = self.render(_with_contents(messages, marked))
        for candidate in (contents, [_stripped(parts) for parts in contents]):
            inner = "".join(_marked(candidate, lambda kind, value: value if kind == "text" else None, literals[1:]))
            if literals[0] + inner == rendered:
                return candidate
        raise SampleError("bad_json", "the chat template changes what messages say, beyond white space at their ends")

    def _ending(self, text: str) -> str:
        """The special token that a text begins with, if it does."""
        return next((token for token in self.special if token and text.startswith(token)), "")


def _listed(messages: Any) -> list[Any]:
    if not isinstance(messages, list):
        raise SampleError("bad_json", f"messages should be a list, found {type(messages).__name__}")
    return messages


def _contents(number: int, message: Any) -> list[tuple[str, str]]:
    """(kind, text or name of a medium) of a message."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise SampleError(
            "bad_json", f"message {number} should have a role and a content, found {json.dumps(message)[:80]}"
        )
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise SampleError(
            "bad_json", f"message {number}: content should be a text or a list, found {type(content).__name__}"
        )
    found = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image", "audio") or not isinstance(part.get(kind), str):
            wanted = '{"type": "text", "text": ...}, or the same with image or audio'
            raise SampleError("bad_json", f"message {number}: a part should be {wanted}, found {json.dumps(part)[:80]}")
        found.append((kind, part[kind]))
    return found


def _is_learned(number: int, message: Mapping[str, Any]) -> bool:
    learned = message.get("loss", message["role"] == ANSWERS)
    if not isinstance(learned, bool):
        raise SampleError("bad_json", f"message {number}: loss is true or false, found {learned!r}")
    return learned


def _marked(contents: Sequence[Sequence[tuple[str, str]]], say: Any, after: Sequence[str] = ()) -> list[str]:
    """Each message's content as one text: what `say` makes of a part, or its mark where that is None; `after` follows each part."""
    made, number = [], 0
    for parts in contents:
        said = ""
        for kind, value in parts:
            text = say(kind, value)
            said += f"\ue000{number}\ue001" if text is None else text
            said += after[number] if after else ""
            number += 1
        made.append(said)
    return made


def _with_contents(messages: Sequence[Mapping[str, Any]], contents: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in message.items() if name != "loss"} | {"content": content}
        for message, content in zip(messages, contents, strict=True)
    ]


def _stripped(parts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without white space at both ends of the whole."""
    found = list(parts)
    for end, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if found and found[end][0] == "text":
            found[end] = ("text", strip(found[end][1]))
    return found


@lru_cache(maxsize=8)
def _compile(source: str) -> Template:
    """As Transformers compiles it, in a sandbox: templates come with checkpoints of strangers."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` marks answers; roles tell us as much."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)
