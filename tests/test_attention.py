"""Packed attention equals separate sequences, for every architecture family, and samples cannot see each other."""

import dataclasses
import itertools
import json

import pytest
import torch

from inverseq import attention
from inverseq.attention import (
    ATTENTION_NAME,
    BACKENDS,
    AttentionNeeds,
    attention_layout,
    backend_of,
    check_backend,
    choose_backend,
)
from inverseq.config import ModelConfig
from inverseq.model import check_head, head_of, load_model
from tests.attention_oracle import (
    CONFIGS,
    make_pack,
    packed_hidden,
    random_sequences,
    separate_hidden,
    tiny,
    with_gradients,
)
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_outputs_and_gradients_equal_separate_sequences(name):
    model, sequences = tiny(name), random_sequences([7, 1, 12, 3])
    expected = separate_hidden(model, sequences)
    gradients = with_gradients(model, expected)
    actual = packed_hidden(model, make_pack(sequences))
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    for gradient, own in zip(with_gradients(model, actual), gradients, strict=True):
        torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-4 * own.abs().max().item())


@pytest.mark.parametrize("name", CONFIGS)
def test_flex_attention_equals_separate_sequences(name):
    model, sequences = tiny(name), random_sequences([7, 1, 12, 3])
    with torch.no_grad():
        expected = separate_hidden(model, sequences)
        actual = packed_hidden(model, make_pack(sequences), "flex")
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("name", CONFIGS)
def test_samples_cannot_see_each_other(name, backend):
    model = tiny(name)
    first, second, other = random_sequences([9, 8, 9])
    with torch.no_grad():
        together = packed_hidden(model, make_pack([first, second]), backend)[9:]
        with_other = packed_hidden(model, make_pack([other, second]), backend)[9:]
    assert torch.equal(together, with_other)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("name", CONFIGS)
def test_shared_prefixes_emitted_once_equal_repeating_them(name, backend):
    model = tiny(name)
    prefix, other, alone, *rest = random_sequences([6, 3, 5, 4, 9, 2])
    sequences, parents = [prefix, rest[0], alone, other, rest[1], rest[2]], [-1, 0, -1, -1, 0, 3]
    with torch.no_grad():
        shared = packed_hidden(model, make_pack(sequences, parents), backend).split([len(s) for s in sequences])
        for own, parent, sequence in zip(shared, parents, sequences, strict=True):
            whole = separate_hidden(model, [(sequences[parent] if parent >= 0 else []) + sequence])
            torch.testing.assert_close(own, whole[-len(sequence) :], rtol=2e-5, atol=2e-5)


def test_a_call_without_layout_or_with_a_mask_is_refused():
    model = tiny("llama")
    model.set_attn_implementation(ATTENTION_NAME)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="layout"):
        model(ids, use_cache=False)
    pack = make_pack(random_sequences([3]))
    with pytest.raises(ValueError, match="no mask"):
        model(ids, use_cache=False, attention_mask=torch.ones(1, 1, 3, 3), layout=attention_layout(pack))


def call(module=None, **options):
    query, layout = torch.zeros(1, 2, 3, 8), attention_layout(make_pack(random_sequences([3])))
    return attention.packed_attention(module or torch.nn.Module(), query, query, query, None, layout=layout, **options)


def test_a_layer_whose_values_have_another_size_is_served_by_what_takes_them(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "choose_backend", lambda backend, needs: asked.append(needs) or "sdpa")
    layout = attention_layout(make_pack(random_sequences([3])))
    query, value = torch.zeros(1, 2, 3, 24), torch.zeros(1, 2, 3, 16)
    assert attention.packed_attention(torch.nn.Module(), query, query, value, None, layout=layout)[0].shape[-1] == 16
    assert [(needs.head_size, needs.value_head_size) for needs in asked] == [(24, 16)]


def test_capped_logits_are_scaled_by_the_head_size_where_the_layer_says_nothing_and_keep_the_dtype():
    generator, layout = torch.Generator().manual_seed(2), attention_layout(make_pack(random_sequences([3, 4])))
    heads = [torch.randn(1, count, 7, 16, generator=generator).bfloat16() for count in (4, 2, 2)]
    said, silent = (
        attention.packed_attention(torch.nn.Module(), *heads, None, scaling=scaling, softcap=1.5, layout=layout)[0]
        for scaling in (0.25, None)
    )
    assert said.dtype == torch.bfloat16 and torch.equal(said, silent)


