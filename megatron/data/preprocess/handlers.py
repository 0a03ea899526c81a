"""The handlers by name: plain text, and the published instruction templates.

The names and texts are those of AscendSpeed, so that data prepared there and here is the same, except where the
original is broken: an empty input of Alpaca gave `###None`, StackOverflowPython failed on its first record, an unknown
name fell back to plain text in silence, and the length of a prompt was found by encoding it again, which is off where
a token spans its end (here prompt and answer are encoded apart, as they are when the model is used).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron.data.errors import DataError
from megatron.data.preprocess.chat import Chat, load_template
from megatron.data.preprocess.documents import Document, Handler, Record, RecordError, Segment, text_of
from megatron.data.preprocess.sentences import SentenceCutter

_SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. Please note that you need to think through your response "
    "logically and step by step."
)
_USER, _ASSISTANT = "### Instruction:", "### Response:"
_ALPACA_PRETRAIN = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.USER: Below is an instruction that describes a task. Write a response "
    "that appropriately completes the request.\n\n### Instruction:\n"
)
# Baichuan's tokens for the turns of a conversation.
_USER_TOKEN, _ASSISTANT_TOKEN = 195, 196
Turn = tuple[str, str]
"""What the user says and what the assistant answers."""


@dataclass(frozen=True, kw_only=True)
class HandlerSettings:
    """Which handler, and what it is told.

    Attributes:
        name: one of `HANDLER_NAMES`.
        keys: --json-keys, for plain text.
        sentences: how documents are cut into sentences; None keeps them whole.
        chat_template: name, file or tokenizer folder of a chat template; None takes that of the tokenizer.
        tokenizer_model: --tokenizer-model, where the tokenizer's chat template is looked for.
    """

    name: str = "GeneralPretrainHandler"
    keys: tuple[str, ...] = ("text",)
    sentences: SentenceCutter | None = None
    chat_template: str | None = None
    tokenizer_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Plain:
    """Texts that are learned as a whole: `read` gives one per column."""

    columns: tuple[str, ...] | None
    read: Callable[[Record], Iterable[str]]
    sentences: SentenceCutter | None = None
    always_ends: bool = False
    needs_packed: bool = False

    def __call__(self, record: Record) -> list[list[Document]]:
        if self.sentences is None:
            return [[[Segment(text)]] for text in self.read(record)]
        return [[[Segment(sentence) for sentence in self.sentences(text)]] for text in self.read(record)]


@dataclass(frozen=True, kw_only=True)
class _Instruction:
    """Conversations of which the answers are learned."""

    read: Callable[[Record], list[Document]]
    columns: tuple[str, ...] | None = None
    always_ends: bool = False
    needs_packed: bool = False

    def __call__(self, record: Record) -> list[list[Document]]:
        return [self.read(record)]


def build_handler(settings: HandlerSettings) -> Handler:
    """The handler of a name.

    Raises:
        DataError: an unknown name, or a setting that this handler cannot obey.
    """
    name = settings.name
    if name not in HANDLER_NAMES:
        near = difflib.get_close_matches(name, HANDLER_NAMES, n=1, cutoff=0.0)[0]
        raise DataError(f"--handler-name {name!r} is unknown; did you mean {near}? Known: {', '.join(HANDLER_NAMES)}")
    if name != "GeneralPretrainHandler" and settings.keys != ("text",):
        raise DataError(f"--json-keys {' '.join(settings.keys)}: {name} has its own fields; leave the flag out")
    if name == "GeneralPretrainHandler":
        ending = "document" if settings.sentences is None else "sentence"
        columns = tuple(f"{key}_{ending}" for key in settings.keys)
        return _Plain(
            columns=columns,
            read=lambda record: [text_of(record, key) for key in settings.keys],
            sentences=settings.sentences,
        )
    if settings.sentences is not None:
        raise DataError(f"--split-sentences goes with plain text, not with {name}")
    if name == "ChatHandler":
        return _Instruction(read=Chat(load_template(settings.chat_template, settings.tokenizer_model)))
    if settings.chat_template is not None:
        raise DataError(f"--chat-template goes with ChatHandler, not with {name}")
    if name in _PLAIN:
        return _Plain(columns=("text_document",), read=_PLAIN[name])
    ends = name == "MOSSMultiTurnHandler"
    return _Instruction(read=_INSTRUCTION[name], always_ends=ends, needs_packed=ends)


def _alpaca_pretrain(record: Record) -> list[str]:
    given = text_of(record, "input", optional=True)
    section = f"### Input:\n{given}\n\n" if given else ""
    answer = text_of(record, "output")
    return [f"{_ALPACA_PRETRAIN}{text_of(record, 'instruction')}\n\n{section}### Response: ASSISTANT: {answer}"]


def _stack_overflow(record: Record) -> list[str]:
    title, question, answer = (text_of(record, key) for key in ("title", "question_body", "answer_body"))
    return [f"In python, {title}\n### Question:\n{question}\n### Answer:\n{answer}\n"]


def alpaca(turns: list[Turn]) -> Document:
    """A conversation in Alpaca's form, of which the last answer is learned."""
    said = [f"{_USER}\n{user}\n{_ASSISTANT}\n{answer}\n" for user, answer in turns[:-1]]
    user, answer = turns[-1]
    prompt = "".join(["\n", _SYSTEM, "\n", *said, f"{_USER}\n{user}\n{_ASSISTANT}\n"])
    return [Segment(prompt, trained=False), Segment(f"{answer}\n")]


