"""Inverse-Q* beside the baselines of its paper: one small model, the same prompts, sampler and evaluation.

    PYTHONPATH=.:kernels python benchmarks/compare.py --hh DIR [--model MODEL] [--rounds 3] [--samples 16]
        [--methods sft prompting dpo rloo inverseq] [--runs runs/compare] [--out benchmarks/results/compare.jsonl]

    sft         the model as it is
    prompting   the model as it is, reading the principle
    dpo         TRL's DPO on HH pairs, as many a round as the others have samples; the proxy was fitted on them too
    rloo        TRL's RLOO on the reward proxy: the on-policy trainer for the paper's PPO, which TRL 1.16 does not have
    inverseq    this project; no pairs and no reward

A round of TRL is a trainer of its own on the model of the round before: its optimizer starts anew, and RLOO's KL (β
0.05) is to the round's start; DPO's reference is the initial model throughout. This project's run is resumed.

DIR is as in ``convergence.py``, whose reward proxy scores the answers to held-out HH prompts after every round. The win
rate is the share of prompts whose answer the proxy scores above the initial model's (ties half), not a judge's. Seconds
are those of training without evaluation, by wall clock and of CPU time, since other programs may share the processor.
A row per method and round; a finished row is not made again.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from convergence import RewardProxy
from gpu_suite_report import commit, versions
from packing import cpu_name

from inverseq.config_loading import load_config
from inverseq.evaluation.generate import DEFAULTS, generate
from inverseq.evaluation.plots import COLORS
from inverseq.evaluation.readers import read_questions
from inverseq.resolve import resolve_model_path
from inverseq.sample_files import read_evaluation

METHODS = ("sft", "prompting", "dpo", "rloo", "inverseq")
NAMES = {"rloo": "RLOO (TRL)", "dpo": "DPO (TRL)", "sft": "SFT", "prompting": "prompting", "inverseq": "Inverse-Q*"}
STYLES = {"dpo": (COLORS[1], "s"), "rloo": (COLORS[2], "^"), "inverseq": (COLORS[0], "o")}


@dataclass
class Stopwatch:
    """Seconds of training so far: wall clock, and CPU time of all threads."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall_s += time.perf_counter() - wall
        self.cpu_s += time.process_time() - cpu


Round = tuple[int, Stopwatch, str]  # finished rounds, training so far, folder of the model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hh", required=True, type=Path, help="folder with harmless-base/")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16, help="samples, or pairs, of a round")
    parser.add_argument("--answers", type=int, default=32, help="held-out prompts answered after every round")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-5, help="of every method")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compare.jsonl"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of inverseq-train")
    arguments = parser.parse_args()
    arguments.model = resolve_model_path("--model", arguments.model)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    proxy = RewardProxy(arguments.hh)
    print(f"reward proxy: {proxy.accuracy:.1%} of held-out pairs ranked rightly", flush=True)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.is_file() else []
    initial = answers_of(arguments, arguments.model, "sft-0", principle=False)
    for method in arguments.methods:
        finished = [row for row in rows if row["method"] == method]
        if finished and finished[-1]["round"] == finished[-1]["rounds"]:
            continue
        rows = [row for row in rows if row["method"] != method]
        for done, trained, model in TRAINERS[method](arguments, proxy):
            answers = answers_of(arguments, model, f"{method}-{done}", principle=method == "prompting")
            rows.append(row_of(arguments, proxy, method, (done, trained, model), answers, initial))
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(describe(rows[-1]), flush=True)
    plot(rows, arguments.out.with_suffix(".png"))


def answers_of(arguments: argparse.Namespace, model: str, name: str, *, principle: bool) -> dict[str, str]:
    """{prompt id: answer} of a model to the held-out prompts, by the project's own sampler."""
    out = arguments.runs / "answers" / f"{name}.jsonl"
    words = [
        f"model.path={model}", f"run_dir={arguments.runs}", f"sampling.max_new_tokens={arguments.max_new_tokens}",
        "contrast.principle=default",
    ]  # fmt: skip
    config = load_config(DEFAULTS, words)
    questions, _ = read_questions(str(arguments.hh / "harmless-base" / "test.jsonl.gz"))
    generate(config, questions[: arguments.answers], out, name=name, with_principle=principle)
    return {row["id"]: row["response"] for row in read_evaluation(out)}