def test_what_would_change_the_numbers_without_a_word_is_refused():
    assert call()[0].shape == (1, 3, 2, 8)
    with pytest.raises(ValueError, match="sinks"):
        call(s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="dropout is 0.1"):
        call(dropout=0.1)
    module = torch.nn.Module()
    module.is_causal = False
    with pytest.raises(ValueError, match="both directions"):
        call(module)


CUDA = AttentionNeeds("cuda", torch.bfloat16, 128, 128, needs_grad=True, capability=(8, 0))


@pytest.mark.parametrize(
    ("change", "without_flash_attn", "with_flash_attn"),
    [
        ({}, "varlen", "flash_attn"),
        ({"softcap": True}, "flex", "flash_attn"),
        ({"head_size": 100, "value_head_size": 100}, "flex", "flex"),
        ({"head_size": 192}, "flex", "flex"),
        ({"head_size": 256, "value_head_size": 256}, "varlen", "flash_attn"),
        ({"head_size": 512, "value_head_size": 512}, "flex", "flex"),
        ({"head_size": 12, "value_head_size": 12}, "sdpa", "sdpa"),
        ({"dtype": torch.float32}, "sdpa", "sdpa"),
        ({"capability": (7, 5)}, "flex", "flex"),
        ({"device_type": "cpu", "capability": None}, "sdpa", "sdpa"),
    ],
)
def test_auto_takes_the_fastest_backend_that_serves(monkeypatch, change, without_flash_attn, with_flash_attn):
    needs = dataclasses.replace(CUDA, **change)
    for expected, absent in ((without_flash_attn, True), (with_flash_attn, False)):
        choose_backend.cache_clear()
        monkeypatch.setattr(attention, "flash_attn_function", lambda absent=absent: refuse() if absent else None)
        assert choose_backend("auto", needs) == expected
    choose_backend.cache_clear()


@pytest.mark.parametrize("installed", [False, True])
def test_policy_and_frozen_models_are_served_alike(monkeypatch, installed):
    """What serves under gradients serves without them, whatever the model, the device and ``model.attention`` are."""
    monkeypatch.setattr(attention, "flash_attn_function", lambda: None if installed else refuse())
    choose_backend.cache_clear()
    num_served = 0
    axes = [("cuda", "cpu"), (torch.float32, torch.bfloat16), (8, 64, 100, 192, 512), (False, True), ((7, 5), (9, 0))]
    for backend, (device, dtype, size, softcap, capability) in itertools.product(
        ("auto", *BACKENDS), itertools.product(*axes)
    ):
        trained = AttentionNeeds(device, dtype, size, size, softcap, needs_grad=True, capability=capability)
        try:
            served = choose_backend(backend, trained)
        except ValueError:
            continue
        assert choose_backend(backend, dataclasses.replace(trained, needs_grad=False)) == served
        num_served += 1
    assert num_served > 100
    choose_backend.cache_clear()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_backend_of_a_model_is_chosen_by_what_its_layers_need(monkeypatch, name):
    model, asked = tiny(name), []
    monkeypatch.setattr(attention, "choose_backend", lambda *needs: asked.append(needs) or "sdpa")
    assert backend_of(model) == "sdpa"
    packed_hidden(model, make_pack(random_sequences([7, 3])))
    assert asked == asked[:1] * (1 + model.config.num_hidden_layers)


def refuse(reason=None):
    raise ValueError(reason or "flash-attn is not installed")


@pytest.mark.parametrize(
    ("backend", "change", "reason"),
    [
        ("flash_attn", {}, "flash-attn is not installed"),
        ("varlen", {"softcap": True}, "cannot cap"),
        ("varlen", {"dtype": torch.float32}, "float16 or bfloat16, not float32"),
        ("varlen", {"head_size": 100, "value_head_size": 100}, "multiples of 8"),
        ("varlen", {"capability": (7, 5)}, "the device has 7.5"),
        ("varlen", {"device_type": "cpu"}, "CUDA"),
        ("flex", {"device_type": "cpu"}, "no gradients on a CPU"),
        ("flex", {"head_size": 8}, "below"),
    ],
)
def test_a_backend_that_cannot_serve_is_one_clear_error(backend, change, reason):
    with pytest.raises(ValueError, match=rf"model\.attention='{backend}': .*{reason}.*use model\.attention=auto"):
        choose_backend(backend, dataclasses.replace(CUDA, **change))


