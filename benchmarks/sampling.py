"""Sampling speed of every backend that runs here, beside padded ``generate`` in batches of the same size.

    PYTHONPATH=.:kernels python benchmarks/sampling.py [--out benchmarks/results/sampling.jsonl] [--model PATH]
        [--prompts 96] [--batch-size 32] [--max-new-tokens 96] [--response-scale 1.0] [--only NAME …] [--threads 1]

Two workloads on the same prompts, whose lengths are those of Anthropic HH (``epoch_time_inputs.hh_lengths``):
- hh_lengths: response i has exactly the length that the table gives it, so all contenders decode the same tokens.
  Contenders: padded ``generate`` in the prompts' order and sorted by the prompt's length; our ``transformers``
  backend; the same with transformers' own attention; with seeds of single prompts; with four responses a prompt.
- own_lengths: the model ends its responses itself, at most ``--max-new-tokens``; every backend that can run: also
  ``server`` (against ``transformers serve`` on this machine) and ``lmdeploy`` where it is installed and a GPU is there.
  Here a sync of the weights and the probe's log-prob gap (``inverseq.freshness``) are measured too.

Each contender runs once, after a short warm-up. ``tokens_per_second`` is of the wall clock; ``tokens_per_cpu_second``
counts the CPU time of this process and its children, so that other programs count less on a shared machine. Rows are
appended to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import psutil
import torch
from epoch_time_inputs import hh_lengths
from gpu_suite_report import commit, versions
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList

import inverseq.sampling_transformers as sampling_transformers
from inverseq.chat import ChatRenderer, load_principle
from inverseq.config import LmdeployConfig, ModelConfig, SamplingConfig, ServerConfig
from inverseq.freshness import Freshness
from inverseq.model import load_model
from inverseq.prompt_files import load_prompts
from inverseq.prompts import repeat_prompts
from inverseq.records import Prompt, RenderedPrompt
from inverseq.resolve import resolve_model_path
from inverseq.sampling import make_sampler, sample_responses
from inverseq.sampling_lmdeploy import check_lmdeploy
from inverseq.sampling_transformers import TransformersSampler, stop_token_ids

__all__ = ["main"]

BASELINE = "generate"
SEED = 1


@dataclass
class Bench:
    """The model and the inputs of one run."""

    model: torch.nn.Module
    tokenizer: object
    prompts: list[RenderedPrompt]
    lengths: list[int]
    config: SamplingConfig

    @property
    def num_valid_vocab(self) -> int:
        return len(self.tokenizer)

    def sampler(self, **options) -> TransformersSampler:
        config = replace(self.config, **options)
        return TransformersSampler(config, self.model, self.tokenizer, num_valid_vocab=self.num_valid_vocab)


class StopAtLength(StoppingCriteria):
    """Ends row i of a padded batch after its own number of tokens; the rows that are done are padded on."""

    def __init__(self, prompt_length: int, lengths: Sequence[int]):
        self.prompt_length, self.lengths = prompt_length, torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids.shape[1] - self.prompt_length >= self.lengths).to(input_ids.device)


def generate_padded(bench: Bench, order: Sequence[int], *, forced: bool) -> list[int]:
    """Tokens of each response by padded ``generate``, batch after batch in this order."""
    counts = [0] * len(bench.prompts)
    stop_ids = stop_token_ids(bench.model, bench.tokenizer)
    attention = bench.model.config._attn_implementation
    bench.model.set_attn_implementation("sdpa")
    for start in range(0, len(order), bench.config.batch_size):
        batch = list(order[start : start + bench.config.batch_size])
        rows = {"input_ids": [bench.prompts[i].policy_ids.tolist() for i in batch]}
        inputs = bench.tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(bench.model.device)
        length = inputs["input_ids"].shape[1]
        limits = [bench.lengths[i] if forced else bench.config.max_new_tokens for i in batch]
        out = bench.model.generate(
            **inputs,
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=max(limits),
            eos_token_id=None if forced else list(stop_ids), pad_token_id=bench.tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([StopAtLength(length, limits)] if forced else []),
        )  # fmt: skip
        for i, row in zip(batch, out[:, length:].tolist(), strict=True):
            ends = [position for position, token in enumerate(row) if token in stop_ids]
            counts[i] = bench.lengths[i] if forced else ends[0] + 1 if ends else len(row)
    bench.model.set_attn_implementation(attention)
    return counts


def sample_forced(bench: Bench, **options) -> list[int]:
    """Tokens of each response by our backend with forced lengths."""
    with torch.random.fork_rng(devices=[]):
        answers = dict(bench.sampler(**options).generate(bench.prompts, seed=SEED, lengths=bench.lengths))
    return [len(answers[i].token_ids) for i in range(len(bench.prompts))]


def sample_own(bench: Bench, sampler, prompts: Sequence[RenderedPrompt]) -> list[int]:
    return [sample.num_actions for sample in sample_responses(sampler, prompts, seed=SEED)]


@contextmanager
def transformers_own_attention():
    """Our backend as transformers ships continuous batching: a mask over the product of all sequences."""
    own = sampling_transformers.use_paged_attention
    sampling_transformers.use_paged_attention = lambda model: None
    try:
        yield
    finally:
        sampling_transformers.use_paged_attention = own


def forced_contenders(bench: Bench) -> dict[str, Callable[[], list[int]]]:
    order = range(len(bench.prompts))
    by_length = sorted(order, key=lambda i: len(bench.prompts[i].policy_ids))

    def as_shipped() -> list[int]:
        with transformers_own_attention():
            return sample_forced(bench)

    return {
        BASELINE: lambda: generate_padded(bench, order, forced=True),
        "generate, sorted by prompt": lambda: generate_padded(bench, by_length, forced=True),
        "transformers": lambda: sample_forced(bench),
        "transformers, its own attention": as_shipped,
        "transformers, per_prompt_seeds": lambda: sample_forced(bench, per_prompt_seeds=True),
    }


def own_contenders(bench: Bench) -> dict[str, Callable[[], list[int]]]:
    """Contenders that end responses themselves, without the backends that need a process of their own."""
    few = bench.prompts[: len(bench.prompts) // 4]
    copies = repeat_prompts(few, 4)
    apart = [replace(copy, prompt_ids=copy.prompt_ids.copy()) for copy in copies]

    def unshared() -> list[int]:
        own = sampling_transformers.equal_prompts
        sampling_transformers.equal_prompts = lambda prompts, limit: [[i] for i in range(len(prompts))]
        try:
            return sample_own(bench, bench.sampler(), apart)
        finally:
            sampling_transformers.equal_prompts = own

    order = range(len(bench.prompts))
    return {
        BASELINE: lambda: generate_padded(bench, order, forced=False),
        "transformers": lambda: sample_own(bench, bench.sampler(), bench.prompts),
        "transformers, 4 per prompt, read once": lambda: sample_own(bench, bench.sampler(), copies),
        "transformers, 4 per prompt, read each": unshared,
    }


def cpu_seconds() -> float:
    """CPU time of this process and of its living children."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        times = child.cpu_times()
        total += times.user + times.system
    return total