def row_of(arguments, proxy: RewardProxy, method: str, at: Round, answers: dict, initial: dict) -> dict:
    done, trained, _ = at
    if set(answers) != set(initial):
        raise SystemExit(f"{method}: answers other prompts than the initial model, so that their means do not compare")
    shared = sorted(initial)
    rewards, before = proxy.score([answers[i] for i in shared]), proxy.score([initial[i] for i in shared])
    wins = (rewards > before) + 0.5 * (rewards == before)
    rounds = 0 if method in ("sft", "prompting") else arguments.rounds
    return {
        "op": "compare", "method": method, "round": done, "rounds": rounds, "num_samples": done * arguments.samples,
        "train_duration_s": trained.wall_s, "train_cpu_s": trained.cpu_s, "reward_proxy": float(rewards.mean()),
        "reward_standard_error": float(rewards.std(ddof=1) / len(shared) ** 0.5),
        "win_rate_by_proxy": float(wins.mean()),
        "win_rate_standard_error": float(wins.std(ddof=1) / len(shared) ** 0.5),
        "num_answers": len(shared), "mean_characters": sum(len(answers[i]) for i in shared) / len(shared),
        "proxy_accuracy": proxy.accuracy, "learning_rate": arguments.lr, "measured": True,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "model": Path(arguments.model).name, "date": datetime.now(timezone.utc).date().isoformat(), "commit": commit(),
        "versions": versions(), "command": "python benchmarks/compare.py", "load_average": os.getloadavg()[0],
    }  # fmt: skip


def describe(row: dict) -> str:
    return (
        f"{NAMES[row['method']]:12} round {row['round']}: reward {row['reward_proxy']:+.3f} ± "
        f"{row['reward_standard_error']:.3f}, win rate by proxy {row['win_rate_by_proxy']:.0%}, "
        f"{row['mean_characters']:.0f} characters, {row['train_duration_s']:.0f} s "
        f"({row['train_cpu_s']:.0f} s of CPU time)"
    )


def train_nothing(arguments: argparse.Namespace, proxy: RewardProxy) -> Iterator[Round]:
    yield 0, Stopwatch(), arguments.model


def train_inverseq(arguments: argparse.Namespace, proxy: RewardProxy) -> Iterator[Round]:
    """A run of one more epoch each time, resumed."""
    from inverseq.trainer import train

    trained = Stopwatch()
    yield 0, trained, arguments.model
    for done in range(1, arguments.rounds + 1):
        run_dir = arguments.runs / "inverseq"
        words = [
            f"model.path={arguments.model}", f"run_dir={run_dir}", f"epochs={done}", f"optim.lr={arguments.lr}",
            f"sampling.samples_per_epoch={arguments.samples}", f"sampling.max_new_tokens={arguments.max_new_tokens}",
            f"prompts.path={arguments.hh}/harmless-base/train.jsonl.gz", "prompts.held_out=0",
            "logging.tensorboard=false", *arguments.set,
        ]  # fmt: skip
        with trained.running():
            train(load_config("demo", words), resume=(run_dir / "config.yaml").is_file())
        yield done, trained, str(run_dir / "export")


def train_with_trl(arguments: argparse.Namespace, make_trainer: Callable, name: str) -> Iterator[Round]:
    """Rounds of a TRL trainer: a new one each, on the model of the round before."""
    from inverseq.integrations.trl import use_linear_logprob

    undo, trained, model = use_linear_logprob(), Stopwatch(), arguments.model
    yield 0, trained, model
    try:
        for done in range(1, arguments.rounds + 1):
            folder = arguments.runs / name / f"round_{done}"
            with trained.running():
                trainer = make_trainer(model, done)
                trainer.train()
            trainer.model.save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
            del trainer
            gc.collect()
            yield done, trained, str(folder)
            if done > 1:
                shutil.rmtree(model)
            model = str(folder)
    finally:
        undo()


