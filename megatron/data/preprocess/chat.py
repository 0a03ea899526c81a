"""Conversations in a model's own chat template: OpenAI's `messages`, or ShareGPT's `conversations`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.data.errors import DataError
from megatron.data.preprocess import streams
from megatron.data.preprocess.documents import Document, Record, RecordError, Segment

_NAMED = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "vicuna": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }} "
        "{% elif message['role'] == 'user' %}USER: {{ message['content'] }} "
        "{% else %}ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
}
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "bard": "assistant"}
_ASSISTANT = "assistant"
_FORMS = (("messages", "role", "content"), ("conversations", "from", "value"), ("conversations", "role", "content"))


@dataclass(frozen=True)
class Template:
    """A Jinja text, and the special tokens that it may name."""

    text: str
    tokens: tuple[tuple[str, str], ...] = ()


def load_template(asked: str | None, tokenizer_model: str | None) -> Template:
    """A template by name, from a file, or from the folder of the tokenizer.

    Raises:
        DataError: there is none.
    """
    folder = Path(tokenizer_model) if tokenizer_model else None
    if folder is not None and folder.is_file():
        folder = folder.parent
    config = _config(folder)
    tokens = tuple(
        (role, text) for role in ("bos_token", "eos_token", "pad_token") if (text := _text(config.get(role)))
    )
    if asked is None:
        own = folder / "chat_template.jinja" if folder else None
        if own is not None and own.is_file():
            return Template(own.read_text(encoding="utf-8"), tokens)
        if isinstance(config.get("chat_template"), str):
            return Template(config["chat_template"], tokens)
        raise DataError(
            f"ChatHandler needs a chat template, and {folder or 'the tokenizer'} has none: give --chat-template "
            f"{'|'.join(_NAMED)}, or a Jinja file"
        )
    if asked in _NAMED:
        return Template(_NAMED[asked], tokens)
    if not Path(asked).is_file():
        raise DataError(f"--chat-template {asked}: no such file; or one of {', '.join(_NAMED)}")
    return Template(Path(asked).read_text(encoding="utf-8"), tokens)


def _config(folder: Path | None) -> dict[str, Any]:
    file = folder / "tokenizer_config.json" if folder else None
    if file is None or not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error


def _text(token: object) -> str | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


@dataclass(frozen=True)
class Chat:
    """Renders conversations so that what the assistant writes is apart from the rest. All its turns are learned."""

    template: Template

    @cached_property
    def _render(self) -> Any:
        sandbox = streams.optional("jinja2.sandbox", "jinja2", "ChatHandler")

        def refuse(message: str) -> None:
            raise RecordError("wrong form", f"the chat template says: {message}")

        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        # Not the clock that some templates ask for: the same data has to give the same tokens on another day.
        environment.globals.update(raise_exception=refuse)
        compiled = environment.from_string(self.template.text)
        return lambda messages, ask: compiled.render(
            messages=messages, add_generation_prompt=ask, tools=None, **dict(self.template.tokens)
        )

    def __call__(self, record: Record) -> list[Document]:
        """One document: what the template puts around the answers is prompt, each answer with its end is learned."""
        messages = _messages(record)
        document: Document = []
        written = ""
        for number, message in enumerate(messages):
            if message["role"] != _ASSISTANT:
                continue
            asked = self._render(messages[:number], True)
            answered = self._render(messages[: number + 1], False)
            # Some templates put the generation prompt elsewhere than the beginning of the answer.
            if not asked.startswith(written) or not answered.startswith(asked):
                raise RecordError("wrong form", "the chat template changes earlier turns when one is added")
            document += [Segment(asked[len(written) :], trained=False), Segment(answered[len(asked) :])]
            written = answered
        if not document:
            raise RecordError("wrong form", "the assistant says nothing")
        return [document]


def _messages(record: Record) -> list[dict[str, str]]:
    for field, role, content in _FORMS:
        turns = record.get(field)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and role in turns[0]:
            return [_message(turn, role, content) for turn in turns]
    raise RecordError("missing key", "neither 'messages' (role, content) nor 'conversations' (from, value)")


def _message(turn: object, role: str, content: str) -> dict[str, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get(role), str) or not isinstance(turn.get(content), str):
        raise RecordError("wrong form", f"a turn without {role!r} and {content!r} as texts")
    return {"role": _ROLES.get(turn[role], turn[role]), "content": turn[content]}