def test_a_slower_backend_is_said_once(caplog):
    attention._warn_once.cache_clear()
    for needs_grad in (True, False):
        choose_backend.cache_clear()
        choose_backend("auto", dataclasses.replace(CUDA, softcap=True, needs_grad=needs_grad))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "slower flex" in messages[0] and "cannot cap" in messages[0]
    assert "flex has never been verified on a CUDA device" in messages[1]


def test_a_flash_attn_that_is_installed_and_cannot_be_used_is_said(monkeypatch, caplog):
    for reason, said in (("flash-attn cannot be imported: undefined symbol", True), (None, False)):
        monkeypatch.setattr(attention, "flash_attn_function", lambda reason=reason: refuse(reason))
        attention._warn_once.cache_clear()
        choose_backend.cache_clear()
        caplog.clear()
        assert choose_backend("auto", CUDA) == "varlen"
        assert any("undefined symbol" in record.getMessage() for record in caplog.records) == said
    choose_backend.cache_clear()


def test_a_forced_backend_is_checked_before_weights_are_read_and_then_used(tmp_path):
    path = make_tiny_model(tmp_path / "tiny")
    with pytest.raises(ValueError, match="model.attention='flash_attn'"):
        load_model(tmp_path / "absent", ModelConfig(path="x", device="cpu", attention="flash_attn"))
    with pytest.raises(ValueError, match="model.attention='flex'"):
        load_model(tmp_path / "absent", ModelConfig(path="x", device="cpu", attention="flex"))
    with pytest.raises(ValueError, match=r"model\.attention='fast': expected one of auto"):
        ModelConfig(path="x", attention="fast")
    model = load_model(path, ModelConfig(path="x", device="cpu", attention="sdpa"))
    pack = make_pack(random_sequences([5]))
    check_head(model, pack, 97)
    model.packed_attention_backend = "varlen"
    with pytest.raises(ValueError, match="model.attention='varlen': it needs a CUDA device"):
        check_head(model, pack, 97)
    for backend in ("auto", "sdpa"):
        check_backend(backend, torch.device("cpu"), torch.float32)
    assert set(BACKENDS) == {"flash_attn", "varlen", "flex", "sdpa"}


@pytest.mark.parametrize("name", CONFIGS)
def test_head_of_reproduces_the_models_own_logits(name):
    model = tiny(name)
    model.set_attn_implementation(ATTENTION_NAME)
    check_head(model, make_pack(random_sequences([5])), 97)
    assert (head_of(model, 97).softcap is not None) == (name == "gemma2-softcap")


def test_a_head_that_scales_its_logits_in_an_unknown_way_is_refused():
    model = tiny("llama")
    model.set_attn_implementation(ATTENTION_NAME)
    model.lm_head.register_forward_hook(lambda module, args, logits: 3.0 * logits)
    with pytest.raises(ValueError, match="head is not supported"):
        check_head(model, make_pack(random_sequences([5])), 97)


def test_a_model_whose_layers_mix_samples_is_refused():
    model = tiny("llama")
    model.set_attn_implementation(ATTENTION_NAME)
    layer = model.get_decoder().layers[0]
    layer.register_forward_hook(lambda module, args, hidden: hidden + 0.01 * hidden.cumsum(1))  # a running state
    with pytest.raises(ValueError, match="LlamaForCausalLM: .*cannot be packed"):
        check_head(model, make_pack(random_sequences([5])), 97)


def test_a_model_that_ignores_the_layout_is_refused():
    model = tiny("llama")
    model.set_attn_implementation("sdpa")
    forward = model.get_decoder().forward
    model.get_decoder().forward = lambda layout, **inputs: forward(
        **inputs, attention_mask=torch.ones(1, inputs["input_ids"].shape[1])
    )
    with pytest.raises(ValueError, match="cannot be packed"):
        check_head(model, make_pack(random_sequences([5])), 97)


def test_layers_of_another_kind_than_attention_are_refused(tmp_path):
    path = make_tiny_model(tmp_path / "tiny")
    config = json.loads((path / "config.json").read_text())
    config["layer_types"] = ["chunked_attention", "full_attention"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layers of kind chunked_attention; expected full or sliding attention"):
        load_model(path, ModelConfig(path="x", device="cpu"))
