"""Handlers: the published templates, what is learned of them, and the two forms in which they are written."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from megatron.data.errors import DataError
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.preprocess import EncodePlan, PreprocessSettings, preprocess
from megatron.data.preprocess.documents import RecordError
from megatron.data.preprocess.handlers import HANDLER_NAMES, HandlerSettings, build_handler
from megatron.tokenizer import TokenizerSettings

EOS, BOS = "</s>", "<s>"
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "No."},
]
MOSS = {
    "chat": {
        "turn_1": {"Human": "<|Human|>: a<eoh>\n", "MOSS": "<|MOSS|>: b<eom>\n"},
        "turn_2": {"Human": "<|Human|>: c<eoh>\n", "MOSS": "<|MOSS|>: d<eom>\n"},
    }
}
RECORDS: dict[str, dict[str, Any]] = {
    "AlpacaPretrainHandler": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "StackOverflowPythonPretrainHandler": {"title": "How?", "question_body": "Q", "answer_body": "A"},
    "GeneralInstructionHandler": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "BelleMultiTurnInstructionHandler": {
        "instruction": "Human: a\nAssistant: b\nHuman: c\nAssistant:",
        "output": "d",
    },
    "MOSSInstructionHandler": MOSS,
    "MOSSMultiTurnHandler": MOSS,
    "LeetcodePythonInstructionHandler": {
        "code_with_problem": "Sort it.\n```python\nx\n```",
        "code_only": "sorted(x)",
        "explanation_only": "It sorts.",
    },
    "PromptCompletionHandler": {"prompt": "a b", "completion": " c"},
    "ChatHandler": {"messages": CHAT},
}
SYSTEM = (
    "\nBelow is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. Please note that you need to think through your response "
    "logically and step by step.\n"
)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "with bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single bytes with special tokens, which may put BOS and EOS around every text."""
    path = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(text, special=True) for text in (BOS, EOS, "<|im_start|>", "<|im_end|>")])
    if request.param:
        marks = [(text, engine.token_to_id(text)) for text in (BOS, EOS)]
        engine.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=marks)
    engine.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, "bos_token": BOS}))
    return path


def _run(folder: Path, tmp_path: Path, record: dict[str, Any], name: str, form: str = "packed", **changes: Any) -> Path:
    (tmp_path / "i.jsonl").write_text(json.dumps(record) + "\n")
    template = "chatml" if name == "ChatHandler" else None
    plan = EncodePlan(
        tokenizer=TokenizerSettings(type="PretrainedFromHF", model=str(folder)),
        handler=HandlerSettings(name=name, chat_template=template),
        append_eod=changes.get("append_eod", False),
        form=form,  # type: ignore[arg-type]
    )
    settings = PreprocessSettings(
        inputs=(str(tmp_path / "i.jsonl"),), output_prefix=str(tmp_path / form), plan=plan, engine="own"
    )
    preprocess(settings, log=io.StringIO())
    return tmp_path / form


def _packed(prefix: Path) -> list[tuple[list[int], list[int]]]:
    ids, mask, labels = (
        IndexedDataset(f"{prefix}_packed_{part}_document") for part in ("input_ids", "attention_mask", "labels")
    )
    assert ids.dtype == mask.dtype == labels.dtype == np.int32
    assert all((mask[i] == 1).all() and len(mask[i]) == len(ids[i]) for i in range(len(ids)))
    return [(ids[i].tolist(), labels[i].tolist()) for i in range(len(ids))]


def _said(folder: Path, prefix: Path) -> list[tuple[str, str]]:
    """Each document as (prompt, answer): all of the text that is not learned, and all that is."""
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    for ids, labels in _packed(prefix):
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        prompt = [token for token, label in zip(ids, labels, strict=True) if label == -100]
        answer = [label for label in labels if label != -100]
        found.append(tuple(engine.decode(part, skip_special_tokens=False) for part in (prompt, answer)))
    return found


