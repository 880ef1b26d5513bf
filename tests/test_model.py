"""Loading: weights that are damaged, missing or not finite are refused before anything trains on them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, OPTConfig, PhiConfig, Starcoder2Config

import inverseq.model as model_module
from inverseq.config import ModelConfig
from inverseq.model import action_hidden, frozen_copy, head_of, load_model, resolve_device
from inverseq.packing import write_pack
from inverseq.resolve import resolve_model_path
from tests.tiny import make_tiny_model
from tests.tiny_samples import make_samples

CONFIG = ModelConfig(path="tiny", device="cpu")


@pytest.fixture
def path(tmp_path):
    return make_tiny_model(tmp_path / "tiny", tied=False)


def rewrite(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_missing_tensor_is_refused_and_not_made_up(path):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"weights are missing or of another shape: {name}"):
        load_model(path, CONFIG)


def test_a_tensor_of_another_shape_is_refused(path):
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(512, 32)}))
    with pytest.raises(ValueError, match=r"another shape: lm_head\.weight \(\(512, 32\) for \(512, "):
        load_model(path, CONFIG)


def test_weights_that_are_not_finite_are_refused(path):
    rewrite(path, lambda tensors: tensors["lm_head.weight"].view(-1)[7:8].fill_(float("nan")))
    with pytest.raises(ValueError, match="not finite"):
        load_model(path, CONFIG)


def test_a_cut_off_file_is_noticed_before_weights_are_loaded(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.path.*model.safetensors is damaged or cut off"):
        resolve_model_path("model.path", str(path))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(path, CONFIG)


def test_dropout_is_off(path):
    config_file = path / "config.json"
    config_file.write_text(config_file.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    model = load_model(path, CONFIG)
    assert model.config.attention_dropout == 0.0
    assert {module.attention_dropout for module in model.modules() if hasattr(module, "attention_dropout")} == {0.0}


COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
NOISY = [
    OPTConfig(**COMMON, word_embed_proj_dim=32, ffn_dim=64, dropout=0.5),
    OPTConfig(**COMMON, word_embed_proj_dim=32, ffn_dim=64, dropout=0.0, layerdrop=0.9),
    Starcoder2Config(**COMMON, intermediate_size=64, residual_dropout=0.5, embedding_dropout=0.5),
    MixtralConfig(**COMMON, num_key_value_heads=1, intermediate_size=64, router_jitter_noise=0.5),
    PhiConfig(**COMMON, intermediate_size=64, resid_pdrop=0.5, embd_pdrop=0.5),
]


@pytest.mark.parametrize("config", NOISY, ids=lambda config: config.model_type)
def test_a_model_in_training_is_the_function_that_it_is_in_evaluation(tmp_path, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, CONFIG)
    pack = write_pack(make_samples(2, num_views=1, vocab=64), [0, 1], (-1,))
    expected = action_hidden(model.eval(), pack)
    torch.manual_seed(0)
    assert torch.equal(action_hidden(model.train(), pack), expected)


def test_the_head_is_the_parameter_itself_and_its_padding_is_counted(path):
    model = load_model(path, CONFIG)
    head = head_of(model, num_valid_vocab=500)
    assert head.weight is model.lm_head.weight
    assert (head.num_valid_vocab, head.softcap, head.temperature) == (500, None, 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_cuda_is_not_replaced_by_a_cpu():
    with pytest.raises(ValueError, match="model.device='cuda'"):
        resolve_device(ModelConfig(device="cuda"))


def test_a_frozen_copy_goes_to_another_device_without_the_original(tmp_path):
    model = load_model(make_tiny_model(tmp_path / "tied", tied=True), CONFIG)
    before = [weight.clone() for weight in model.parameters()]
    elsewhere, beside = frozen_copy(model, "meta"), frozen_copy(model)
    assert all(weight.device.type == "meta" and not weight.requires_grad for weight in elsewhere.parameters())
    assert all(buffer.device.type == "cpu" for buffer in elsewhere.buffers()) and not elsewhere.training
    for copied in (elsewhere, beside):
        assert copied.get_input_embeddings().weight is copied.get_output_embeddings().weight
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    assert all(torch.equal(*pair) for pair in zip(beside.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_placed_as_they_are_read_are_those_of_the_ordinary_way(path, monkeypatch, dtype):
    config = ModelConfig(device="cpu", dtype=dtype)
    ordinary = load_model(path, config)
    monkeypatch.setattr(model_module, "placed_as_read", lambda device: {"device_map": {"": device}})
    placed = load_model(path, config)
    for mine, theirs in zip(named(placed), named(ordinary), strict=True):
        assert mine[0] == theirs[0] and torch.equal(mine[1], theirs[1]) and mine[1].dtype == theirs[1].dtype
    assert not any(hasattr(module, "_hf_hook") for module in placed.modules())  # nothing that moves inputs or weights


def named(model):
    return [*model.named_parameters(), *model.named_buffers()]


def test_a_rank_reads_onto_its_own_gpu_and_nothing_changes_on_a_cpu(monkeypatch, caplog):
    assert model_module.placed_as_read(torch.device("cpu")) == {}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert model_module.placed_as_read(torch.device("cuda")) == {"device_map": {"": torch.device("cuda", 3)}}
    monkeypatch.setattr(model_module, "is_accelerate_available", lambda: False)
    caplog.set_level("INFO", logger="inverseq")
    assert model_module.placed_as_read(torch.device("cuda")) == {}
    assert "through host memory" in caplog.text
