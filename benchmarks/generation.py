"""Speed of generation on a CPU against Hugging Face's `generate`, both with a cache of keys and values.

    python -m benchmarks.generation --rounds 5

Both continue the same prompts with the same weights, always with the most likely token, and must write the same. The
sides take turns in one process, and medians of processor time are compared, because shared machines are noisy. Prompts
of different lengths are padded for Hugging Face on the left. "read again", for one prompt, is this project's model
without the cache.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import transformers

from megatron.accelerators import select
from megatron.generation import Ending, Reader, Sampled, Sampling, generate
from megatron.model import hf
from megatron.model.gpt import GPT, ModelInputs
from megatron.model.hf_config import architecture_from_hf_config
from megatron.mpu.groups import single_process
from megatron.ops import build_table

Tokens = list[list[int]]


def theirs(args: argparse.Namespace) -> transformers.LlamaForCausalLM:
    """A random LLaMA of Hugging Face."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        vocab_size=8192,
        max_position_embeddings=2048,
    )
    return transformers.LlamaForCausalLM(config).to(getattr(torch, args.dtype)).eval()


def ours(model: transformers.LlamaForCausalLM) -> tuple[GPT, Reader]:
    """The same model here."""
    arch = architecture_from_hf_config(model.config.to_dict())
    ops, _ = build_table(select("cpu"), {})
    found = GPT(arch, ops=ops, groups=single_process(), dtype=model.dtype)
    found.load_state_dict(hf.from_hf(model.state_dict(), arch))
    return found, Reader(found, arch, single_process())


def prompts_of(count: int, length: int) -> Tokens:
    """Random prompts, the shortest half as long as the longest."""
    generator = torch.Generator().manual_seed(1)
    lengths = [length - length * number // (2 * count) for number in range(count)]
    return [torch.randint(3, 8192, (n,), generator=generator).tolist() for n in lengths]


def write_with_hugging_face(model: transformers.LlamaForCausalLM, prompts: Tokens, new: int) -> Tokens:
    """Continue padded prompts."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )
    result: Tokens = found[:, longest:].tolist()
    return result


def write_with_cache(reader: Reader, prompts: Tokens, new: int) -> Tokens:
    """Continue prompts as tools/generate_text.py does."""
    endings = [Ending(tokens=frozenset(), length=new)] * len(prompts)
    search = Sampled(prompts, endings, sampling=Sampling(temperature=0.0), seeds=[0] * len(prompts))
    return [result.tokens for result in generate(reader, prompts, search, new_tokens=new)]


@torch.inference_mode()
def write_without_cache(model: GPT, prompts: Tokens, new: int) -> Tokens:
    """Continue prompts by reading each text again for every token."""
    texts = [list(prompt) for prompt in prompts]
    for text in texts:
        for _ in range(new):
            text.append(int(model(torch.tensor([text]), ModelInputs())[-1, 0].argmax()))
    return [text[-new:] for text in texts]


def measure(sides: dict[str, Callable[[], Tokens]], rounds: int) -> dict[str, float]:
    """Median processor seconds of each side; they take turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, write in sides.items():
            started = time.process_time()
            write()
            if number:
                seconds[name].append(time.process_time() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def report(count: int, args: argparse.Namespace) -> Sequence[str]:
    """Rows of a Markdown table for a number of prompts."""
    model = theirs(args)
    stage, reader = ours(model)
    prompts, new = prompts_of(count, args.prompt_length), args.new_tokens
    sides: dict[str, Callable[[], Tokens]] = {
        "ours": lambda: write_with_cache(reader, prompts, new),
        "Hugging Face": lambda: write_with_hugging_face(model, prompts, new),
    }
    if count == 1:
        sides["ours, read again"] = lambda: write_without_cache(stage, prompts, new)
    written = [write() for write in sides.values()]
    same = "yes" if all(tokens == written[0] for tokens in written) else "NO"
    seconds = measure(sides, args.rounds)
    return [
        f"| {count} | {name} | {count * new / time_:.0f} | {time_ / seconds['ours']:.2f}x | {same} |"
        for name, time_ in seconds.items()
    ]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="of the model")
    parser.add_argument("--hidden", type=int, default=512, help="of the model; 64 per head, 4 heads share keys")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8], help="how many are continued at a time")
    parser.add_argument("--prompt-length", type=int, default=128, help="tokens of the longest")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens written behind each")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}", end=", ")
    print(f"{torch.get_num_threads()} threads, {args.layers} layers, hidden size {args.hidden}, {args.dtype}")
    print("| prompts | side | tokens/s | time against ours | all the same text |\n|---|---|---|---|---|")
    for count in args.prompts:
        print("\n".join(report(count, args)), flush=True)


if __name__ == "__main__":
    main()
