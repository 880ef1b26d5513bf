"""Two processes train what one trains: every ZeRO stage, offload, placement and number of samples, and resuming.

One process samples; all other runs replay its samples, so that only the engine and the ranks differ. The runs of two
processes share one torchrun (``tests/ranks_worker.py``), but for the last step of 2 → 1 → 2 ranks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inverseq import trainer
from inverseq.config_loading import load_config
from inverseq.metrics import read_metrics
from tests.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
ATOL = 1e-5
OVERRIDES = [
    "model.device=cpu",
    "prompts.held_out=3",
    "sampling.samples_per_epoch=5",  # shares of 3 and 2
    "sampling.max_new_tokens=8",
    "sampling.batch_size=8",
    "packing.train_tokens=96",
    "packing.score_tokens=256",
    "optim.lr=3e-3",
    "optim.eps=1e-3",  # no division by rounding noise
    "optim.weight_decay=0.1",
    "optim.max_grad_norm=0.5",  # clips
    "optim.samples_per_step=4",  # the second step has one sample: one rank has none
    "optim.schedule=linear",
    "optim.warmup_steps=1",
    "logging.tensorboard=false",
    "epochs=2",
]
CONTRASTS = {"principle": [], "model": ["contrast.kind=model", "contrast.plain_model={root}/sft"]}
ONE_SAMPLE = ["sampling.samples_per_epoch=1", "epochs=1"]
# reference run: (policy, contrast, overrides)
REFERENCES = {
    "tied": ("tied", "principle", []),
    "untied": ("untied", "principle", []),
    "model contrast": ("tied", "model", []),
    "one sample": ("tied", "principle", ONE_SAMPLE),
    "unclipped": ("tied", "principle", ["optim.max_grad_norm=0"]),
}
# run of two ranks: (reference, overrides)
CASES = {
    "ZeRO-3 tied": ("tied", ["engine.zero_stage=3"]),
    "ZeRO-3 untied": ("untied", ["engine.zero_stage=3"]),
    "ZeRO-2 tied": ("tied", ["engine.zero_stage=2"]),
    "ZeRO-2 untied": ("untied", ["engine.zero_stage=2"]),
    "ZeRO-1 tied": ("tied", ["engine.zero_stage=1"]),
    "ZeRO-1 untied": ("untied", ["engine.zero_stage=1"]),
    "ZeRO-3 model contrast": ("model contrast", ["engine.zero_stage=3"]),
    "ZeRO-1 model contrast": ("model contrast", ["engine.zero_stage=1"]),
    "ZeRO-3 offloaded": (
        "tied",
        ["engine.zero_stage=3", "engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"],
    ),
    "ZeRO-2 offloaded": ("untied", ["engine.zero_stage=2", "engine.offload_optimizer=cpu"]),
    "ZeRO-1 offloaded": ("tied", ["engine.zero_stage=1", "engine.offload_optimizer=cpu"]),
    "sharded frozen model": ("tied", ["engine.zero_stage=3", "engine.frozen=sharded"]),
    "sharded frozen models": ("model contrast", ["engine.zero_stage=2", "engine.frozen=sharded"]),
    "frozen model on the host": ("untied", ["engine.zero_stage=1", "engine.frozen=host"]),
    "recomputed activations": ("untied", ["engine.zero_stage=3", "model.gradient_checkpointing=true"]),
    "a rank without samples": ("one sample", ["engine.zero_stage=3"]),
    "no clipping": ("unclipped", ["engine.zero_stage=2"]),
    "the default placement": ("tied", []),
}


def overrides_of(root: Path, name: str, reference: str, extra=()) -> list[str]:
    policy, contrast, words = REFERENCES[reference]
    paths = [f"model.path={root / policy}", f"prompts.path={root / 'prompts.jsonl'}", f"run_dir={root / 'runs' / name}"]
    replay = ["sampling.backend=replay", f"sampling.replay_path={root / 'runs' / 'sampled'}"]
    contrasts = [f"contrast.principle={root / 'principle'}", *(word.format(root=root) for word in CONTRASTS[contrast])]
    values = dict(word.split("=", 1) for word in [*OVERRIDES, *paths, *replay, *contrasts, *words, *extra])
    return [f"{key}={value}" for key, value in values.items()]


def torchrun(root: Path, jobs: list[dict], name: str) -> subprocess.CompletedProcess:
    path = root / f"{name}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "tests.ranks_worker", str(path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The models, a sampled run of one process, and the reference runs that replay it."""
    root = tmp_path_factory.mktemp("ranks")
    for name, options in {"tied": {}, "untied": {"tied": False}, "sft": {"tied": False, "seed": 1}}.items():
        make_tiny_model(root / name, scale=0.2, **options)
    (root / "principle").write_text("be kind and true, please explain the answer")
    words = "what is the first number|help me write a long word|who made oil|when did people call|can you find water"
    prompts = [f"{question} {count}" for count in ("one", "two more", "on each day") for question in words.split("|")]
    rows = [{"id": f"p{index}", "prompt": prompt} for index, prompt in enumerate(prompts)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = ["sampling.backend=transformers", "sampling.replay_path="]
    trainer.train(load_config("demo", overrides_of(root, "sampled", "tied", sampling)))
    for name in REFERENCES:
        trainer.train(load_config("demo", overrides_of(root, f"one process {name}", name)))
    return root


@pytest.fixture(scope="module")
def two_ranks(root) -> Path:
    """The folder of the runs of two ranks."""
    jobs = [
        {"name": name, "overrides": overrides_of(root, name, reference, words), "resume": False}
        for name, (reference, words) in CASES.items()
    ]
    done = torchrun(root, jobs, "jobs")
    (root / "output").write_text(done.stdout + done.stderr)
    return root / "runs"


def assert_trained(root: Path, name: str) -> None:
    errors = "".join(path.read_text() for path in sorted(root.glob(f"{name}.error.*")))
    assert (root / f"{name}.ok").exists(), errors or (root / "output").read_text()[-3000:]


def assert_same_training(run_dir: Path, reference: Path, *, atol: float = ATOL) -> None:
    mine, theirs = load_file(run_dir / "export/model.safetensors"), load_file(reference / "export/model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=0, atol=atol, msg=name)
    keys = ("loss", "mean_log_ratio", "rms_log_ratio", "kl_to_plain", "grad_norm", "learning_rate", "num_actions")
    ours, expected = read_metrics(run_dir, "step"), read_metrics(reference, "step")
    for key in keys:
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in expected], rel=1e-4, abs=1e-6), key
    key = "held_out/mean_squared_log_ratio"
    ours, expected = read_metrics(run_dir, "epoch"), read_metrics(reference, "epoch")
    assert [row[key] for row in ours] == pytest.approx([row[key] for row in expected], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_what_one_process_trains(root, two_ranks, name):
    assert_trained(root, name)
    assert_same_training(two_ranks / name, two_ranks / f"one process {CASES[name][0]}")
