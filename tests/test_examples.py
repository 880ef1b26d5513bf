"""Every example runs as its first lines say, on a tiny model; those of many processes take one process's steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import make_tiny_model

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
MANY_PROCESSES = {"accelerate_fsdp2", "deepspeed_zero3"}
TEXTS = ["The earth is almost a sphere.", "Seven is a prime number and nine is not."]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("examples") / "model", scale=0.2)


def run_example(path, model_path, folder, *words):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *(launcher if path.stem in MANY_PROCESSES else []), str(path), str(model_path), *words]
    root = path.parent.parent
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'kernels'}", "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(path, model_path, tmp_path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 80 and f"examples/{path.name} MODEL" in path.read_text()
    if path.stem in MANY_PROCESSES:
        out = run_example(path, model_path, tmp_path)
        losses = [float(word) for word in re.search(r"loss by step: (.*)", out)[1].split(", ")]
        assert losses == pytest.approx(steps_of_one_process(model_path, len(losses)), abs=2e-4)
    else:
        loss = float(re.search(r"training loss (\S+)", run_example(path, model_path, tmp_path, "1"))[1])
        assert loss == loss and abs(loss) < 100


def steps_of_one_process(model_path, steps):
    """Losses of full logits and one optimizer over the tokens of both processes: the first has both texts."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = [tokenizer(text, return_tensors="pt").input_ids for text in (*TEXTS, TEXTS[1])]
    counts = [ids.shape[1] - 1 for ids in batches]
    assert counts[0] != counts[1]
    losses = []
    for _ in range(steps):
        sums = [model(ids, labels=ids).loss * count for ids, count in zip(batches, counts, strict=True)]
        loss = sum(sums) / sum(counts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