@pytest.fixture
def around(folder: Path) -> tuple[str, str]:
    """What the tokenizer puts around a text."""
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = engine.decode(engine.encode("x").ids, skip_special_tokens=False)
    before, _, after = text.partition("x")
    return before, after


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GeneralInstructionHandler", [(f"{SYSTEM}### Instruction:\nAdd.\n1 2\n### Response:\n", "3\n")]),
        (
            "BelleMultiTurnInstructionHandler",
            [(f"{SYSTEM}### Instruction:\na\n### Response:\nb\n### Instruction:\nc\n### Response:\n", "d\n")],
        ),
        (
            "MOSSInstructionHandler",
            [
                (f"{SYSTEM}### Instruction:\na\n### Response:\n", "b\n"),
                (f"{SYSTEM}### Instruction:\na\n### Response:\nb\n### Instruction:\nc\n### Response:\n", "d\n"),
            ],
        ),
        (
            "LeetcodePythonInstructionHandler",
            [(f"{SYSTEM}### Instruction:\nSort it.\n### Response:\n", "sorted(x)\nIt sorts.\n")],
        ),
        ("PromptCompletionHandler", [("a b", " c")]),
        (
            "ChatHandler",
            [
                (
                    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
                    "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n",
                    "Hello.<|im_end|>\nNo.<|im_end|>\n",
                )
            ],
        ),
    ],
)
def test_what_is_asked_and_what_is_learned(
    folder: Path, around: tuple[str, str], tmp_path: Path, name: str, expected: list[tuple[str, str]]
) -> None:
    before, after = around
    prefix = _run(folder, tmp_path, RECORDS[name], name)
    assert _said(folder, prefix) == [(before + prompt, answer + after) for prompt, answer in expected]
    prefix = _run(folder, tmp_path, RECORDS[name], name, append_eod=True)
    assert _said(folder, prefix) == [(before + prompt, answer + after + EOS) for prompt, answer in expected]


def test_baichuan_turns_have_tokens_in_front_and_ends_that_are_learned(folder: Path, tmp_path: Path) -> None:
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    before, after = engine.encode("", add_special_tokens=True).ids[:1], engine.encode("").ids[1:]
    a, b, c, d = (engine.encode(text, add_special_tokens=False).ids for text in "abcd")
    eos, none = engine.token_to_id(EOS), -100
    ((ids, labels),) = _packed(_run(folder, tmp_path, RECORDS["MOSSMultiTurnHandler"], "MOSSMultiTurnHandler"))
    assert ids == [195, *before, *a, 196, *b, 195, *c, 196, *d, *after, eos]
    hidden = [none] * (len(before) + 1)
    assert labels == [eos, *hidden, none, *b, eos, none, none, *d, *after, eos]
    with pytest.raises(DataError, match="compact cannot hold the labels"):
        _run(folder, tmp_path, RECORDS["MOSSMultiTurnHandler"], "MOSSMultiTurnHandler", "compact")


INSTRUCTIONS = [name for name in RECORDS if "Pretrain" not in name and name != "MOSSMultiTurnHandler"]


@pytest.mark.parametrize("name", INSTRUCTIONS)
@pytest.mark.parametrize("append_eod", [False, True])
def test_the_compact_form_holds_the_same(folder: Path, tmp_path: Path, name: str, append_eod: bool) -> None:
    packed = _packed(_run(folder, tmp_path, RECORDS[name], name, append_eod=append_eod))
    compact = IndexedDataset(
        f"{_run(folder, tmp_path, RECORDS[name], name, 'compact', append_eod=append_eod)}_dialogue_document"
    )
    assert compact.dtype == np.uint16
    documents = compact.index.documents
    assert len(documents) - 1 == len(packed)
    for number, (ids, labels) in enumerate(packed):
        runs = [compact[i].tolist() for i in range(documents[number], documents[number + 1])]
        assert [token for run in runs for token in run] == ids
        learned = [i % 2 == 1 for i, run in enumerate(runs) for _ in run]
        assert labels == [token if learn else -100 for token, learn in zip(ids, learned, strict=True)]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            RECORDS["AlpacaPretrainHandler"],
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions.USER: Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2"
            "\n\n### Response: ASSISTANT: 3",
        ),
        (
            {"instruction": "Add.", "input": "", "output": "3"},
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions.USER: Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd."
            "\n\n### Response: ASSISTANT: 3",
        ),
    ],
)
def test_alpaca_as_plain_text(record: dict[str, str], expected: str) -> None:
    handler = build_handler(HandlerSettings(name="AlpacaPretrainHandler"))
    assert handler.columns == ("text_document",)
    assert handler(record) == [[[(expected, True, None, False)]]]


