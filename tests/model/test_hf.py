"""Ground truth from outside: logits and every gradient equal those of Hugging Face's models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron.config.architecture import Architecture, RopeScaling
from megatron.model import hf
from megatron.model.gpt import GPT, ModelInputs
from megatron.model.hf_config import architecture_from_hf_config, hf_config
from megatron.mpu.groups import single_process
from megatron.ops import reference_ops
from tests.model.helpers import FAMILIES, build, gradient_errors, relative_error, tokens_of

# Rounding of float32 through two layers, relative to each tensor's largest element.
LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 83,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 83, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 83,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("Llama", _LLAMA),
    "llama-tied-head-dim": ("Llama", {**_LLAMA, "tie_word_embeddings": True, "head_dim": 12}),
    "llama-3.1": ("Llama", {**_LLAMA, "rope_theta": 500.0, "rope_scaling": _LLAMA3}),
    "llama-interpolated": ("Llama", {**_LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-biases": ("Llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 6}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 8}),
    "bloom": ("Bloom", _BLOOM),
    "bloom-6-heads": ("Bloom", {**_BLOOM, "hidden_size": 48, "n_head": 6}),
    "bloom-post-norm": ("Bloom", {**_BLOOM, "apply_residual_connection_post_layernorm": True}),
    "gpt2": ("GPT2", _GPT2),
    "gpt2-exact-gelu": ("GPT2", {**_GPT2, "activation_function": "gelu", "n_inner": 40}),
}


def _random_model(kind: str, settings: dict[str, Any]) -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")(**settings, attn_implementation="eager")
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():  # norms and biases start as constants, which would hide mistakes
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, 0.2)
    return model.train()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_hugging_face(case: str) -> None:
    theirs = _random_model(*CASES[case])
    arch = architecture_from_hf_config(theirs.config.to_dict(), padded_vocab_size=96)
    ours = GPT(arch, ops=reference_ops(), groups=single_process())
    ours.load_state_dict(hf.from_hf(theirs.state_dict(), arch))

    tokens, _ = tokens_of(arch, length=40)
    their_logits = theirs(input_ids=tokens).logits
    our_logits = ours(tokens, ModelInputs())[..., : arch.vocab_size].transpose(0, 1)
    weight = torch.randn(their_logits.shape, generator=torch.Generator().manual_seed(7))
    (their_logits * weight).sum().backward()
    (our_logits * weight).sum().backward()

    # The mapping is linear, so it maps gradients as it maps weights.
    expected = hf.from_hf({name: p.grad for name, p in theirs.named_parameters()}, arch)
    logits_error = relative_error(our_logits, their_logits)
    errors = gradient_errors({name: p.grad for name, p in ours.named_parameters()}, expected)
    worst = max(errors, key=lambda name: errors[name])
    print(f"{case}: logits {logits_error:.1e}, gradients {errors[worst]:.1e} ({worst})")
    assert logits_error < LOGITS_TOLERANCE
    assert errors[worst] < GRADIENT_TOLERANCE, worst


@pytest.mark.parametrize("case", CASES)
def test_weights_go_to_hugging_face_and_back(case: str) -> None:
    theirs = _random_model(*CASES[case])
    arch = architecture_from_hf_config(theirs.config.to_dict(), padded_vocab_size=96)
    state: dict[str, Tensor] = theirs.state_dict()
    back = hf.to_hf(hf.from_hf(state, arch), arch)
    assert back.keys() == {name for name in state if not (arch.tied_embeddings and name == "lm_head.weight")}
    for name, tensor in back.items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("case", CASES)
def test_configuration_goes_to_hugging_face_and_back(case: str) -> None:
    kind, settings = CASES[case]
    arch = architecture_from_hf_config(getattr(transformers, f"{kind}Config")(**settings).to_dict())
    written = hf_config(arch)
    assert architecture_from_hf_config(written) == arch
    read = transformers.AutoConfig.for_model(**written)
    assert architecture_from_hf_config(read.to_dict()) == arch


def test_names_without_the_leading_transformer_are_understood() -> None:
    theirs = _random_model(*CASES["bloom"])
    arch = architecture_from_hf_config(theirs.config.to_dict())
    bare = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    logical = hf.from_hf(bare, arch)
    assert torch.equal(logical["final_norm.weight"], theirs.state_dict()["transformer.ln_f.weight"])


def test_missing_and_unknown_weights_are_named() -> None:
    arch = FAMILIES["bloom"]
    state = hf.to_hf(dict(build(arch).state_dict()), arch)
    state["transformer.surplus"] = state.pop("transformer.ln_f.weight")
    with pytest.raises(ValueError, match=r"missing \['transformer.ln_f.weight'\], unknown \['transformer.surplus'\]"):
        hf.from_hf(state, arch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type is 't5'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"attention_bias": True}, "attention_bias without mlp_bias"),
    ],
)
def test_configurations_with_other_maths_are_refused(change: dict[str, Any], message: str) -> None:
    config = {**_LLAMA, "model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu", **change}
    with pytest.raises(ValueError, match=message):
        architecture_from_hf_config(config)


def test_architectures_without_a_family_are_refused() -> None:
    with pytest.raises(ValueError, match="norm_1p=True"):
        hf_config(FAMILIES["variants"])


def test_llama_3_scaling_is_read() -> None:
    arch = architecture_from_hf_config({**_LLAMA, "model_type": "llama", "rms_norm_eps": 1e-5, "rope_scaling": _LLAMA3})
    assert isinstance(arch, Architecture)
    assert arch.rope_scaling == RopeScaling(factor=8.0, original_max_positions=32)
