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
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from inverseq import trainer
from inverseq.checkpoint_sharded import load_named_checkpoint
from inverseq.config_loading import load_config
from inverseq.distributed import Ranks
from inverseq.metrics import read_metrics
from inverseq.sample_files import read_samples
from tests.ranks_jobs import cut_back
from tests.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
ATOL = 1e-5
OVERRIDES = [
    "model.device=cpu",
    "prompts.held_out=3",
    "sampling.samples_per_epoch=5",  # shares of 3 and 2
    "sampling.max_new_tokens=8",
    "sampling.batch_size=8",
    "packing.train_tokens=64",  # a pack for each sample: several micro-batches
    "packing.score_tokens=256",
    "optim.lr=3e-3",
    "optim.eps=1e-3",  # no division by rounding noise
    "optim.weight_decay=0.1",
    "optim.max_grad_norm=0.5",  # clips
    "optim.samples_per_step=4",  # the second step has one sample: one rank has none
    "optim.schedule=linear",
    "optim.warmup_steps=1",
    "logging.tensorboard=false",
    "checkpoint.keep_last=3",
    "epochs=2",
]
CONTRASTS = {"principle": [], "model": ["contrast.kind=model", "contrast.plain_model={root}/sft"]}
SAMPLING = ["sampling.backend=transformers", "sampling.replay_path="]
LORA = ["policy.lora.rank=4", "policy.lora.alpha=16", "optim.lr=1e-2"]
EXPERTS = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
EXPERTS |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}  # one tensor each in the file
ONE_SAMPLE = ["sampling.samples_per_epoch=1", "prompts.held_out=1", "epochs=1"]
# reference run: (policy, contrast, overrides)
REFERENCES = {
    "tied": ("tied", "principle", []),
    "untied": ("untied", "principle", []),
    "model contrast": ("tied", "model", []),
    "one sample": ("tied", "principle", [*ONE_SAMPLE, *SAMPLING]),
    "unclipped": ("tied", "principle", ["optim.max_grad_norm=0"]),
    "three epochs": ("tied", "principle", ["epochs=3"]),
    "refreshed": ("untied", "principle", ["contrast.refresh_every=1"]),
    "bfloat16": ("untied", "principle", ["model.dtype=bfloat16", "epochs=1"]),
    "LoRA": ("untied", "principle", LORA),
    "LoRA model contrast": ("tied", "model", LORA),
    "LoRA bfloat16": ("untied", "principle", [*LORA, "model.dtype=bfloat16", "epochs=1"]),
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
    "a rank without samples": (
        "one sample",
        ["engine.zero_stage=3", "sampling.backend=replay", "sampling.replay_path={root}/runs/one process one sample"],
    ),
    "no clipping": ("unclipped", ["engine.zero_stage=2"]),
    "the default placement": ("tied", []),
    "plain data parallelism": ("tied", ["engine.zero_stage=0"]),
    "bfloat16 under ZeRO-3": ("bfloat16", ["engine.zero_stage=3"]),
    "bfloat16 under ZeRO-2": ("bfloat16", ["engine.zero_stage=2"]),
    "bfloat16 under ZeRO-1": ("bfloat16", ["engine.zero_stage=1"]),
    "three epochs": ("three epochs", ["engine.zero_stage=3"]),
    "a contrast that is refreshed": ("refreshed", ["engine.zero_stage=3"]),
    "LoRA by default": ("LoRA", []),
    "LoRA under ZeRO-2": ("LoRA", ["engine.zero_stage=2"]),
    "LoRA model contrast": ("LoRA model contrast", ["engine.zero_stage=1"]),
    "LoRA in bfloat16": ("LoRA bfloat16", ["engine.zero_stage=1"]),
}
STAGES = (3, 2, 1)
# Runs of two ranks that go on from a copy of another run: (run, epochs kept, reference, overrides, action)
RESUMED = {
    "ZeRO-3 resumed": ("ZeRO-3 untied", 1, "untied", ["engine.zero_stage=3"], "resume"),
    "ZeRO-3 resumed as ZeRO-1": ("ZeRO-3 tied", 1, "tied", ["engine.zero_stage=1"], "resume"),
    "ZeRO-2 resumed offloaded": (
        "ZeRO-2 untied", 1, "untied", ["engine.zero_stage=3", "engine.offload_optimizer=cpu"], "resume"
    ),
    "one process resumed by two": ("one process tied", 1, "tied", ["engine.zero_stage=3"], "resume"),
    "two, then one": (
        "three epochs", 1, "three epochs", ["engine.kind=deepspeed", "engine.zero_stage=3"], "one_process"
    ),
    "two, then one, then two": ("two, then one", 2, "three epochs", ["engine.zero_stage=2"], "resume"),
    "LoRA resumed": ("LoRA by default", 1, "LoRA", ["engine.zero_stage=2"], "resume"),
    "LoRA of one process resumed by two": ("one process LoRA", 1, "LoRA", [], "resume"),
}  # fmt: skip
ENGINE_JOBS = {  # (action, overrides)
    **{f"not a number under ZeRO-{stage}": ("not_a_number_on_one_rank", stage) for stage in STAGES},
    **{f"not a number in bfloat16 under ZeRO-{stage}": ("not_a_number_in_bfloat16", stage) for stage in STAGES},
    "gradients under ZeRO-1": ("no_16_bit_gradient_stays", 1),
    "a wrong copy": ("a_wrong_copy_is_noticed", 3),
    "only the policy is partitioned": ("nothing_else_is_partitioned", 3),
    "models that are sharded": ("no_rank_holds_a_whole_model", 3),
    "nothing is loaded whole": ("a_run_that_shards_everything_loads_nothing_whole", 3),
    "damaged weights": ("damaged_weights_are_refused_by_all", 3),
    "modes of a step": ("a_step_trains_and_log_probs_do_not", 3),
    "a damaged part": ("a_damaged_part_is_found_by_all", 3),
}