def test_stack_overflow() -> None:
    handler = build_handler(HandlerSettings(name="StackOverflowPythonPretrainHandler"))
    text = "In python, How?\n### Question:\nQ\n### Answer:\nA\n"
    assert handler(RECORDS["StackOverflowPythonPretrainHandler"]) == [[[(text, True, None, False)]]]


def test_sharegpt_is_read_like_messages() -> None:
    handler = build_handler(HandlerSettings(name="ChatHandler", chat_template="chatml"))
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": roles[turn["role"]], "value": turn["content"]} for turn in CHAT]
    assert handler({"conversations": turns}) == handler({"messages": CHAT})


def test_a_template_that_spells_bos_does_not_get_two(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    (tmp_path / "i.jsonl").write_text(json.dumps({"messages": CHAT[1:3]}) + "\n")
    plan = EncodePlan(
        tokenizer=TokenizerSettings(type="PretrainedFromHF", model=str(folder)),
        handler=HandlerSettings(
            name="ChatHandler", chat_template=str(tmp_path / "t.jinja"), tokenizer_model=str(folder)
        ),
        append_eod=False,
    )
    settings = PreprocessSettings(inputs=(str(tmp_path / "i.jsonl"),), output_prefix=str(tmp_path / "o"), plan=plan)
    preprocess(settings, log=io.StringIO())
    ((ids, _),) = _packed(tmp_path / "o")
    assert ids.count(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(BOS)) == 1


@pytest.mark.parametrize(
    ("name", "record", "problem"),
    [
        ("GeneralInstructionHandler", {"instruction": "a"}, "no 'output'; it has 'instruction'"),
        ("GeneralInstructionHandler", {"instruction": "a", "output": None}, "'output' is a NoneType"),
        ("BelleMultiTurnInstructionHandler", {"instruction": "a", "output": "b"}, "has no 'Human:'"),
        ("MOSSInstructionHandler", {"chat": {}}, "has no turns"),
        ("MOSSInstructionHandler", {"talk": {}}, "no 'chat'"),
        ("ChatHandler", {"messages": CHAT[:2]}, "the assistant says nothing"),
        ("ChatHandler", {"text": "a"}, "neither 'messages'"),
        ("ChatHandler", {"messages": [{"role": "user", "content": [1]}]}, "a turn without 'role' and 'content'"),
    ],
)
def test_records_of_another_form_are_bad(name: str, record: dict[str, Any], problem: str) -> None:
    template = "chatml" if name == "ChatHandler" else None
    with pytest.raises(RecordError) as caught:
        build_handler(HandlerSettings(name=name, chat_template=template))(record)
    assert problem in caught.value.detail


def test_unknown_names_and_settings_that_cannot_be_obeyed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'AlpacaInstruction' is unknown; did you mean "):
        build_handler(HandlerSettings(name="AlpacaInstruction"))
    with pytest.raises(DataError, match="did you mean MOSSMultiTurnHandler"):
        build_handler(HandlerSettings(name="MOSSMultiTurnHander"))
    with pytest.raises(DataError, match="ChatHandler needs a chat template"):
        build_handler(HandlerSettings(name="ChatHandler", tokenizer_model=str(tmp_path)))
    with pytest.raises(DataError, match="--chat-template goes with ChatHandler"):
        build_handler(HandlerSettings(name="MOSSInstructionHandler", chat_template="chatml"))
    with pytest.raises(DataError, match=r"--json-keys body: .* has its own fields"):
        build_handler(HandlerSettings(name="MOSSInstructionHandler", keys=("body",)))
    for name in HANDLER_NAMES:
        template = "chatml" if name == "ChatHandler" else None
        assert build_handler(HandlerSettings(name=name, chat_template=template))
