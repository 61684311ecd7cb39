"""Chat templates: messages to the text that a model was trained to answer.

A template is Jinja as `tokenizer.chat_template` of Hugging Face and GGUF has it, run in Jinja's sandbox. A run may have
its own in `chat_template.jinja`; without one it is ChatML in plain text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanochat.errors import UserError
from nanochat.run_folder import read_chat_template

CHATML = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
"""markers of well-known templates; an answer ends before one that its template writes"""
LONGEST = 64 * 1024
"""characters of a template"""


class _Generation(Extension):
    """`{% generation %}` around what an assistant says, which trainers look for; its content counts here."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written down.

    Raises `UserError` for a source that is not Jinja.
    """

    source: str = CHATML
    own: bool = False
    """whether it came with the model, which is then a chat model"""
    names: Mapping[str, str] = field(default_factory=dict)
    """`bos_token` and `eos_token`, where the model has them"""

    def __post_init__(self) -> None:
        if len(self.source) > LONGEST:
            raise UserError(f"the chat template has {len(self.source):,} characters, more than {LONGEST:,}.")
        try:
            self._environment().from_string(self.source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is not Jinja: {error}.") from error

    @staticmethod
    def _environment() -> ImmutableSandboxedEnvironment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        # what templates of Hugging Face may call
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = time.strftime
        environment.filters["tojson"] = _to_json
        return environment

    @property
    def stops(self) -> list[str]:
        """Markers before which an answer ends."""
        return [marker for marker in END_OF_TURN if marker in self.source]

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, ready for the assistant's next answer.

        Raises `UserError` for messages that the template refuses.
        """
        try:
            return (
                self._environment()
                .from_string(self.source)
                .render(messages=list(messages), add_generation_prompt=add_generation_prompt, **self.names)
            )
        except Exception as error:  # a template can fail in any way that an expression can
            raise UserError(f"the chat template cannot write these messages: {error}") from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as it is; Jinja's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def template_of(folder: Path) -> ChatTemplate:
    """The template of a run folder: its own, or ChatML."""
    found = read_chat_template(folder)
    return ChatTemplate() if found is None else ChatTemplate(found, own=True)
