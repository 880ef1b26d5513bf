"""What a first hour on a GPU must know of the trainer; every test has the same body on a CPU, where it always runs.

On CUDA everything is bf16, as in training: numbers are compared with fp32 on the CPU, by the error that the model's own
eager attention makes in bf16.
"""

import contextlib
import copy
import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from inverseq.attention import ATTENTION_NAME
from inverseq.config import EngineConfig, OptimConfig, PackingConfig, SamplingConfig
from inverseq.config_loading import load_config
from inverseq.engine import TorchEngine, accumulate
from inverseq.policy import Policy
from inverseq.records import ScoredSamples
from inverseq.sampling import sample_responses
from inverseq.sampling_transformers import TransformersSampler
from inverseq.steps import plan_steps
from inverseq.trainer import train
from tests.attention_oracle import CONFIGS, make_pack, packed_hidden, random_sequences, separate_hidden, tiny
from tests.test_sampling import NUM_WORDS, make_model, make_prompt, make_tokenizer
from tests.tiny import make_tiny_model
from tests.tiny_run import tiny_run_options
from tests.tiny_samples import make_samples

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def training_dtype(device):
    return torch.bfloat16 if device == "cuda" else torch.float32


def held_out(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["held_out/mean_squared_log_ratio"] for row in rows if row["kind"] == "epoch"]


@on_each_device
def test_a_run_learns_and_goes_on_where_it_was_stopped(device, tmp_path):
    path = make_tiny_model(tmp_path / "model", scale=0.2)
    words = [f"model.path={path}", f"run_dir={tmp_path / 'run'}", f"model.device={device}", "optim.lr=1e-2"]
    train(load_config("demo", tiny_run_options(*words, "epochs=2")))
    before = held_out(tmp_path / "run")
    train(load_config("demo", tiny_run_options(*words, "epochs=3")), resume=True)
    after = held_out(tmp_path / "run")
    assert after[:3] == before and len(after) == 4
    assert after[3] < after[1] < after[0] and after[3] < 0.8 * after[0]


def relative_error(actual, expected):
    return ((actual.double().cpu() - expected.double()).norm() / expected.double().norm()).item()


@on_each_device
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_attention_is_as_exact_as_separate_sequences(name, device):
    """Forward and gradients through every architecture; the backend is the one that ``auto`` takes there."""
    sequences = random_sequences([70, 1, 37, 3, 30])
    model = tiny(name)
    upstream = torch.randn(sum(map(len, sequences)), 32, generator=torch.Generator().manual_seed(1))

    def results(one, run):
        one = one.requires_grad_()
        hidden = run(one)
        gradients = torch.autograd.grad((hidden * upstream.to(hidden)).sum(), [*one.get_decoder().parameters()])
        return [hidden.detach(), *gradients]

    truth = results(copy.deepcopy(model).double(), lambda one: separate_hidden(one, sequences))
    moved = model.to(device, training_dtype(device))
    pack = make_pack(sequences).to(device)
    with torch.device(device):  # the oracle makes its own inputs
        eager = results(moved, lambda one: separate_hidden(one, sequences))
    actual = results(moved, lambda one: packed_hidden(one, pack))
    floor = 1e-5 if device == "cpu" else 5e-3  # errors of a small gradient scatter by more than a factor of two
    for ours, reference, expected in zip(actual, eager, truth, strict=True):
        assert relative_error(ours, expected) <= 2 * relative_error(reference, expected) + floor


def sampler_for(model, **options):
    tokenizer = make_tokenizer()
    return TransformersSampler(SamplingConfig(**options), model, tokenizer, num_valid_vocab=len(tokenizer))


@on_each_device
@pytest.mark.parametrize("per_prompt_seeds", [False, True])
def test_sampling_from_a_peaked_model_gives_its_greedy_tokens(device, per_prompt_seeds):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight *= 1e4  # so peaked that sampling is greedy decoding
    model = model.to(device, training_dtype(device))
    rng = np.random.default_rng(0)
    prompts = [make_prompt(f"p{n}", rng.integers(2, NUM_WORDS, n)) for n in (100, 1, 7, 40, 3)]
    sampler = sampler_for(model, max_new_tokens=20, batch_size=3, per_prompt_seeds=per_prompt_seeds)
    samples = sample_responses(sampler, prompts, seed=0)
    assert model.config._attn_implementation == ATTENTION_NAME and len(samples) == len(prompts)
    model.set_attn_implementation("eager")
    for sample in samples:
        ids, response = sample.rendered.policy_ids.tolist(), torch.tensor(sample.response.token_ids).long()
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids + response.tolist()], device=device)).logits[0, :, :NUM_WORDS]
        logits_RV = logits_TV[len(ids) - 1 : -1].float().cpu()
        below_best = logits_RV.amax(1) - logits_RV.gather(1, response[:, None]).squeeze(1)
        # Two attention kernels round differently: in 16 bits near ties may fall either way.
        slack = 0.0 if device == "cpu" else 0.05
        assert (below_best <= slack * logits_RV.std(1)).all()


class HostReads(TorchDispatchMode):
    """Raises where the host reads a tensor's value, or a shape depends on one: what waits for the device on CUDA."""

    NAMES = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_consecutive"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.NAMES:
            raise AssertionError(f"the host waits for {name}")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_reads(device, monkeypatch):
    if device == "cpu":
        # Values of tensors are checked where that costs no synchronisation, on a CPU.
        monkeypatch.setattr("inverseq_kernels.checks.should_check_values", lambda tensor: False)
        with HostReads():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_engine(device):
    """An engine on a tiny model and the micro-batches of one step."""
    model = make_tiny_llama().to(device, training_dtype(device))
    samples = make_samples(8)
    offsets = np.cumsum([0, *(sample.num_actions for sample in samples)])
    values = -5 * torch.rand(2, int(offsets[-1]), generator=torch.Generator().manual_seed(0))
    optim = OptimConfig(lr=1e-3, samples_per_step=8)
    scored = ScoredSamples(samples, values[0], values[1], offsets)
    step = next(iter(plan_steps(scored, optim, PackingConfig(train_tokens=64))))
    assert len(step.micro_batches) > 1
    return TorchEngine(Policy(model, 512, EngineConfig()), optim, total_updates=10), step


def make_tiny_llama():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, tie_word_embeddings=True, **heads)
    config._attn_implementation = ATTENTION_NAME
    return LlamaForCausalLM(config)


@on_each_device
def test_micro_batches_never_make_the_host_wait(device, monkeypatch):
    engine, step = make_engine(device)
    engine.train_step(step)  # kernels are compiled and libraries loaded
    with no_host_reads(device, monkeypatch):
        sums = accumulate(step, engine.device, engine.policy, engine._backward)
        norm = engine._clip()
        if device == "cuda":  # AdamW reads its count of steps on a CPU
            engine._update()
    assert sums.isfinite().all() and norm > 0


def test_a_read_of_a_value_is_noticed(monkeypatch):
    engine, step = make_engine("cpu")
    engine.weights[0].register_post_accumulate_grad_hook(lambda weight: weight.grad.sum().item())
    with pytest.raises(AssertionError, match="the host waits"), no_host_reads("cpu", monkeypatch):
        accumulate(step, engine.device, engine.policy, engine._backward)


@on_each_device
def test_a_step_moves_fp32_masters_and_the_loss_falls(device):
    engine, step = make_engine(device)
    losses = [engine.train_step(step).loss for _ in range(12)]
    assert all(master.dtype == torch.float32 for master in engine.masters)
    assert losses[-1] < 0.8 * losses[0]
