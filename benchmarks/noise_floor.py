"""How far log π̂ and log π_θ stand apart when nothing but the packing differs: the floor below which the loss is noise.

    PYTHONPATH=.:kernels python benchmarks/noise_floor.py [--out benchmarks/results/noise_floor.jsonl]
        [--model PATH] [--device auto] [--dtype bfloat16] [--samples 8] [--max-new-tokens 48]

The demo's prompts are answered by the model; then frozen models and policy are the same weights reading the same text,
so that log π̂ − log π_θ is 0 but for rounding. Row by row the packs are the same, others, and others through another
attention; the last row is log π̂ of the principle contrast under two packings, where both views' noise is amplified by
√(α² + (1 − α)²). Differences are in nats; ``loss`` is the mean square.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from gpu_suite_report import commit, device_name, versions
from torch import Tensor

from inverseq.config import Config
from inverseq.config_loading import load_config
from inverseq.model import FrozenPair, load_model
from inverseq.packing import pack_views, view_lengths
from inverseq.policy import Policy
from inverseq.prompt_files import load_prompts
from inverseq.records import Sample, ScoredSamples
from inverseq.resolve import ResolvedModels, resolve_models
from inverseq.sampling import make_sampler, sample_responses
from inverseq.targets import score_targets

GOAL_RMS_NATS = 0.02


def answered_prompts(models: ResolvedModels, count: int) -> list[Sample]:
    """Responses of the model in fp32, so that every dtype is measured on the same text."""
    model = load_model(models.model_path, dataclasses.replace(models.config.model, dtype="float32"))
    prompts = models.renderer.render_all(load_prompts("bundled")[0][:count])
    sampler = make_sampler(models.config.sampling, model, models.tokenizer, num_valid_vocab=models.num_valid_vocab)
    try:
        return sample_responses(sampler, prompts, seed=0)
    finally:
        sampler.close()


def plain_view(sample: Sample) -> Sample:
    """The sample as policy and plain model read it."""
    rendered = sample.rendered
    return dataclasses.replace(sample, rendered=dataclasses.replace(rendered, prefix_ids=rendered.prefix_ids[-1:]))


def score(
    frozen: FrozenPair, samples: Sequence[Sample], config: Config, vocab: int, *, budget: int, share: bool = False
) -> ScoredSamples:
    """The samples' targets from packs of at most ``budget`` tokens."""
    packing = dataclasses.replace(config.packing, score_tokens=budget, share_prefix=share)
    config = dataclasses.replace(config, packing=packing)
    return score_targets(frozen, samples, config, num_valid_vocab=vocab)


@torch.no_grad()
def policy_logprobs(policy: Policy, samples: Sequence[Sample], *, budget: int, backend: str = "auto") -> Tensor:
    """log π_θ of all actions in sample order, [A] fp32."""
    policy.model.packed_attention_backend = backend
    device = next(policy.parameters()).device
    offsets = torch.tensor([0, *(sample.num_actions for sample in samples)]).cumsum(0).numpy()
    logprobs = torch.empty(int(offsets[-1]))
    for pack in pack_views(samples, (-1,), token_budget=budget):
        logprobs[pack.action_rows(offsets)] = policy(pack.to(device))[1].cpu()
    policy.model.packed_attention_backend = "auto"
    return logprobs


def measure(models: ResolvedModels, samples: list[Sample]) -> list[dict]:
    """The rows."""
    model = load_model(models.model_path, models.config.model)
    frozen, vocab = FrozenPair(model, model), models.num_valid_vocab
    policy = Policy(model, vocab, models.config.engine)
    plain = [plain_view(sample) for sample in samples]
    longest, everything = int(view_lengths(plain, (-1,)).max()), int(view_lengths(plain, (-1,)).sum())
    both = int(view_lengths(samples, (0, 1)).max())
    expected = score(frozen, plain, models.config, vocab, budget=everything).targets
    found = {
        "same packs": policy_logprobs(policy, plain, budget=everything),
        "other packs": policy_logprobs(policy, plain, budget=max(longest, everything // 3)),
        "a sample a pack": policy_logprobs(policy, plain, budget=longest),
        "other packs, flex attention": policy_logprobs(policy, plain, budget=longest, backend="flex"),
    }
    rows = [difference(name, expected - logprobs) for name, logprobs in found.items()]
    scored = [
        score(frozen, samples, models.config, vocab, budget=budget, share=share)
        for budget, share in ((2 * both, False), (8 * both, True))
    ]
    beside = "other packs, beside a shared principle"
    return [
        *rows,
        difference(beside, scored[1].plain_logprobs - found["other packs"]),
        difference("targets, shared and repeated principle", scored[0].targets - scored[1].targets),
    ]


def difference(name: str, error: Tensor) -> dict:
    error = error.double()
    return {
        "comparison": name,
        "num_actions": len(error),
        "loss": error.square().mean().item(),
        "rms_nats": error.square().mean().sqrt().item(),
        "max_nats": error.abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append rows to this file")
    parser.add_argument("--model", help="a model folder; the demo's 135M model unless given")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    overrides = [f"model.path={arguments.model}"] if arguments.model else []
    overrides += [f"model.device={arguments.device}", f"model.dtype={arguments.dtype}"]
    overrides += [f"sampling.max_new_tokens={arguments.max_new_tokens}", f"sampling.batch_size={arguments.samples}"]
    models = resolve_models(load_config("demo", overrides))
    samples = answered_prompts(models, arguments.samples)
    for row in measure(models, samples):
        row = {"benchmark": "noise_floor", "model": Path(models.model_path).name, "dtype": arguments.dtype} | row
        row |= {"goal_rms_nats": GOAL_RMS_NATS, "num_samples": len(samples), "threads": torch.get_num_threads()}
        on_cuda = torch.cuda.is_available() and arguments.device != "cpu"
        row |= {"device": device_name() if on_cuda else f"{platform.machine()} CPU", "measured": True}
        row |= {"command": "python benchmarks/noise_floor.py", "commit": commit(), "versions": versions()}
        row |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        print(f"{row['comparison']:40} rms {row['rms_nats']:.2e}  max {row['max_nats']:.2e}  loss {row['loss']:.2e}")
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
