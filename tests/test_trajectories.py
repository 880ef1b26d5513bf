"""One training run, told in many ways: packing, accumulation, padding, kills and resumes give one trajectory.

``run_all`` makes an uninterrupted run and, for each entry of ``ACCIDENTS``, a run that is hit by it and resumed. Each
training is a fork of one process that has only imported, so that a kill ends that training and nothing else. All but
two of them replay the uninterrupted run's samples, which costs no sampling.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from inverseq import atomic, checkpoint, run_state, trainer
from inverseq.checkpoint import check_checkpoint, latest_checkpoint, list_checkpoints
from inverseq.config_loading import load_config
from inverseq.engine import TorchEngine
from inverseq.metrics import MetricsLog, read_metrics
from inverseq.sample_files import read_samples
from tests.tiny import CHATML, make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
ALPHA, LEARNING_RATE, EPS, SAMPLES_PER_STEP = 1.4, 3e-3, 1e-3, 2
OVERRIDES = [
    "model.device=cpu",
    f"contrast.alpha={ALPHA}",
    "prompts.held_out=3",
    "sampling.samples_per_epoch=5",
    "sampling.max_new_tokens=8",
    "sampling.batch_size=8",
    "packing.train_tokens=1024",
    "packing.score_tokens=2048",
    f"optim.lr={LEARNING_RATE}",
    f"optim.eps={EPS}",  # no division by rounding noise
    f"optim.samples_per_step={SAMPLES_PER_STEP}",
    "optim.schedule=linear",
    "checkpoint.keep_last=2",
    "logging.tensorboard=false",
    "epochs=2",
]
TEMPLATE = CHATML.replace("assistant\n", "assistant says\n")  # replaces the tokenizer's own
STEPS_PER_EPOCH = 3  # of 2, 2 and 1 samples
CLOCK_KEYS = ("duration_s", "tokens_per_second", "_bytes")  # and how much memory was held


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(owner, name: str, number: int, accident) -> None:
    """Let ``accident()`` happen just before call ``number`` of a function of the program."""
    function, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            accident()
        return function(*args, **kwargs)

    setattr(owner, name, wrapper)


def after_call(owner, name: str, number: int, accident) -> None:
    """Let ``accident()`` happen just after call ``number`` of a function of the program."""
    function, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        found = function(*args, **kwargs)
        calls.append(1)
        if len(calls) == number:
            accident()
        return found

    setattr(owner, name, wrapper)


def tear_metrics_row(number: int) -> None:
    """Write only half of metrics row ``number`` and die."""
    append, calls = MetricsLog._append_line, []

    def wrapper(self, line):
        calls.append(1)
        if len(calls) == number:
            append(self, line[: len(line) // 2])
            kill()
        append(self, line)

    MetricsLog._append_line = wrapper


def fill_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def spoil_a_target() -> None:
    """Make a target of the second step of epoch 2 not a number."""
    plan, calls = trainer.plan_steps, []

    def wrapper(*args, **kwargs):
        steps = plan(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            steps[1].micro_batches[0].targets[0] = torch.nan
        return steps

    trainer.plan_steps = wrapper


@dataclass(frozen=True)
class Accident:
    prepare: Callable[[], None]
    num_checkpoints: int  # complete ones when it happens
    num_rows: int  # whole rows of metrics.jsonl when it happens
    own_samples: bool = False  # True: the run draws its samples and evaluates; False: it replays


AT_EPOCH_2 = 2 + STEPS_PER_EPOCH  # rows: epoch 0, the steps of epoch 1, epoch 1
BEFORE_THE_ROW = AT_EPOCH_2 + STEPS_PER_EPOCH  # the row of epoch 2 is written when its checkpoint is on the disk
AT_END = BEFORE_THE_ROW + 1
ACCIDENTS = {
    "before the held-out file": Accident(lambda: before_call(trainer, "write_samples", 1, kill), 0, 0),
    "within epoch 1": Accident(lambda: before_call(TorchEngine, "train_step", 2, kill), 0, 2),
    "before sampling epoch 2": Accident(
        lambda: before_call(trainer, "sample_responses", 4, kill), 1, AT_EPOCH_2, own_samples=True
    ),
    "between scoring and training": Accident(lambda: before_call(trainer, "plan_steps", 2, kill), 1, AT_EPOCH_2),
    "between two updates": Accident(
        lambda: before_call(TorchEngine, "train_step", STEPS_PER_EPOCH + 2, kill), 1, AT_EPOCH_2 + 1
    ),
    "within a metrics row": Accident(lambda: tear_metrics_row(AT_EPOCH_2 + 2), 1, AT_EPOCH_2 + 1),
    "within the checkpoint": Accident(lambda: before_call(checkpoint, "write_state", 3, kill), 1, BEFORE_THE_ROW),
    "within the epoch's row": Accident(lambda: tear_metrics_row(AT_END), 1, BEFORE_THE_ROW),
    "before the checkpoint's rename": Accident(lambda: after_call(MetricsLog, "epoch", 3, kill), 1, AT_END),
    "behind the checkpoint": Accident(lambda: before_call(checkpoint, "remove_old", 2, kill), 2, AT_END),
    "before the evaluation": Accident(
        lambda: before_call(trainer, "write_evaluation", 2, kill), 2, AT_END, own_samples=True
    ),
    "within the export": Accident(lambda: before_call(atomic, "_fsync_tree", 3, kill), 2, AT_END),
    "disk full": Accident(lambda: before_call(run_state, "save_checkpoint", 2, fill_disk), 1, BEFORE_THE_ROW),
    "not a number": Accident(spoil_a_target, 1, AT_EPOCH_2 + 1),
}


def configure(root: Path, name: str, *overrides: str, own_samples: bool = False):
    replayed = root / "uninterrupted" / "run"
    sampling = ["evaluation.every=2", "evaluation.num_prompts=1"]
    if not own_samples:
        sampling = ["sampling.backend=replay", f"sampling.replay_path={replayed}"]
    paths = [f"model.path={root / 'model'}", f"prompts.path={root / 'prompts.jsonl'}"]
    paths += [f"model.chat_template={root / 'template.jinja'}"]
    paths += [f"contrast.principle={root / 'principle.txt'}", f"run_dir={root / name / 'run'}"]
    replaced = {word.partition("=")[0] for word in overrides}
    common = [word for word in OVERRIDES if word.partition("=")[0] not in replaced]
    return load_config("demo", [*common, *paths, *sampling, *overrides])


def forked(root: Path, name: str, config, *, resume: bool, prepare=None) -> int:
    """Train in a forked process, its output in ``name/output``; the exit code, or minus the signal that ended it."""
    (root / name).mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        output = os.open(root / name / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            if prepare is not None:
                prepare()
            trainer.train(config, resume=resume)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_all(root: Path) -> None:
    torch.set_num_threads(1)
    config = configure(root, "uninterrupted", own_samples=True)
    found = {"uninterrupted": forked(root, "uninterrupted", config, resume=False)}
    for name, accident in ACCIDENTS.items():
        config = configure(root, name, own_samples=accident.own_samples)
        run_dir = root / name / "run"
        found[name] = {
            "hit": forked(root, name, config, resume=False, prepare=accident.prepare),
            "num_checkpoints": len(list_checkpoints(run_dir)),
            "num_rows": len(read_metrics(run_dir)),
            "resumed": forked(root, name, config, resume=True),
        }
    (root / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trajectories")
    make_tiny_model(root / "model", scale=0.2)
    (root / "template.jinja").write_text(TEMPLATE)
    (root / "principle.txt").write_text("be kind and true, please explain the answer")
    words = "what is the first number|help me write a long word|who made oil|when did people call|can you find water"
    prompts = [f"{question} {count}" for count in ("one", "two more", "on each day") for question in words.split("|")]
    rows = [{"id": f"p{index}", "prompt": prompt} for index, prompt in enumerate(prompts)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = f"from pathlib import Path; from tests.test_trajectories import run_all; run_all(Path({str(root)!r}))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def whole(root) -> Path:
    found = json.loads((root / "found.json").read_text())
    assert found["uninterrupted"] == 0, (root / "uninterrupted" / "output").read_text()
    return root / "uninterrupted" / "run"


def rows_without_clocks(run_dir: Path, *, samples: bool) -> list[dict]:
    """The metrics of a run; without those of the sampling engine where it replays and has none."""
    left_out = () if samples else ("probe_", "weights_lag_steps")
    rows = [{k: v for k, v in row.items() if not k.endswith(CLOCK_KEYS)} for row in read_metrics(run_dir)]
    return [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in rows]


def assert_same_run(run_dir: Path, whole: Path) -> None:
    samples = (run_dir / "eval").exists()
    assert rows_without_clocks(run_dir, samples=samples) == rows_without_clocks(whole, samples=samples)
    names = ["held_out.jsonl", "samples/epoch_0001.jsonl", "samples/epoch_0002.jsonl", "export/model.safetensors"]
    names += [f"checkpoints/epoch_000{epoch}/{file}" for epoch in (1, 2) for file in ("model.safetensors", "engine.pt")]
    if (run_dir / "eval").exists():
        names += ["eval/epoch_0000.jsonl", "eval/epoch_0002.jsonl"]
    for name in names:
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes(), name
    for epoch in (1, 2):
        folders = [run / "checkpoints" / f"epoch_000{epoch}" for run in (run_dir, whole)]
        assert check_checkpoint(folders[0])["progress"] == check_checkpoint(folders[1])["progress"]


def test_the_uninterrupted_run_trains(root, whole):
    steps, epochs = read_metrics(whole, "step"), read_metrics(whole, "epoch")
    assert [row["step"] for row in steps] == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    assert epochs[2]["held_out/mean_squared_log_ratio"] < epochs[0]["held_out/mean_squared_log_ratio"]
    before, after = load_file(root / "model" / "model.safetensors"), load_file(whole / "export" / "model.safetensors")
    assert all((before[name] - after[name]).abs().max() > LEARNING_RATE / 10 for name in before)


@pytest.mark.parametrize("name", ACCIDENTS)
def test_a_run_that_is_resumed_after_an_accident_is_the_uninterrupted_one_bit_for_bit(root, whole, name):
    output, run_dir = (root / name / "output").read_text(), root / name / "run"
    found = json.loads((root / "found.json").read_text())[name]
    assert found["num_checkpoints"] == ACCIDENTS[name].num_checkpoints, output
    assert found["num_rows"] == ACCIDENTS[name].num_rows
    if name == "disk full":
        assert found["hit"] == 1 and "OSError" in output and "File too large" in output
        assert str(run_dir / "checkpoints" / "epoch_0002" / "model.safetensors") in output
    elif name == "not a number":
        assert found["hit"] == 1 and f"NonFiniteError: optimizer step {STEPS_PER_EPOCH + 2}" in output
    else:
        assert found["hit"] == -signal.SIGKILL, output
    assert found["resumed"] == 0, output
    assert_same_run(run_dir, whole)
    assert list(run_dir.rglob(".*")) == []  # no temporary file is left


def assert_one_loss_curve(run_dir: Path, whole: Path, *, atol: float) -> None:
    ours, theirs = read_metrics(run_dir, "step"), read_metrics(whole, "step")
    assert len(ours) == len(theirs) == 2 * STEPS_PER_EPOCH
    for key in ("loss", "mean_log_ratio", "rms_log_ratio", "kl_to_plain", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-4, abs=atol), key
    mine, reference = load_file(run_dir / "export/model.safetensors"), load_file(whole / "export/model.safetensors")
    for name in reference:
        torch.testing.assert_close(mine[name], reference[name], rtol=0, atol=atol, msg=name)


VARIANTS = {
    "accumulation of many packs": ["packing.train_tokens=64"],
    "small scoring packs": ["packing.score_tokens=128"],
    "repeated prefixes": ["packing.share_prefix=false"],
    "gradient checkpointing": ["model.gradient_checkpointing=true"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_and_accumulation_give_one_loss_curve(root, whole, variant):
    run_dir = trainer.train(configure(root, variant, *VARIANTS[variant]))
    if "accumulation" in variant:
        assert max(row["num_packs"] for row in read_metrics(run_dir, "step")) > 1
    assert {row["num_packs"] for row in read_metrics(whole, "step")} == {1}
    assert_one_loss_curve(run_dir, whole, atol=2e-5)


def padded_logprobs(model, samples, view: int, *, full: bool):
    """log π(· | y_<t, x) [B, R, V], or log π(y_t | y_<t, x) [B, R], of a padded batch by ordinary attention masks."""
    prompts = [[*s.rendered.prefix_ids[view].tolist(), *s.rendered.prompt_ids.tolist()] for s in samples]
    responses = [s.response.token_ids.tolist() for s in samples]
    width, longest = max(map(len, prompts)), max(map(len, responses))
    input_ids = torch.zeros(len(samples), width + longest, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start = width - len(prompt)  # padded on the left before the prompt and on the right behind the response
        input_ids[i, start : width + len(response)] = torch.tensor(prompt + response)
        mask[i, start : width + len(response)] = 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    logprobs_BRV = logits[:, width - 1 : -1].log_softmax(-1)
    if full:
        return logprobs_BRV, input_ids[:, width:], mask[:, width:].bool()
    return logprobs_BRV.gather(2, input_ids[:, width:, None])[..., 0]


def test_packed_training_is_padded_training(root, whole):
    """The same two epochs by a plain loop: padded batches, full logits, autograd, torch's own AdamW."""
    frozen = AutoModelForCausalLM.from_pretrained(root / "model").eval()
    policy = AutoModelForCausalLM.from_pretrained(root / "model")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), eps=EPS, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / (2 * STEPS_PER_EPOCH))
    losses, norms = [], []
    for epoch in (1, 2):
        scored = read_samples(whole / "samples" / f"epoch_000{epoch}.jsonl")
        for first in range(0, len(scored.samples), SAMPLES_PER_STEP):
            samples = scored.samples[first : first + SAMPLES_PER_STEP]
            with torch.no_grad():
                log_w, token_ids, trained = padded_logprobs(frozen, samples, 0, full=True)
                log_l, _, _ = padded_logprobs(frozen, samples, -1, full=True)
                superior = (ALPHA * log_w + (1 - ALPHA) * log_l).log_softmax(-1)
                targets = superior.gather(2, token_ids[..., None])[..., 0]
            stored = scored.targets[scored.offsets[first] : scored.offsets[first + len(samples)]]
            torch.testing.assert_close(targets[trained], stored, rtol=0, atol=2e-4)
            ratio = (targets - padded_logprobs(policy, samples, -1, full=False))[trained]
            loss = ratio.square().sum() / trained.sum()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item())
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses == pytest.approx([row["loss"] for row in read_metrics(whole, "step")], rel=1e-4)
    assert norms == pytest.approx([row["grad_norm"] for row in read_metrics(whole, "step")], rel=1e-4)
    exported = AutoModelForCausalLM.from_pretrained(whole / "export")
    for (name, ours), theirs in zip(policy.named_parameters(), exported.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5, msg=name)


