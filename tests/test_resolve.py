"""What can be known before weights are loaded is checked then: models, tokenizers, prompts, lengths, devices."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from inverseq.config_loading import load_config
from inverseq.model import action_hidden, check_head, load_model
from inverseq.packing import view_lengths
from inverseq.records import Response, Sample
from inverseq.resolve import resolve, resolve_model_path
from inverseq.run_directory import write_run_config
from inverseq.small_model import MODEL_NAME
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    make_tiny_model(root / "tiny")
    make_tiny_model(root / "sft", seed=1)
    make_tiny_model(root / "short", max_positions=300)
    make_tiny_model(root / "other-words", vocab=500)
    rows = [{"prompt": "please explain water " * (1 + index)} for index in range(12)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def variant(models, tmp_path):
    """A copy of the tiny model whose files the test may change."""
    shutil.copy(models / "prompts.jsonl", tmp_path)
    return shutil.copytree(models / "tiny", tmp_path / "variant")


def config_for(tmp_path, model, *overrides):
    defaults = {
        "model.path": model,
        "run_dir": tmp_path / "run",
        "prompts.path": Path(model).parent / "prompts.jsonl",
        "prompts.held_out": 4,
    }
    words = [f"{key}={value}" for key, value in defaults.items() if not any(o.startswith(f"{key}=") for o in overrides)]
    return load_config("demo", [*words, *overrides])


def error_of(config):
    with pytest.raises(ValueError) as caught:
        resolve(config)
    return str(caught.value)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checked_run_holds_what_the_trainer_needs_and_nothing_is_written(models, tmp_path):
    resolved = resolve(config_for(tmp_path, models / "tiny", "evaluation.every=1", "evaluation.num_prompts=3"))
    assert resolved.model_path == str(models / "tiny") and resolved.plain_model_path is None
    assert resolved.num_valid_vocab == 512
    assert len(resolved.prompts.held_out) == 4 and len(resolved.test_prompts) == 3
    first = resolved.prompts.next(1)[0]
    better, plain = first.prefix_ids
    assert len(better) > len(plain) > 0  # the principle, and the explicit empty system message
    assert "<|im_start|>system\n<|im_end|>" in resolved.tokenizer.decode(first.policy_ids)
    assert list(tmp_path.iterdir()) == []


def test_the_model_contrast_reads_one_view_unless_a_principle_is_added(models, tmp_path):
    contrast = ("contrast.kind=model", f"contrast.plain_model={models / 'sft'}")
    resolved = resolve(config_for(tmp_path, models / "tiny", *contrast, "contrast.principle="))
    assert resolved.plain_model_path == str(models / "sft")
    assert len(resolved.prompts.held_out[0].prefix_ids) == 1
    resolved = resolve(config_for(tmp_path, models / "tiny", *contrast, "contrast.principle=default"))
    assert len(resolved.prompts.held_out[0].prefix_ids) == 2


def test_different_vocabularies_name_both_models_and_a_token(models, tmp_path):
    contrast = ("contrast.kind=model", f"contrast.plain_model={models / 'other-words'}")
    message = error_of(config_for(tmp_path, models / "tiny", *contrast))
    assert "different vocabularies" in message
    assert str(models / "tiny") in message and str(models / "other-words") in message
    assert "12 of 512 and 500 tokens differ" in message


def test_equal_words_with_other_ids_are_a_different_vocabulary(models, variant, tmp_path):
    tokenizer = json.loads((variant / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (variant / "tokenizer.json").write_text(json.dumps(tokenizer))
    contrast = ("contrast.kind=model", f"contrast.plain_model={variant}")
    assert "2 of 512 and 512 tokens differ" in error_of(config_for(tmp_path, models / "tiny", *contrast))


def test_heads_of_different_sizes_cannot_be_contrasted(models, variant, tmp_path):
    edit_json(variant / "config.json", vocab_size=520)
    contrast = ("contrast.kind=model", f"contrast.plain_model={variant}")
    message = error_of(config_for(tmp_path, models / "tiny", *contrast))
    assert "vocab_size is 520 and 512" in message and str(variant) in message


def test_rows_that_no_token_has_are_padding(variant, tmp_path):
    edit_json(variant / "config.json", vocab_size=576)
    assert resolve(config_for(tmp_path, variant)).num_valid_vocab == 512


def test_tokens_without_a_row_are_an_error(variant, tmp_path):
    edit_json(variant / "config.json", vocab_size=500)
    message = error_of(config_for(tmp_path, variant))
    assert "model.path" in message and "no row in the model's vocabulary of 500" in message


def test_a_tokenizer_without_chat_template_or_eos_is_refused(models, variant, tmp_path):
    template = (variant / "chat_template.jinja").read_text()
    (variant / "chat_template.jinja").unlink()
    assert "chat template" in error_of(config_for(tmp_path, variant))
    assert resolve(config_for(tmp_path, variant, "model.chat_template=zephyr")).num_valid_vocab == 512
    (variant / "chat_template.jinja").write_text(template)
    edit_json(variant / "tokenizer_config.json", eos_token=None)
    assert "EOS" in error_of(config_for(tmp_path, variant))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "config.json").write_text("{x"), "configuration cannot be loaded"),
        (lambda path: (path / "config.json").write_text('{"model_type": "zzz"}'), "configuration cannot be loaded"),
        (lambda path: edit_json(path / "config.json", hidden_size="x"), "expected int"),
        (lambda path: edit_json(path / "config.json", model_type="t5"), "'t5'; expected a causal language model"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer cannot be loaded: Couldn't instantiate"),
        (lambda path: (path / "tokenizer.json").write_text("{x"), "tokenizer cannot be loaded"),
        (lambda path: (path / "tokenizer.json").write_text('{"a": 1}'), "tokenizer cannot be loaded"),
        (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "no .safetensors weights"),
    ],
)
def test_a_damaged_model_folder_names_the_key_and_what_is_wrong(variant, tmp_path, damage, expected):
    damage(variant)
    message = error_of(config_for(tmp_path, variant))
    assert "model.path=" in message and str(variant) in message and expected in message and "\n" not in message


def test_a_model_path_that_is_no_folder_is_told_from_a_hub_id(tmp_path):
    assert resolve_model_path("model.path", "lmsys/vicuna-7b-v1.5") == "lmsys/vicuna-7b-v1.5"
    (tmp_path / "file").write_text("x")
    for name, expected in (("./none", "no such folder"), ("a/b/c", "no such folder"), (tmp_path / "file", "is a file")):
        with pytest.raises(ValueError, match=expected):
            resolve_model_path("model.path", str(name))


def test_the_shipped_small_model_is_found_in_the_cache_or_says_how_to_fetch_it(tmp_path, monkeypatch):
    monkeypatch.setenv("INVERSEQ_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="python -m inverseq.small_model"):
        resolve_model_path("model.path", MODEL_NAME)
    make_tiny_model(tmp_path / MODEL_NAME)
    assert resolve_model_path("model.path", MODEL_NAME) == str(tmp_path / MODEL_NAME)


def test_a_sample_that_fits_no_pack_is_refused_before_work(models, tmp_path):
    longest = max(len(item.policy_ids) for item in stream_items(config_for(tmp_path, models / "tiny")))
    fits, too_small = f"packing.train_tokens={longest + 47}", f"packing.train_tokens={longest + 46}"
    resolve(config_for(tmp_path, models / "tiny", fits))
    message = error_of(config_for(tmp_path, models / "tiny", too_small))
    assert "packing.train_tokens" in message and f"at least {longest + 47}" in message


def test_all_views_of_a_sample_must_fit_one_scoring_pack(models, tmp_path):
    items = stream_items(config_for(tmp_path, models / "tiny"))
    needed = max(sum(len(prefix) + len(item.prompt_ids) + 47 for prefix in item.prefix_ids) for item in items)
    resolve(config_for(tmp_path, models / "tiny", f"packing.score_tokens={needed}"))
    message = error_of(config_for(tmp_path, models / "tiny", f"packing.score_tokens={needed - 1}"))
    assert "packing.score_tokens" in message and f"at least {needed}" in message


def test_the_budgets_asked_for_are_those_the_packer_needs(models, tmp_path):
    items = stream_items(config_for(tmp_path, models / "tiny"))
    response = Response(np.zeros(48, np.int32), "length", 0, "longest", "", 0)
    samples = [Sample(item, response) for item in items]
    plain, both = (int(view_lengths(samples, views).max()) for views in ((-1,), (0, -1)))
    budgets = f"packing.train_tokens={plain}", f"packing.score_tokens={both}"
    resolve(config_for(tmp_path, models / "tiny", *budgets))
    for budget in (f"packing.train_tokens={plain - 1}", f"packing.score_tokens={both - 1}"):
        assert budget.partition("=")[0] in error_of(config_for(tmp_path, models / "tiny", budget))


def stream_items(config):
    resolved = resolve(config)
    return [*resolved.prompts.training, *resolved.prompts.held_out]


def test_the_longest_view_must_fit_the_models_positions(models, tmp_path):
    message = error_of(config_for(tmp_path, models / "short"))
    assert "sampling.max_new_tokens=48" in message and "has 300" in message


def test_the_plain_model_must_know_the_positions_too(models, tmp_path):
    contrast = ("contrast.kind=model", f"contrast.plain_model={models / 'short'}", "contrast.principle=default")
    assert f"{models / 'short'} has 300" in error_of(config_for(tmp_path, models / "tiny", *contrast))


def test_two_models_score_the_views_of_a_sample_in_packs_of_their_own(models, tmp_path):
    contrast = ("contrast.kind=model", f"contrast.plain_model={models / 'sft'}", "contrast.principle=default")
    items = stream_items(config_for(tmp_path, models / "tiny", *contrast))
    needed = max(len(prefix) + len(item.prompt_ids) + 47 for item in items for prefix in item.prefix_ids)
    resolve(config_for(tmp_path, models / "tiny", *contrast, f"packing.score_tokens={needed}"))
    message = error_of(config_for(tmp_path, models / "tiny", *contrast, f"packing.score_tokens={needed - 1}"))
    assert f"at least {needed}" in message


def test_test_prompts_come_from_their_own_file_and_long_ones_are_dropped(models, tmp_path, caplog):
    rows = [{"prompt": "what is water?"}, {"prompt": "long " * 500}, {"prompt": "who are you?"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("evaluation.every=1", f"evaluation.prompts={tmp_path / 'test.jsonl'}")
    with caplog.at_level("INFO"):
        resolved = resolve(config_for(tmp_path, models / "tiny", *options))
    assert [item.prompt.id for item in resolved.test_prompts] == ["test-1", "test-3"]
    assert "dropped 1 over 384 tokens" in caplog.text
    message = error_of(config_for(tmp_path, models / "tiny", *options, "evaluation.num_prompts=3"))
    assert "evaluation.num_prompts=3" in message and "2 test prompts" in message
    message = error_of(config_for(tmp_path, models / "tiny", "evaluation.every=1", "prompts.held_out=0"))
    assert "evaluation.every=1: there is no test prompt" in message and "prompts.held_out" in message


def test_devices_packages_and_folders_that_are_not_there_are_named(models, tmp_path, monkeypatch):
    rows = {
        ("sampling.backend=replay", "sampling.replay_path=nowhere"): "sampling.replay_path='nowhere'",
        ("prompts.path=none.jsonl",): "none.jsonl",
        ("contrast.principle=unknown",): "contrast.principle='unknown'",
        ("model.chat_template=unknown",): "model.chat_template='unknown'",
        ("prompts.held_out=12",): "prompts.held_out=12",
        ("model.path=nowhere",): "model.path='nowhere': no such folder, and as a hub id the model's configuration",
    }
    if not torch.cuda.is_available():
        rows |= {
            ("model.device=cuda",): "model.device='cuda'",
            ("engine.kernel_backend=triton",): "engine.kernel_backend",
            ("model.attention=flash_attn",): "model.attention='flash_attn': it needs a CUDA device",
            ("model.fused_layers=true",): "model.fused_layers=True: liger-kernel's layers need a CUDA device",
        }
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for overrides, expected in rows.items():
        assert expected in error_of(config_for(tmp_path, models / "tiny", *overrides))


def test_the_probe_pack_is_read_by_the_model(models, tmp_path):
    config = config_for(tmp_path, models / "tiny", "model.device=cpu")
    resolved = resolve(config)
    model = load_model(resolved.model_path, config.model)
    pack = resolved.probe_pack()
    check_head(model, pack, resolved.num_valid_vocab)
    assert action_hidden(model, pack).shape == (1, 8, 64)


def test_a_resumed_run_without_a_checkpoint_says_that_it_starts_again(models, tmp_path, caplog):
    config = config_for(tmp_path, models / "tiny")
    write_run_config(config, tmp_path / "run")
    with caplog.at_level("INFO"):
        resolve(config, resume=True)
    assert "run holds no complete checkpoint: the run starts from its beginning" in caplog.text