def measure(work: Callable[[], list[int]]) -> dict[str, float | int]:
    started, cpu = time.perf_counter(), cpu_seconds()
    counts = work()
    duration_s, cpu_s = time.perf_counter() - started, cpu_seconds() - cpu
    num_tokens = sum(counts)
    return {
        "num_responses": len(counts),
        "num_tokens": num_tokens,
        "mean_tokens": num_tokens / len(counts),
        "longest_tokens": max(counts),
        "duration_s": duration_s,
        "cpu_s": cpu_s,
        "tokens_per_second": num_tokens / duration_s,
        "tokens_per_cpu_second": num_tokens / cpu_s,
    }


def measure_backend(bench: Bench, config: SamplingConfig, weights_dir: Path) -> dict[str, float | int]:
    """Speed, sync and freshness of one backend as a run uses it; two syncs, so that the second has something to do."""
    sampler = make_sampler(
        config, bench.model, bench.tokenizer, num_valid_vocab=bench.num_valid_vocab, weights_dir=weights_dir
    )
    freshness = Freshness(
        bench.prompts[0], bench.tokenizer, stop_ids=stop_token_ids(bench.model, bench.tokenizer),
        num_valid_vocab=bench.num_valid_vocab, max_gap=0.0,
    )  # fmt: skip
    try:
        freshness.sync(sampler, bench.model, 0)
        sample_own(bench, sampler, bench.prompts[:2])
        freshness.sync(sampler, bench.model, 1)
        row = {key: value for key, value in freshness.row.items() if key.startswith(("sync_", "probe_"))}
        return measure(lambda: sample_own(bench, sampler, bench.prompts)) | row
    finally:
        sampler.close()


@contextmanager
def transformers_serve():
    """The root URL of ``transformers serve`` on the loopback interface."""
    from inverseq.sampling_lmdeploy_server import held_port

    holder = held_port()
    port = holder.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--log-level", "error"], env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(240):
            time.sleep(0.5)
            if any(c.laddr.port == port for c in psutil.Process(process.pid).net_connections("tcp")):
                break
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        holder.close()


