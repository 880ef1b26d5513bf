"""TRL's trainers on ``linear_logprob`` under DeepSpeed ZeRO-3, two processes of ``accelerate launch`` on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from tests.tiny import make_tiny_model, make_tiny_tokenizer

for package in ("trl", "deepspeed", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed")
ROOT = Path(__file__).parent.parent
HIDDEN = 256  # times the vocabulary above 100,000, below which ZeRO-3 keeps a weight whole between two steps
RUNS = [(kind, "float32", fused) for kind in ("sft", "dpo", "grpo") for fused in (False, True)]
RUNS += [("dpo", "bfloat16", fused) for fused in (False, True)]


def make_phi(path):
    """A model whose head is a weight of its own with a bias."""
    tokenizer = make_tiny_tokenizer()
    config = PhiConfig(
        vocab_size=512, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        initializer_range=0.1, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PhiForCausalLM(config)
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def round_to_bf16(path):
    """Values that both dtypes hold, so that only the arithmetic differs."""
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).float().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{(kind, dtype, fused): what a step does}, and the loss of the example."""
    folder = tmp_path_factory.mktemp("trl_zero3")
    shape = {"hidden": HIDDEN, "layers": 1, "scale": 0.1}
    tied, reference = (round_to_bf16(make_tiny_model(folder / f"{seed}", seed=seed, **shape)) for seed in (0, 1))
    models = {"sft": round_to_bf16(make_phi(folder / "phi")), "dpo": tied, "grpo": tied}
    cases = [
        {"kind": kind, "model": models[kind], "reference": reference, "dtype": dtype, "fused": fused}
        for kind, dtype, fused in RUNS
    ]
    launch = ["-m", "accelerate.commands.launch", "--use_deepspeed", "--zero_stage", "3", "--num_processes", "2"]
    job = ["--main_process_port", "0", "-m", "tests.trl_zero3_job", str(folder / "found.pt"), json.dumps(cases)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launch, *job], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[done.stderr.find("Traceback") :][:3000]
    results = torch.load(folder / "found.pt")
    return dict(zip(RUNS, results["cases"], strict=True)) | {"example": results["example"]}


def size(moved):
    return torch.stack([weight.double().norm() for weight in moved.values()]).norm().item()


def distance(one, two):
    return size({name: one["moved"][name].double() - moved.double() for name, moved in two["moved"].items()})


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_a_step_is_that_of_stock_trl(kind, found):
    """A head with a bias and one that is the embedding; what a step of SGD moves is the gradient."""
    truth, ours = (found[kind, "float32", fused] for fused in (False, True))
    assert all(moved.norm() > 1e-4 for name, moved in truth["moved"].items() if "embed" in name or "head" in name)
    assert distance(ours, truth) <= 1e-5 * size(truth["moved"])
    metrics = {name: value for name, value in truth["logged"].items() if name != "step_time"}
    assert {name: ours["logged"][name] for name in metrics} == pytest.approx(metrics, rel=1e-4, abs=1e-5)


def test_a_step_in_bf16_is_as_near_as_that_of_stock_trl(found):
    truth = found["dpo", "float32", False]
    stock, ours = (found["dpo", "bfloat16", fused] for fused in (False, True))
    assert 0 < distance(stock, truth) and distance(ours, truth) <= 2 * distance(stock, truth)
    loss, stock_loss, our_loss = (one["logged"]["loss"] for one in (truth, stock, ours))
    assert abs(our_loss - loss) <= 2 * abs(stock_loss - loss) + 0.005 * abs(loss)


def test_the_example_runs_as_its_line_for_zero_3_says(found):
    """The policy is its own reference before the first step."""
    assert found["example"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)