def overrides_of(root: Path, name: str, reference: str, extra=()) -> list[str]:
    policy, contrast, words = REFERENCES[reference]
    paths = [f"model.path={root / policy}", f"prompts.path={root / 'prompts.jsonl'}", f"run_dir={root / 'runs' / name}"]
    replay = ["sampling.backend=replay", f"sampling.replay_path={root / 'runs' / 'sampled'}"]
    contrasts = [f"contrast.principle={root / 'principle'}", *(word.format(root=root) for word in CONTRASTS[contrast])]
    words = [*OVERRIDES, *paths, *replay, *contrasts, *words, *(word.format(root=root) for word in extra)]
    values = dict(word.split("=", 1) for word in words)
    return [f"{key}={value}" for key, value in values.items()]


def torchrun(root: Path, jobs: list[dict], name: str) -> subprocess.CompletedProcess:
    path = root / f"{name}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    environment |= {"CXX": "no-compiler", "TORCH_EXTENSIONS_DIR": str(root / "extensions")}  # nothing is compiled
    return subprocess.run(
        [*command, "-m", "tests.ranks_worker", str(path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The models, a sampled run of one process, and the reference runs that replay it."""
    root = tmp_path_factory.mktemp("ranks")
    shapes = {"tied": {}, "untied": {"tied": False}, "sft": {"tied": False, "seed": 1}, "deep": {"layers": 16}}
    for name, options in shapes.items():
        make_tiny_model(root / name, scale=0.2, **options)
    MixtralForCausalLM(MixtralConfig(**EXPERTS)).save_pretrained(root / "experts")
    (root / "principle").write_text("be kind and true, please explain the answer")
    words = "what is the first number|help me write a long word|who made oil|when did people call|can you find water"
    prompts = [f"{question} {count}" for count in ("one", "two more", "on each day") for question in words.split("|")]
    rows = [{"id": f"p{index}", "prompt": prompt} for index, prompt in enumerate(prompts)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer.train(load_config("demo", overrides_of(root, "sampled", "tied", [*SAMPLING, "epochs=3"])))
    for name in REFERENCES:
        trainer.train(load_config("demo", overrides_of(root, f"one process {name}", name)))
    return root


@pytest.fixture(scope="module")
def two_ranks(root) -> Path:
    """The folder of the runs of two ranks."""
    runs = root / "runs"
    jobs = [
        {"name": name, "action": "train", "overrides": overrides_of(root, name, reference, words)}
        for name, (reference, words) in CASES.items()
    ]
    sampled = overrides_of(root, "sampled by two", "tied", [*SAMPLING, "engine.zero_stage=3", "epochs=1"])
    jobs.append({"name": "sampled by two", "action": "train", "overrides": sampled})
    for name, (origin, num_epochs, reference, words, action) in RESUMED.items():
        job = {"name": name, "action": action, "copy": str(runs / origin), "num_epochs": num_epochs}
        jobs.append(job | {"overrides": overrides_of(root, name, reference, words)})
    for name, (action, stage) in ENGINE_JOBS.items():
        overrides = overrides_of(root, name, "untied", [f"engine.zero_stage={stage}"])
        others = {"samples_of": str(runs / "sampled"), "copy": str(runs / "ZeRO-3 untied")}
        others |= {"models": ["tied", "deep", "experts"], "dtype": "bfloat16"}
        jobs.append({"name": name, "action": action, "overrides": overrides, **others})
    done = torchrun(root, jobs, "jobs")
    (root / "output").write_text(done.stdout + done.stderr)
    return runs


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


def masters_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    parts = [load_file(part) for part in checkpoint.glob("*.safetensors")]
    return {key.removeprefix("master/"): part[key] for part in parts for key in part if key.startswith("master/")}


FP32_CASES = [name for name in CASES if "bfloat16" not in name]


@pytest.mark.parametrize("name", FP32_CASES)
def test_two_ranks_train_what_one_process_trains(root, two_ranks, name):
    assert_trained(root, name)
    assert_same_training(two_ranks / name, two_ranks / f"one process {CASES[name][0]}")


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_weights_are_trained_through_fp32_masters(root, two_ranks, stage):
    name = f"bfloat16 under ZeRO-{stage}"
    assert_trained(root, name)
    initial = load_file(root / "untied" / "model.safetensors")
    state = torch.load(two_ranks / "one process bfloat16/checkpoints/epoch_0001/engine.pt", weights_only=True)
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(root / "untied").named_parameters()]
    expected = dict(zip(names, state["masters"], strict=True))
    masters = masters_of(two_ranks / name / "checkpoints/epoch_0001")
    exported = load_file(two_ranks / name / "export/model.safetensors")
    assert masters.keys() == expected.keys() == exported.keys()
    for key, master in masters.items():
        assert exported[key].dtype == torch.bfloat16 and torch.equal(master.bfloat16(), exported[key]), key
    gap = torch.cat([(masters[key] - expected[key]).flatten() for key in names])
    moved = torch.cat([(expected[key] - initial[key].bfloat16()).flatten() for key in names])
    assert gap.norm() < 0.05 * moved.norm(), "gradients of micro-batches and ranks meet in bfloat16: 1 % was measured"
    assert any(not torch.equal(master, master.bfloat16().float()) for master in masters.values())


def test_adapters_of_two_ranks_are_checkpointed_alone_and_exported_as_those_of_one_process(root, two_ranks):
    assert_trained(root, "LoRA by default")
    mine, theirs = two_ranks / "LoRA by default", two_ranks / "one process LoRA"
    expected = load_file(theirs / "checkpoints/epoch_0002/model.safetensors")
    masters = masters_of(mine / "checkpoints/epoch_0002")
    assert masters.keys() == expected.keys() and all("lora_" in key for key in masters)
    ours, adapters = (load_file(run / "adapter/adapter_model.safetensors") for run in (mine, theirs))
    assert ours.keys() == adapters.keys() and len(ours) == len(masters)
    for found, wanted in ((masters, expected), (ours, adapters)):
        for key, weight in wanted.items():
            torch.testing.assert_close(found[key], weight, rtol=0, atol=ATOL, msg=key)


def test_adapters_of_a_16_bit_model_are_trained_through_fp32_masters(root, two_ranks):
    assert_trained(root, "LoRA in bfloat16")
    masters = masters_of(two_ranks / "LoRA in bfloat16/checkpoints/epoch_0001")
    expected = load_file(two_ranks / "one process LoRA bfloat16/checkpoints/epoch_0001/model.safetensors")
    keys = [key for key in expected if "lora_B" in key]  # these start at 0
    assert {masters[key].dtype for key in keys} == {torch.float32}
    gap = torch.cat([(masters[key] - expected[key]).flatten() for key in keys])
    moved = torch.cat([expected[key].flatten() for key in keys])
    assert 0 < gap.norm() < 0.05 * moved.norm(), f"{gap.norm() / moved.norm():.3f}: adapters of one process are fp32"
    assert any(not torch.equal(masters[key], masters[key].bfloat16().float()) for key in keys)
    exported = load_file(two_ranks / "LoRA in bfloat16/export/model.safetensors")
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_another_number_of_ranks_another_stage_or_another_engine(root, two_ranks, name):
    assert_trained(root, name)
    assert_same_training(two_ranks / name, two_ranks / f"one process {RESUMED[name][2]}")


@pytest.mark.parametrize(("name", "reference"), [("ZeRO-3 untied", "untied"), ("LoRA by default", "LoRA")])
def test_one_process_goes_on_from_a_checkpoint_of_two_ranks(root, two_ranks, name, reference):
    assert_trained(root, name)
    cut_back(two_ranks / name, two_ranks / f"{name}, then torch", num_epochs=1)
    trainer.train(load_config("demo", overrides_of(root, f"{name}, then torch", reference)), resume=True)
    assert_same_training(two_ranks / f"{name}, then torch", two_ranks / f"one process {reference}")


def test_two_ranks_that_resume_are_the_uninterrupted_two_bit_for_bit(root, two_ranks):
    assert_trained(root, "ZeRO-3 resumed")
    resumed, whole = two_ranks / "ZeRO-3 resumed", two_ranks / "ZeRO-3 untied"
    clocks = ("duration_s", "tokens_per_second", "_bytes")
    rows = [
        [{k: v for k, v in row.items() if not k.endswith(clocks)} for row in read_metrics(run)]
        for run in (resumed, whole)
    ]
    assert rows[0] == rows[1]
    files = [path.relative_to(whole) for path in (whole / "checkpoints/epoch_0002").glob("state_*.safetensors")]
    assert len(files) == 2, "each rank has written its part"
    for file in [*files, "samples/epoch_0002.jsonl", "export/model.safetensors"]:
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), file


def test_two_ranks_sample_their_shares_and_one_process_trains_the_same_on_them(root, two_ranks):
    assert_trained(root, "sampled by two")
    samples = read_samples(two_ranks / "sampled by two/samples/epoch_0001.jsonl").samples
    seeds = [trainer.derive_seed(0, 1, "sampling", rank) for rank in (0, 1)]
    assert [sample.response.seed for sample in samples] == [seeds[index % 2] for index in range(5)]
    replay = [f"sampling.replay_path={two_ranks / 'sampled by two'}", "epochs=1"]
    trainer.train(load_config("demo", overrides_of(root, "replayed by one", "tied", replay)))
    assert_same_training(two_ranks / "replayed by one", two_ranks / "sampled by two")


@pytest.mark.parametrize("name", ENGINE_JOBS)
def test_updates_and_copies_of_all_ranks_are_right_or_not_made(root, two_ranks, name):
    assert_trained(root, name)


def test_a_sharded_checkpoint_of_another_model_is_refused(root, two_ranks):
    assert_trained(root, "ZeRO-3 tied")
    checkpoint = two_ranks / "ZeRO-3 tied/checkpoints/epoch_0002"
    with pytest.raises(ValueError, match=r"holds other weights than the model, for example lm_head\.weight"):
        names = [*load_file(root / "untied/model.safetensors")]
        load_named_checkpoint(checkpoint, names=names, ranks=Ranks())