def backend_rows(bench: Bench, wanted: Callable[[str], bool], report: Callable[[str, dict], None]) -> None:
    """Every backend of the configuration that runs here; one that does not is a row that says why."""
    with tempfile.TemporaryDirectory() as folder:
        weights_dir = Path(folder) / "weights"
        if wanted("backend transformers"):
            report("backend transformers", measure_backend(bench, bench.config, weights_dir))
        if wanted("backend server"):
            with transformers_serve() as root:
                server = ServerConfig(
                    url=f"{root}/v1", model="{model_dir}", dialect="transformers", prompts="text",
                    refresh_url=f"{root}/reset", concurrency=bench.config.batch_size, timeout_s=1800.0,
                )  # fmt: skip
                config = replace(bench.config, backend="server", server=server)
                report("backend server", attempted(lambda: measure_backend(bench, config, weights_dir)))
        for form in ("server", "pipeline"):
            name = f"backend lmdeploy {form}"
            if wanted(name):
                config = replace(bench.config, backend="lmdeploy", lmdeploy=LmdeployConfig(form=form))
                report(name, attempted(lambda c=config: lmdeploy_row(bench, c, weights_dir)))


def lmdeploy_row(bench: Bench, config: SamplingConfig, weights_dir: Path) -> dict:
    check_lmdeploy(config)
    return measure_backend(bench, config, weights_dir)


def attempted(work: Callable[[], dict]) -> dict:
    """What the work returns, or why there is nothing: a failing backend is a row, not a crash."""
    try:
        return work()
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def make_bench(arguments: argparse.Namespace) -> Bench:
    """The model, and the demo's questions strung together to prompts of HH's lengths (a little longer)."""
    path = resolve_model_path("--model", arguments.model)
    model = load_model(path, ModelConfig(path=path)).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt_lengths, lengths = hh_lengths(arguments.prompts, seed=0, response_scale=arguments.response_scale)
    questions = [prompt.messages[-1]["content"] for prompt in load_prompts("bundled")[0]]
    order = iter(np.random.default_rng(0).permutation(len(questions) * 40) % len(questions))
    renderer = ChatRenderer(tokenizer, principle_text=load_principle("default"), plain_system="")
    prompts = []
    for i, length in enumerate(prompt_lengths):
        text = questions[next(order)]
        while len(tokenizer.encode(text)) < length - 12:  # the template's own tokens
            text += " " + questions[next(order)]
        prompts.append(Prompt(f"hh-{i}", ({"role": "user", "content": text},)))
    config = SamplingConfig(max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size)
    return Bench(model, tokenizer, renderer.render_all(prompts), lengths.tolist(), config)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append rows to this file")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--response-scale", type=float, default=1.0)
    parser.add_argument("--only", nargs="*", default=[], help="names of contenders; none is all of them")
    parser.add_argument("--workloads", nargs="*", default=["hh_lengths", "own_lengths", "backends"])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    bench = make_bench(arguments)
    generate_padded(replace(bench, prompts=bench.prompts[:2], lengths=[4, 4]), range(2), forced=True)
    baselines: dict[str, float] = {}

    def wanted(name: str) -> bool:
        return not arguments.only or name in arguments.only

    def report(workload: str, name: str, found: dict) -> None:
        if name == BASELINE:
            baselines[workload] = found["tokens_per_cpu_second"]
        if workload in baselines and "error" not in found:
            found = found | {"speedup": found["tokens_per_cpu_second"] / baselines[workload], "bound": BASELINE}
        row = {"op": "sampling", "workload": workload, "backend": name} | found | facts(arguments, bench)
        speed = found.get("error") or f"{found['tokens_per_cpu_second']:7.1f} tokens/CPU-s {found['duration_s']:7.1f} s"
        print(f"{workload:12} {name:40} {speed}  {found.get('speedup', float('nan')):.2f}×", flush=True)
        if arguments.out:
            with open(arguments.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    for workload, contenders in (("hh_lengths", forced_contenders), ("own_lengths", own_contenders)):
        if workload in arguments.workloads:
            for name, work in contenders(bench).items():
                if wanted(name):
                    report(workload, name, measure(work))
    if "backends" in arguments.workloads:
        backend_rows(bench, wanted, lambda name, found: report("own_lengths", name, found))
    return 0


def facts(arguments: argparse.Namespace, bench: Bench) -> dict:
    device = bench.model.device
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "measured": True,
        "command": command_line(sys.argv[1:]),
        "commit": commit(),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
        "threads": arguments.threads,
        "model": arguments.model,
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "batch_size": bench.config.batch_size,
        "max_new_tokens": bench.config.max_new_tokens,
        "prompt_tokens": sum(len(prompt.policy_ids) for prompt in bench.prompts),
        "reps": 1,
    }


def command_line(words: Sequence[str]) -> str:
    """The command of this run, without the place of its rows."""
    out = words.index("--out") if "--out" in words else len(words)
    return shlex.join(["python", "benchmarks/sampling.py", *words[:out], *words[out + 2 :]])


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
