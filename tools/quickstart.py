"""From text to a trained model, one command after the other; steps that are done are skipped.

Driven by the variables of `python -m megatron.launch` (PRESET, TRAIN_ITERS, LR, ...) and by

    OUTPUT_DIR       folder for everything that is written
    DATA_PATH        your data: a .jsonl or .txt file, or the prefix of a .bin/.idx pair; without it, the sources of
                     Python's standard library are collected
    TOKENIZER_MODEL  your tokenizer: a folder or file of Hugging Face `tokenizers`; without it, one is trained

Without PRECISION, bf16 is used where the processor has instructions for it, fp32 elsewhere. Flags given to this program
go to both training runs. The first run splits every layer over two processes (TP=2) and stops half way; the second
resumes its checkpoint with a whole model on each of two processes (DP=2).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.launch.env import PLAIN
from megatron.training.metrics import read_metrics

_JSONL = (".jsonl", ".json")
_TEXT_SUFFIXES = (*_JSONL, ".txt")
_VOCABULARY = 8192
_PROMPT = "def read_lines(path):"
_CPUINFO = Path("/proc/cpuinfo")
_BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the story."""

    name: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    """Files that must exist for the step to count as done."""
    clears: tuple[Path, ...] = ()
    """What an earlier, different run of this step may have left, removed before it runs."""
    depends: str = ""
    """What else decides the outputs: state of an input file, variables read by the command."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """What the user chose."""

    folder: Path
    data: str
    """DATA_PATH; empty for the standard library's sources."""
    tokenizer: str
    """TOKENIZER_MODEL; empty to train one."""
    tokenizer_type: str
    iterations: int
    flags: tuple[str, ...]
    """Further flags of the training runs."""
    variables: str
    """The variables that the training runs read, as JSON."""

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are saved and resumed from."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object per log line, over both training runs."""
        return self.folder / "metrics.jsonl"


def read_story(env: Mapping[str, str], flags: Sequence[str]) -> Story:
    """The user's choices. Raises ValueError if they do not suffice."""
    text = env.get("TRAIN_ITERS", "")
    if not text.isdigit() or int(text) < 2:
        raise ValueError(f"TRAIN_ITERS={text}: needs a number of at least 2; the second half is trained after a resume")
    story = Story(
        folder=Path(env.get("OUTPUT_DIR") or "runs/quickstart"),
        data=env.get("DATA_PATH", ""),
        tokenizer=env.get("TOKENIZER_MODEL", ""),
        tokenizer_type=env.get("TOKENIZER_TYPE") or "HFTokenizer",
        iterations=int(text),
        flags=(*([] if _asks_for_precision(env, flags) else fast_precision(_cpuinfo())), *flags),
        variables=json.dumps({name: env[name] for name in _launch_variables() if env.get(name)}),
    )
    if story.data and not story.data.endswith(_JSONL) and not story.tokenizer:
        raise ValueError(
            f"DATA_PATH={story.data}: only for a .jsonl file is a tokenizer trained; set TOKENIZER_MODEL to the folder "
            "or file of the tokenizer that fits this data"
        )
    return story


def _asks_for_precision(env: Mapping[str, str], flags: Sequence[str]) -> bool:
    return bool(env.get("PRECISION")) or not {"--bf16", "--fp16"}.isdisjoint(flags)


def fast_precision(cpuinfo: str) -> list[str]:
    """Flags for the number format that this processor multiplies fastest, from the text of /proc/cpuinfo."""
    return ["--bf16"] if _BF16_INSTRUCTIONS & set(cpuinfo.split()) else []


def _cpuinfo() -> str:
    return _CPUINFO.read_text(encoding="utf-8") if _CPUINFO.exists() else ""


def _launch_variables() -> tuple[str, ...]:
    return tuple(variable.name for variable in PLAIN.variables)


def steps(story: Story) -> tuple[Step, ...]:
    """The commands that the choices need, in order."""
    tokenizer = story.tokenizer or str(story.folder / "tokenizer")
    named = ("--tokenizer-type", story.tokenizer_type, "--tokenizer-model", tokenizer)
    result: list[Step] = []
    data = story.data
    if not data:
        data = str(story.folder / "corpus.jsonl")
        result.append(_tool("collect the corpus", "collect_corpus", ("--output", data), (Path(data),)))
    if data.endswith(_TEXT_SUFFIXES):
        state = _state(Path(story.data)) if story.data else ""
        if not story.tokenizer:
            train = ("--input", data, "--output", tokenizer, "--vocab-size", str(_VOCABULARY))
            trained = (Path(tokenizer) / "tokenizer.json",)
            result.append(_tool("train the tokenizer", "train_tokenizer", train, trained, state))
        prefix = story.folder / "corpus"
        encode = ("--input", data, "--output-prefix", str(prefix), *named, "--append-eod", "--workers", "2")
        data = f"{prefix}_text_document"
        encoded = (Path(f"{data}.bin"), Path(f"{data}.idx"))
        result.append(_tool("turn text into tokens", "preprocess_data", encode, encoded, state))
    return (*result, *_training(story, ("--data-path", *shlex.split(data), *named)), *_showing(story))


def _tool(name: str, tool: str, flags: Sequence[str], outputs: tuple[Path, ...], depends: str = "") -> Step:
    command = (sys.executable, f"tools/{tool}.py", *flags)
    return Step(name=name, command=command, outputs=outputs, depends=depends)


