"""Packed attention equals separate sequences, for every architecture family, and samples cannot see each other."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from inverseq.attention import ATTENTION_NAME, attention_layout
from inverseq.model import check_head, head_of
from inverseq.records import PackedViews

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "mistral-window": MistralConfig(**SMALL, sliding_window=5),
    "qwen2": Qwen2Config(**SMALL),
    "gemma2-softcap": Gemma2Config(**SMALL, sliding_window=6, query_pre_attn_scalar=8),
}


def make_pack(sequences: list[list[int]], parents: list[int] | None = None) -> PackedViews:
    """A pack of whole sequences in which every token but the last of a sequence predicts the next one."""
    parents = parents or [-1] * len(sequences)
    lengths = [len(s) for s in sequences]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    offsets = [lengths[p] if p >= 0 else 0 for p in parents]
    action_index = torch.cat([torch.arange(a, b - 1) for a, b in zip(starts[:-1], starts[1:], strict=True)])
    input_ids = torch.tensor([t for s in sequences for t in s])
    return PackedViews(
        input_ids=input_ids,
        position_ids=torch.cat([torch.arange(o, o + n) for o, n in zip(offsets, lengths, strict=True)]),
        cu_seqlens=starts.int(),
        max_seqlen=max(lengths),
        parent_seq=torch.tensor(parents, dtype=torch.int32),
        action_index=action_index[None],
        token_ids=input_ids[action_index + 1],
        sample_index=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths) - 1),
        seqlens=tuple(lengths),
    )


def tiny(name: str, dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").to(dtype).eval()
    return model


def packed_hidden(model, pack: PackedViews) -> torch.Tensor:
    model.set_attn_implementation(ATTENTION_NAME)
    return model.get_decoder()(
        input_ids=pack.input_ids[None],
        position_ids=pack.position_ids[None],
        use_cache=False,
        layout=attention_layout(pack),
    ).last_hidden_state[0]


def separate_hidden(model, sequences) -> torch.Tensor:
    model.set_attn_implementation("eager")
    return torch.cat([model.get_decoder()(torch.tensor([s]), use_cache=False).last_hidden_state[0] for s in sequences])


def random_sequences(lengths, seed=0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_outputs_and_gradients_equal_separate_sequences(name):
    model, sequences = tiny(name), random_sequences([7, 1, 12, 3])
    upstream = torch.randn(23, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = separate_hidden(model, sequences)
    (expected * upstream).sum().backward()
    gradients = [p.grad.clone() for p in model.get_decoder().parameters()]
    model.zero_grad()
    actual = packed_hidden(model, make_pack(sequences))
    (actual * upstream).sum().backward()
    # eager attention takes its softmax in float32, which bounds the agreement.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(model.get_decoder().parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_samples_cannot_see_each_other(name):
    model = tiny(name)
    first, second, other = random_sequences([9, 8, 9])
    with torch.no_grad():
        together = packed_hidden(model, make_pack([first, second]))[9:]
        with_other = packed_hidden(model, make_pack([other, second]))[9:]
    assert torch.equal(together, with_other)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2-softcap"])
def test_a_shared_prefix_emitted_once_equals_repeating_it(name):
    model = tiny(name)
    prefix, first, second = random_sequences([6, 4, 9])
    with torch.no_grad():
        shared = packed_hidden(model, make_pack([prefix, first, second], parents=[-1, 0, 0]))[6:]
        expected = separate_hidden(model, [prefix + first, prefix + second])
    expected = torch.cat([expected[6:10], expected[16:]])
    torch.testing.assert_close(shared, expected, rtol=1e-5, atol=1e-5)


def test_a_call_without_layout_or_with_a_mask_is_refused():
    model = tiny("llama")
    model.set_attn_implementation(ATTENTION_NAME)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="layout"):
        model(ids, use_cache=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_head_of_reproduces_the_models_own_logits(name):
    model = tiny(name, torch.float32)
    model.set_attn_implementation(ATTENTION_NAME)
    check_head(model, make_pack(random_sequences([5])), 97)
    assert (head_of(model, 97).softcap is not None) == (name == "gemma2-softcap")


def test_a_head_that_scales_its_logits_in_an_unknown_way_is_refused():
    model = tiny("llama", torch.float32)
    model.set_attn_implementation(ATTENTION_NAME)
    model.lm_head.register_forward_hook(lambda module, args, logits: 3.0 * logits)
    with pytest.raises(ValueError, match="head is not supported"):
        check_head(model, make_pack(random_sequences([5])), 97)
