"""Architectures: each gives its own logits packed, or is refused in one line before a weight is read."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from inverseq.architecture import check_architecture, empty_model
from inverseq.config import ModelConfig
from inverseq.config_loading import load_config
from inverseq.dry_run import dry_run
from inverseq.model import action_hidden, check_head, head_of, load_model
from inverseq.packing import pack_views
from tests.tiny import make_tiny_model
from tests.tiny_samples import full_logprobs, make_samples

IDS = {"vocab_size": 512, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 2048}
SMALL = {**IDS, **SIZES, "initializer_range": 0.1}
LLAMA = {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2}
GPT = {**IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048}
WIDE = {**LLAMA, "head_dim": 32}  # heads that do not add up to the hidden size
EXPERTS = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

PACKED = {
    "gpt2": GPT,
    "gpt_neox": {**SMALL, "intermediate_size": 128},
    "phi": {**SMALL, "intermediate_size": 128},
    "phi3": LLAMA,
    "olmo2": LLAMA,
    "qwen3": WIDE,
    "gemma2": {**WIDE, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 0.5, "sliding_window": 6},
    "gemma3_text": {**WIDE, "query_pre_attn_scalar": 32, "sliding_window": 6},
    "cohere": LLAMA,
    "cohere2": {**LLAMA, "sliding_window": 6},
    "granite": {**LLAMA, "logits_scaling": 4.0},
    "smollm3": LLAMA,
    "mixtral": {**LLAMA, "num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "head_dim": 32},
    "olmoe": EXPERTS,
}
OWN, NO_POSITIONS = "its attention is its own", "its forward takes no position_ids"
REFUSED = {
    "falcon": ({**SMALL, "alibi": False}, f"Falcon cannot be packed: {OWN}"),
    "gptj": ({**GPT, "rotary_dim": 16}, f"GPTJ cannot be packed: {OWN}"),
    "codegen": ({**GPT, "rotary_dim": 16}, "none of its 2 layers attend through transformers' attention functions"),
    "bloom": ({**IDS, "hidden_size": 64, "n_layer": 2, "n_head": 4}, f"Bloom cannot be packed: {NO_POSITIONS}"),
    "mpt": ({**IDS, "d_model": 64, "n_layers": 2, "n_heads": 4}, f"Mpt cannot be packed: {NO_POSITIONS}"),
    "stablelm": (LLAMA, "StableLmAttention is not handed the keywords of the model's forward"),
    "gpt_oss": ({**WIDE, "num_local_experts": 4}, "GptOssAttention uses attention sinks"),
    "bert": (SMALL, "BertSelfAttention attends in both directions"),
    "mamba": ({**IDS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, ""),
    "llama4_text": ({**LLAMA, "num_local_experts": 2, "head_dim": 16}, "layers of kind chunked_attention"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, and a weight file that holds no weights: whoever loads them fails."""
    path = make_tiny_model(tmp_path_factory.mktemp("architectures") / "tiny")
    save_file({}, path / "model.safetensors")
    return path


def config_of(kind, options):
    return AutoConfig.for_model(kind, **options)


@pytest.mark.parametrize("kind", PACKED)
def test_packed_log_probs_are_those_of_the_models_own_logits(tmp_path, kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config_of(kind, PACKED[kind])).float().save_pretrained(tmp_path)
    model = load_model(tmp_path, ModelConfig(path="x", device="cpu"))
    samples = make_samples(3, longest=20)
    [pack] = pack_views(samples, (-1,), token_budget=512)
    check_head(model, pack_views(samples[:1], (-1,), token_budget=512)[0], 512)
    head, own = head_of(model, 512), AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        logits_AV = torch.nn.functional.linear(action_hidden(model, pack)[-1], head.weight, head.bias)
    if head.softcap:
        logits_AV = head.softcap * torch.tanh(logits_AV / head.softcap)
    logprobs_AV = (logits_AV / head.temperature).double().log_softmax(-1)
    for index, sample in enumerate(samples):
        torch.testing.assert_close(
            logprobs_AV[pack.sample_index == index], full_logprobs(own, sample, -1), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_packed_is_refused_before_weights_are_read(folder, tmp_path, kind):
    options, reason = REFUSED[kind]
    path = shutil.copytree(folder, tmp_path / kind)
    config_of(kind, options).save_pretrained(path)
    with pytest.raises(ValueError) as caught:
        dry_run(load_config("demo", [f"model.path={path}", f"run_dir={tmp_path / 'run'}", "model.device=cpu"]))
    message = str(caught.value)
    assert message.startswith(f"model.path={str(path)!r}: ") and reason in message and "\n" not in message
    with pytest.raises(ValueError, match="cannot be packed|layers of kind"):
        load_model(path, ModelConfig(path="x", device="cpu"))


def test_a_cache_that_cannot_hold_the_models_keys_is_refused_before_weights_are_read(folder, tmp_path):
    latent = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    path = shutil.copytree(folder, tmp_path / "deepseek")
    config_of("deepseek_v3", {**LLAMA, **latent, **experts, "num_key_value_heads": 4}).save_pretrained(path)
    words = [f"model.path={path}", f"run_dir={tmp_path / 'run'}", "model.device=cpu"]
    with pytest.raises(ValueError, match="sampling.backend='transformers': its cache has no room for the keys of"):
        dry_run(load_config("demo", words))


def test_a_large_model_is_checked_without_memory_and_its_configuration_is_left_alone():
    config = config_of("llama", {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64})
    before = config.to_dict()
    check_architecture("model.path='x'", config)
    assert config.to_dict() == before and config._attn_implementation is None
    assert {weight.device.type for weight in empty_model(config).parameters()} == {"meta"}