def _state(file: Path) -> str:
    """Changes when the user's file does. Raises ValueError if there is none."""
    if not file.is_file():
        raise ValueError(f"DATA_PATH={file}: there is no such file")
    return f"{file.stat().st_size} {file.stat().st_mtime_ns}"


def _training(story: Story, data: tuple[str, ...]) -> tuple[Step, Step]:
    """Train to the half with TP=2, then from that checkpoint to the end with DP=2."""
    half, end = story.iterations // 2, story.iterations
    tensorboard = story.folder / "tensorboard"
    common = (
        *(sys.executable, "-m", "megatron.launch"),
        *("--nproc-per-node", "2", "--train-iters", str(end), *data),
        *("--data-cache-path", str(story.folder / "cache")),
        *("--save", str(story.checkpoints), "--load", str(story.checkpoints), "--save-interval", str(half)),
        *("--log-json", str(story.metrics), "--tensorboard-dir", str(tensorboard)),
    )
    first = Step(
        name="train with TP=2, to the half",
        command=(*common, "--tensor-model-parallel-size", "2", "--exit-interval", str(half), *story.flags),
        outputs=(story.checkpoints / f"iter_{half:07d}", story.metrics),
        clears=(story.checkpoints, story.metrics, tensorboard),
        depends=story.variables,
    )
    second = Step(
        name="resume with DP=2, to the end",
        command=(*common, "--tensor-model-parallel-size", "1", "--exit-on-missing-checkpoint", *story.flags),
        outputs=(story.checkpoints / f"iter_{end:07d}",),
    )
    return first, second


def _showing(story: Story) -> tuple[Step, Step]:
    text, picture = story.folder / "sample.txt", story.folder / "loss.png"
    generate = ("--load", str(story.checkpoints), "--prompt", _PROMPT, "--output", str(text))
    return (
        _tool("generate text", "generate_text", generate, (text,)),
        _tool("draw the loss", "plot_loss", (str(story.metrics), "--output", str(picture)), (picture,)),
    )


def chained_keys(chain: Sequence[Step]) -> list[str]:
    """A key per step that changes with what decides its outputs and with the keys of the steps before it."""
    keys: list[str] = []
    for step in chain:
        before = keys[-1] if keys else ""
        keys.append(hashlib.sha256(json.dumps([before, step.depends, *step.command]).encode()).hexdigest())
    return keys


def run(chain: Sequence[Step], marks: Path) -> None:
    """Run the steps that are not done. `marks` keeps the key of each finished step.

    Args:
        chain: the steps in order.
        marks: folder of the marks.

    Raises:
        RuntimeError: a step failed or did not write its files.
    """
    marks.mkdir(parents=True, exist_ok=True)
    for number, (step, key) in enumerate(zip(chain, chained_keys(chain), strict=True), start=1):
        mark = marks / f"{number}.done"
        title = f"[{number}/{len(chain)}] {step.name}"
        if mark.exists() and mark.read_text() == key and all(path.exists() for path in step.outputs):
            print(f"{title}: done before", flush=True)
            continue
        for later in range(number, len(chain) + 1):
            (marks / f"{later}.done").unlink(missing_ok=True)
        print(f"{title}\n  $ {_shown(step.command)}", flush=True)
        _remove(step.clears)
        began = time.monotonic()
        code = subprocess.run(step.command, check=False).returncode
        missing = [str(path) for path in step.outputs if not path.exists()]
        if code != 0 or missing:
            reason = f"ended with exit code {code}" if code else f"did not write {', '.join(missing)}"
            raise RuntimeError(f"step {number} ({step.name}) {reason}")
        mark.write_text(key)
        print(f"  {time.monotonic() - began:.1f} s", flush=True)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _shown(command: Sequence[str]) -> str:
    """A command as it can be typed in the repository."""
    return shlex.join(_interpreter() if word == sys.executable else word for word in command)


def _interpreter() -> str:
    """This Python: by its path if it is the repository's own."""
    own = Path(sys.executable)
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else "python"


def losses(metrics: Path) -> list[tuple[int, float]]:
    """Iteration and training loss of each log line."""
    records = [record for record in read_metrics(metrics) if record["kind"] == "train"]
    return [(record["iteration"], record["lm_loss"]) for record in records if record["lm_loss"] is not None]


def closing(story: Story) -> str:
    """What was written and what to try next."""
    curve = losses(story.metrics)
    files = [story.folder / name for name in ("loss.png", "metrics.jsonl", "tensorboard", "checkpoints", "sample.txt")]
    return "\n".join(
        [
            f"loss: {curve[0][1]:.3f} at iteration {curve[0][0]}, {curve[-1][1]:.3f} at iteration {curve[-1][0]}",
            "written:",
            *(f"  {path}" for path in files if path.exists()),
            "next:",
            f"  {_interpreter()} -m tensorboard.main --logdir {story.folder / 'tensorboard'}",
            f'  {_interpreter()} tools/generate_text.py --load {story.checkpoints} --prompt "import os"',
            f"  TRAIN_ITERS={2 * story.iterations} OUTPUT_DIR={story.folder}-longer bash examples/cpu/run_llama.sh",
            "  DATA_PATH=your.jsonl OUTPUT_DIR=runs/yours bash examples/cpu/run_llama.sh",
        ]
    )


def main() -> int:
    """Run the story, or print its commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    arguments, flags = parser.parse_known_args()
    try:
        story = read_story(os.environ, flags)
        chain = steps(story)
        if arguments.dry_run:
            print("\n".join(_shown(step.command) for step in chain))
            return 0
        run(chain, story.folder / "done")
        print(closing(story))
    except (ValueError, RuntimeError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