def common_arguments(arguments: argparse.Namespace, name: str) -> dict:
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(arguments.runs / name), "learning_rate": arguments.lr, "lr_scheduler_type": "constant",
        "report_to": [], "save_strategy": "no", "logging_strategy": "no", "bf16": on_gpu, "use_cpu": not on_gpu,
        "num_train_epochs": 1, "disable_tqdm": True,
    }  # fmt: skip


def train_dpo(arguments: argparse.Namespace, proxy: RewardProxy) -> Iterator[Round]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    pairs = read_prompted_pairs(arguments.hh)

    def make_trainer(model: str, done: int):
        chosen = pairs[(done - 1) * arguments.samples : done * arguments.samples]
        settings = DPOConfig(**common_arguments(arguments, "dpo"), per_device_train_batch_size=8, max_length=448)
        initial = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        return DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            ref_model=initial,
            args=settings,
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            train_dataset=Dataset.from_list(chosen),
        )

    yield from train_with_trl(arguments, make_trainer, "dpo")


def train_rloo(arguments: argparse.Namespace, proxy: RewardProxy) -> Iterator[Round]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    prompts = [{"prompt": pair["prompt"]} for pair in read_prompted_pairs(arguments.hh)]
    copies = 4  # answers to a prompt, which are each other's baseline

    def reward(completions, **_) -> list[float]:
        return proxy.score([turns[-1]["content"] for turns in completions]).tolist()

    def make_trainer(model: str, done: int):
        count = max(1, arguments.samples // copies)
        settings = RLOOConfig(
            **common_arguments(arguments, "rloo"), per_device_train_batch_size=2 * copies, num_generations=copies,
            max_completion_length=arguments.max_new_tokens, beta=0.05, temperature=1.0,
        )  # fmt: skip
        return RLOOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=settings,
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            reward_funcs=reward,
            train_dataset=Dataset.from_list(prompts[(done - 1) * count : done * count]),
        )

    yield from train_with_trl(arguments, make_trainer, "rloo")


def read_prompted_pairs(folder: Path) -> list[dict]:
    """{prompt, chosen, rejected} as conversations, of the single-turn training rows."""
    rows = []
    with gzip.open(folder / "harmless-base" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            question, _, chosen = row["chosen"].partition("Assistant:")
            rejected = row["rejected"].rpartition("Assistant:")[2].strip()
            if "Human:" in chosen or not chosen.strip() or not rejected:
                continue
            turn = {"role": "user", "content": question.partition("Human:")[2].strip()}
            answers = ({"role": "assistant", "content": text} for text in (chosen.strip(), rejected))
            rows.append(dict(zip(("prompt", "chosen", "rejected"), ([turn], *([one] for one in answers)), strict=True)))
    return rows


TRAINERS = {
    "sft": train_nothing, "prompting": train_nothing, "dpo": train_dpo, "rloo": train_rloo, "inverseq": train_inverseq,
}  # fmt: skip


def plot(rows: list[dict], path: Path) -> None:
    """Reward against rounds and against seconds of training."""
    from matplotlib.figure import Figure

    on_gpu = torch.cuda.is_available()
    seconds = "train_duration_s" if on_gpu else "train_cpu_s"  # other programs share a CPU
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for method in METHODS:
        points = [row for row in rows if row["method"] == method]
        if not points:
            continue
        errors = [row["reward_standard_error"] for row in points]
        rewards = [row["reward_proxy"] for row in points]
        for axes, key in zip(panels, ("round", seconds), strict=True):
            if method in ("sft", "prompting"):
                axes.axhline(rewards[0], linestyle="--" if method == "sft" else ":", color="#555", label=NAMES[method])
            else:
                at = [row[key] for row in points]
                color, marker = STYLES[method]
                axes.errorbar(at, rewards, errors, marker=marker, color=color, capsize=3, label=NAMES[method])
    panels[0].set(xlabel="round", ylabel="reward proxy (log-odds), ± 1 standard error")
    panels[1].set(xlabel="seconds of training" if on_gpu else "seconds of training (CPU time)")
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    panels[1].legend(loc="lower right", framealpha=1.0)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