def _general(record: Record) -> list[Document]:
    given = text_of(record, "input", optional=True)
    asked = text_of(record, "instruction")
    return [alpaca([(f"{asked}\n{given}" if given else asked, text_of(record, "output"))])]


def _belle(record: Record) -> list[Document]:
    """`instruction` holds the conversation as `Human: ... Assistant: ...`; `output` is the last answer."""
    turns: list[Turn] = []
    for part in text_of(record, "instruction").split("Human:")[1:]:
        user, _, answer = part.partition("Assistant:")
        turns.append((user.strip(), answer.strip()))
    if not turns:
        raise RecordError("wrong form", "'instruction' has no 'Human:'")
    return [alpaca([*turns[:-1], (turns[-1][0], text_of(record, "output"))])]


def _moss_turns(record: Record) -> list[Turn]:
    chat = record.get("chat")
    if not isinstance(chat, dict):
        raise RecordError("missing key" if chat is None else "wrong form", "no 'chat' with numbered turns")
    turns = []
    for turn in chat.values():
        if not turn:
            continue
        user = text_of(turn, "Human").replace("<eoh>", "").replace("<|Human|>: ", "").strip()
        answer = text_of(turn, "MOSS").replace("<|MOSS|>:", "").replace("<eom>", "").strip()
        turns.append((user, answer))
    if not turns:
        raise RecordError("empty", "'chat' has no turns")
    return turns


def _moss(record: Record) -> list[Document]:
    """One document for each beginning of the conversation."""
    turns = _moss_turns(record)
    return [alpaca(turns[: number + 1]) for number in range(len(turns))]


def _moss_multi_turn(record: Record) -> list[Document]:
    """Baichuan's form: a token in front of every turn, all answers learned, and that they end."""
    document: Document = []
    for user, answer in _moss_turns(record):
        document.append(Segment(user, trained=False, marker=_USER_TOKEN, marker_is_end=True))
        document.append(Segment(answer, marker=_ASSISTANT_TOKEN))
    return [document]


def _leetcode(record: Record) -> list[Document]:
    problem = text_of(record, "code_with_problem").split("```", maxsplit=1)[0].strip()
    return [alpaca([(problem, f"{text_of(record, 'code_only')}\n{text_of(record, 'explanation_only')}")])]


def _prompt_completion(record: Record) -> list[Document]:
    return [[Segment(text_of(record, "prompt"), trained=False), Segment(text_of(record, "completion"))]]


_PLAIN: dict[str, Callable[[Record], list[str]]] = {
    "AlpacaPretrainHandler": _alpaca_pretrain,
    "StackOverflowPythonPretrainHandler": _stack_overflow,
}
_INSTRUCTION: dict[str, Callable[[Any], list[Document]]] = {
    "GeneralInstructionHandler": _general,
    "BelleMultiTurnInstructionHandler": _belle,
    "MOSSInstructionHandler": _moss,
    "MOSSMultiTurnHandler": _moss_multi_turn,
    "LeetcodePythonInstructionHandler": _leetcode,
    "PromptCompletionHandler": _prompt_completion,
}
HANDLER_NAMES = ("GeneralPretrainHandler", *_PLAIN, *_INSTRUCTION, "ChatHandler")
