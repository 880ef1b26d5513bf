import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from inverseq.attention import ATTENTION_NAME
from inverseq.config import ModelConfig
from inverseq.export import export_model
from inverseq.model import load_model
from tests.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_as_any_model_with_the_same_weights_and_tokenizer(tmp_path, tied):
    source = make_tiny_model(tmp_path / "source", tied=tied)
    model = load_model(source, ModelConfig(path=str(source), device="cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    tokenizer = AutoTokenizer.from_pretrained(source)
    path = export_model(model, tokenizer, tmp_path / "run" / "export")
    assert path == tmp_path / "run" / "export"
    loaded = AutoModelForCausalLM.from_pretrained(path)
    for (name, ours), (other, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.generation_config.temperature == 0.3  # the model's own settings, training did not follow them
    again = AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "please help"}]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert not any(ATTENTION_NAME in file.read_text() for file in path.glob("*.json"))
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ".jinja"}


def test_a_second_export_replaces_the_first_and_carries_the_template_that_was_used(tmp_path):
    source = make_tiny_model(tmp_path / "source")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    path = export_model(model, tokenizer, tmp_path / "export")
    (path / "stale").write_text("")
    export_model(model, tokenizer, path, chat_template="USER: {{ messages[0]['content'] }}")
    assert not (path / "stale").exists()
    assert AutoTokenizer.from_pretrained(path).chat_template.startswith("USER: ")
    assert tokenizer.chat_template.startswith("{% for")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["export", "source"]


def test_a_generation_config_that_transformers_refuses_does_not_cost_the_export(tmp_path):
    source = make_tiny_model(tmp_path / "source")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    model.generation_config.do_sample = False  # with a temperature, as published Vicuna models have it
    with pytest.raises(ValueError):
        model.generation_config.validate(strict=True)
    path = export_model(model, tokenizer, tmp_path / "export")
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert model.generation_config.temperature == 0.3
    AutoModelForCausalLM.from_pretrained(path)


FULL_DISK = """
import resource, signal, sys
from tests.test_export import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source, path = map(Path, sys.argv[1:])
model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in (100_000, 1_000, 0):  # in the weights, in a configuration file, at once
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        export_model(model, tokenizer, path)
    except OSError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in message and message.endswith(f"'{path}'"), message
    assert [entry.name for entry in path.parent.iterdir()] == ["export"]
    AutoModelForCausalLM.from_pretrained(path)
"""


def test_a_full_disk_is_one_error_naming_the_export_and_the_older_one_stays(tmp_path):
    source = make_tiny_model(tmp_path / "source")
    path = tmp_path / "run" / "export"
    export_model(AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source), path)
    command = [sys.executable, "-c", FULL_DISK, source, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
