"""The CPU example's steps: which ones the user's choices need, and which of them are skipped on a second run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tools import quickstart


def _story(**env):
    return quickstart.read_story({"OUTPUT_DIR": "out", "TRAIN_ITERS": "10", **env}, [])


def _tools(story):
    return [Path(step.command[1]).stem for step in quickstart.steps(story) if step.command[1].startswith("tools/")]


def _step(story, words):
    (found,) = [step for step in quickstart.steps(story) if words in step.name]
    return found


def _value(step, flag):
    return step.command[step.command.index(flag) + 1]


def test_without_data_a_corpus_is_collected_and_a_tokenizer_trained():
    needed = ["collect_corpus", "train_tokenizer", "preprocess_data", "generate_text", "plot_loss"]
    assert _tools(_story()) == needed


def test_own_text_is_tokenized(tmp_path):
    text = tmp_path / "mine.jsonl"
    text.write_text("{}\n")
    assert _tools(_story(DATA_PATH=str(text)))[:2] == ["train_tokenizer", "preprocess_data"]
    assert _tools(_story(DATA_PATH=str(text), TOKENIZER_MODEL="tok"))[:1] == ["preprocess_data"]


def test_own_tokens_are_used_as_they_are():
    story = _story(DATA_PATH="0.5 a 0.5 b", TOKENIZER_MODEL="tok", TOKENIZER_TYPE="Llama3Tokenizer")
    assert _tools(story) == ["generate_text", "plot_loss"]
    command = _step(story, "train with TP=2").command
    start = command.index("--data-path")
    assert command[start + 1 : start + 6] == ("0.5", "a", "0.5", "b", "--tokenizer-type")
    assert "Llama3Tokenizer" in command


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"DATA_PATH": "tokens"}, "DATA_PATH=tokens: .* set TOKENIZER_MODEL"),
        ({"DATA_PATH": "text.txt"}, "DATA_PATH=text.txt: .* set TOKENIZER_MODEL"),
        ({"DATA_PATH": "missing.jsonl"}, "there is no such file"),
        ({"TRAIN_ITERS": "1"}, "TRAIN_ITERS=1"),
        ({"TRAIN_ITERS": ""}, "TRAIN_ITERS="),
    ],
)
def test_choices_that_do_not_suffice_are_refused(env, message):
    with pytest.raises(ValueError, match=message):
        quickstart.steps(_story(**env))


def test_the_second_run_resumes_what_the_first_saved_in_another_layout():
    first, second = _step(_story(), "train with TP=2"), _step(_story(), "resume with DP=2")
    assert _value(first, "--save") == _value(second, "--load") == "out/checkpoints"
    assert _value(first, "--tensor-model-parallel-size") == "2"
    assert _value(second, "--tensor-model-parallel-size") == "1"
    assert _value(first, "--nproc-per-node") == _value(second, "--nproc-per-node") == "2"
    assert _value(first, "--exit-interval") == "5"
    assert _value(first, "--train-iters") == _value(second, "--train-iters") == "10"
    assert "--exit-on-missing-checkpoint" in second.command


@pytest.mark.parametrize(
    ("cpuinfo", "flags"),
    [("flags : fpu avx512_bf16 vnni", ["--bf16"]), ("Features : fp bf16", ["--bf16"]), ("flags : fpu avx512f", [])],
)
def test_bf16_is_used_where_the_processor_has_it(cpuinfo, flags):
    assert quickstart.fast_precision(cpuinfo) == flags


def test_precision_that_was_asked_for_is_kept():
    assert "--bf16" not in _step(_story(PRECISION="fp32"), "train with TP=2").command


def test_flags_reach_both_training_runs():
    story = quickstart.read_story({"TRAIN_ITERS": "10"}, ["--swiglu"])
    assert all(_step(story, name).command[-1] == "--swiglu" for name in ("train with TP=2", "resume with DP=2"))


def test_a_variable_of_the_training_runs_redoes_them_but_not_the_data():
    before, after = _story(), _story(LR="1")
    changed = [
        old != new
        for old, new in zip(
            quickstart.chained_keys(quickstart.steps(before)),
            quickstart.chained_keys(quickstart.steps(after)),
            strict=True,
        )
    ]
    assert changed == [False, False, False, True, True, True, True]


def _writer(name, target, text="x"):
    code = f"from pathlib import Path; p = Path({str(target)!r}); p.open('a').write({text!r})"
    return quickstart.Step(name=name, command=(sys.executable, "-c", code), outputs=(target,))


def test_finished_steps_are_skipped_and_changed_ones_redone_with_all_that_follow(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    chain = [_writer("first", one), _writer("second", two)]
    quickstart.run(chain, tmp_path / "done")
    quickstart.run(chain, tmp_path / "done")
    assert (one.read_text(), two.read_text()) == ("x", "x")
    quickstart.run([_writer("first", one, "y"), chain[1]], tmp_path / "done")
    assert (one.read_text(), two.read_text()) == ("xy", "xx")


def test_lost_output_is_made_again(tmp_path):
    chain = [_writer("first", tmp_path / "one")]
    quickstart.run(chain, tmp_path / "done")
    (tmp_path / "one").unlink()
    quickstart.run(chain, tmp_path / "done")
    assert (tmp_path / "one").read_text() == "x"


def test_leftovers_of_another_run_are_removed_first(tmp_path):
    left = tmp_path / "left"
    left.mkdir()
    (left / "over").write_text("x")
    quickstart.run([replace(_writer("first", tmp_path / "one"), clears=(left,))], tmp_path / "done")
    assert not left.exists()


def test_a_step_that_fails_or_writes_nothing_stops_the_story(tmp_path):
    failing = quickstart.Step(name="fails", command=(sys.executable, "-c", "raise SystemExit(3)"), outputs=())
    with pytest.raises(RuntimeError, match=r"step 1 \(fails\) ended with exit code 3"):
        quickstart.run([failing], tmp_path / "done")
    idle = quickstart.Step(name="idle", command=(sys.executable, "-c", ""), outputs=(tmp_path / "nothing",))
    with pytest.raises(RuntimeError, match=r"did not write .*nothing"):
        quickstart.run([idle], tmp_path / "done")


def test_closing_names_the_fall_of_the_loss_and_the_files(tmp_path):
    story = replace(_story(), folder=tmp_path)
    records = [
        {"kind": "start", "iteration": 0},
        {"kind": "train", "iteration": 1, "lm_loss": 9.0},
        {"kind": "evaluation", "iteration": 1, "loss": 8.0},
        {"kind": "train", "iteration": 10, "lm_loss": 5.0},
    ]
    story.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = quickstart.closing(story)
    assert "loss: 9.000 at iteration 1, 5.000 at iteration 10" in text
    assert str(story.metrics) in text and "loss.png" not in text