def test_the_export_is_the_newest_checkpoint_with_the_template_that_was_used(whole):
    assert AutoTokenizer.from_pretrained(whole / "export").chat_template == TEMPLATE != CHATML
    weights = load_file(latest_checkpoint(whole) / "model.safetensors")
    exported = load_file(whole / "export" / "model.safetensors")
    assert weights.keys() == exported.keys() and all(torch.equal(weights[name], exported[name]) for name in weights)


def test_a_corrupt_checkpoint_is_refused_and_the_older_one_that_is_offered_continues_the_run(root, whole):
    config = configure(root, "corrupt", own_samples=True)
    run_dir = root / "corrupt" / "run"
    shutil.copytree(whole, run_dir)
    newest = latest_checkpoint(run_dir)
    content = bytearray((newest / "engine.pt").read_bytes())
    content[1000] ^= 1
    (newest / "engine.pt").write_bytes(content)

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.suffix != ".yaml"}

    before = files()
    with pytest.raises(ValueError, match=r"epoch_0002/engine\.pt: corrupt .*epoch_0001 is complete") as raised:
        trainer.train(config, resume=True)
    assert f"move {newest} away" in str(raised.value)
    assert files() == before
    newest.rename(root / "corrupt" / "moved")
    (run_dir / "eval" / "epoch_0002.jsonl").write_text("answers of weights that are gone")
    trainer.train(config, resume=True)
    assert_same_run(run_dir, whole)
