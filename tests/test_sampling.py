"""Sampling draws from the policy's own distribution, reproducibly, and leaves the model as it was."""

import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from inverseq.attention import ATTENTION_NAME
from inverseq.config import SamplingConfig
from inverseq.records import Prompt, RenderedPrompt, Response, ScoredSamples
from inverseq.sample_files import write_samples
from inverseq.sampling import make_sampler, sample_responses

NUM_WORDS = 12  # the tokenizer's
PADDED_VOCAB = 16  # the model's: the last four words do not exist
EOS, OTHER_EOS = 1, 5
HOSTILE = {  # a generation_config.json that asks for everything but the policy's own distribution
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 2,
    "top_p": 0.5,
    "min_p": 0.2,
    "typical_p": 0.5,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [2, 3, 4],
    "begin_suppress_tokens": [6, 7],
    "forced_bos_token_id": 8,
    "forced_eos_token_id": EOS,
    "min_new_tokens": 2,
    "exponential_decay_length_penalty": (0, 2.0),
    "num_beams": 3,
    "max_length": 7,
    "eos_token_id": [EOS, OTHER_EOS],
}


def make_tokenizer(eos: str | None = "w1") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(NUM_WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, unk_token="w0")


def make_model(*, seed: int = 0, scale: float = 0.3) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=PADDED_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=EOS,
        attn_implementation=ATTENTION_NAME,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    for name, value in HOSTILE.items():
        setattr(model.generation_config, name, value)
    return model


def make_prompt(name: str, ids) -> RenderedPrompt:
    ids = np.asarray(ids, dtype=np.int32)
    prompt = Prompt(id=name, messages=({"role": "user", "content": name},))
    return RenderedPrompt(prompt, prefix_ids=(np.array([9, 9], np.int32), ids[:1]), prompt_ids=ids[1:])


def mixed_prompts(count: int, seed: int = 0) -> list[RenderedPrompt]:
    rng = np.random.default_rng(seed)
    return [make_prompt(f"p{i}", rng.integers(2, NUM_WORDS, rng.integers(1, 40))) for i in range(count)]


def make(model, *, tokenizer=None, **options):
    tokenizer = tokenizer or make_tokenizer()
    return make_sampler(SamplingConfig(**options), model, tokenizer, num_valid_vocab=len(tokenizer))


def responses_of(samples) -> list[list[int]]:
    return [sample.response.token_ids.tolist() for sample in samples]


@torch.no_grad()
def pair_probabilities(model, prompt_ids) -> dict[tuple[int, ...], float]:
    """Exact probability of every response of at most two tokens: (stop,) or (word, any)."""
    model.set_attn_implementation("eager")
    rows = torch.tensor([[*prompt_ids, word] for word in range(NUM_WORDS)])
    logits = model(rows).logits[..., :NUM_WORDS].double()
    model.set_attn_implementation(ATTENTION_NAME)
    first = logits[0, -2].softmax(-1).tolist()
    second = logits[:, -1].softmax(-1).tolist()
    table = {}
    for i in range(NUM_WORDS):
        if i in (EOS, OTHER_EOS):
            table[i,] = first[i]
        else:
            table.update({(i, j): first[i] * second[i][j] for j in range(NUM_WORDS)})
    return table


def chi_square_p_value(responses, probabilities) -> float:
    """Pearson's test; cells that expect fewer than 5 are one cell."""
    assert set(map(tuple, responses)) <= set(probabilities), "a response that has probability 0"
    counts, total = Counter(map(tuple, responses)), len(responses)
    cells, rest = [], np.zeros(2)
    for outcome, probability in probabilities.items():
        cell = np.array([counts[outcome], total * probability])
        if cell[1] < 5:
            rest += cell
        else:
            cells.append(cell)
    observed, expected = np.array([*cells, rest]).T
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return torch.special.gammaincc(torch.tensor(len(cells) / 2), torch.tensor(statistic / 2)).item()


def test_sampled_tokens_follow_the_policys_softmax_whatever_generation_config_says(monkeypatch):
    model, prompt_ids = make_model(), [3, 7, 4]
    probabilities = pair_probabilities(model, prompt_ids)
    sampler = make(model, max_new_tokens=2, batch_size=200)
    prompts = [make_prompt(str(i), prompt_ids) for i in range(2000)]
    assert chi_square_p_value(responses_of(sample_responses(sampler, prompts, seed=1)), probabilities) > 0.01

    tempered = sampler.generation_config()
    tempered.temperature = 0.8
    monkeypatch.setattr(sampler, "generation_config", lambda stop_ids: tempered)
    assert chi_square_p_value(responses_of(sample_responses(sampler, prompts, seed=1)), probabilities) < 1e-6


def test_a_response_ends_with_any_stop_token_and_keeps_it():
    sampler = make(make_model(), max_new_tokens=12, batch_size=16)
    samples = sample_responses(sampler, mixed_prompts(40), seed=0)
    for sample in samples:
        ids, reason = sample.response.token_ids, sample.response.finish_reason
        assert ids.dtype == np.int32 and ids.max() < NUM_WORDS and 1 <= len(ids) <= 12
        assert not np.isin(ids[:-1], (EOS, OTHER_EOS)).any()
        assert reason == ("stop" if ids[-1] in (EOS, OTHER_EOS) else "length")
        assert reason == "stop" or len(ids) == 12
    ends = {int(sample.response.token_ids[-1]) for sample in samples if sample.response.finish_reason == "stop"}
    assert ends == {EOS, OTHER_EOS}
    assert "length" in {sample.response.finish_reason for sample in samples}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_each_prompt_gets_the_answer_to_itself(batch_size):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight *= 1e4  # so peaked that sampling is greedy decoding
        model.lm_head.weight[NUM_WORDS:] = model.lm_head.weight[:4] * 2  # words that do not exist would win
    prompts = mixed_prompts(7)
    samples = sample_responses(make(model, max_new_tokens=6, batch_size=batch_size), prompts, seed=0)
    assert [sample.rendered for sample in samples] == prompts
    model.set_attn_implementation("eager")
    for sample in samples:
        ids = sample.rendered.policy_ids.tolist()
        for token in sample.response.token_ids.tolist():
            logits = model(torch.tensor([ids])).logits[0, -1, :NUM_WORDS]
            assert token == logits.argmax().item()
            ids.append(token)


def test_equal_seeds_give_equal_responses_and_other_seeds_others():
    sampler = make(make_model(), max_new_tokens=8, batch_size=5)
    prompts = mixed_prompts(17)
    first, again, other = (responses_of(sample_responses(sampler, prompts, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_weights_are_read_as_they_are_and_their_step_is_recorded():
    model = make_model()
    sampler, prompts = make(model, max_new_tokens=8, batch_size=8), mixed_prompts(8)
    sampler.sync(model, 0)
    before = sample_responses(sampler, prompts, seed=0)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    sampler.sync(model, 7)
    after = sample_responses(sampler, prompts, seed=0)
    assert responses_of(before) != responses_of(after)
    assert [sample.response.weights_step for sample in (before[0], after[0])] == [0, 7]
    assert (after[0].response.engine, after[0].response.seed) == ("transformers", 0)
    with pytest.raises(ValueError, match="policy is a Linear"):
        sampler.sync(torch.nn.Linear(1, 1), 0)


class Snapshot:
    """What sampling must leave as it was."""

    def __init__(self, model):
        self.state = (
            {name: module.training for name, module in model.named_modules()},
            model.config._attn_implementation,
            {name: getattr(module, "gradient_checkpointing", None) for name, module in model.named_modules()},
            model.config.use_cache,
            model.generation_config.to_dict(),
            len(model._forward_hooks),
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
            {thread for thread in threading.enumerate() if not thread.daemon},
        )


def training_model():
    """A model in the middle of training: dropout modules on but for one, gradient checkpointing on."""
    model = make_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.model.norm.eval()
    return model


def test_everything_is_as_before_after_sampling():
    model = training_model()
    before = Snapshot(model)
    sample_responses(make(model, max_new_tokens=4, batch_size=4), mixed_prompts(6), seed=0)
    assert Snapshot(model).state == before.state


@pytest.mark.parametrize("failing_call", [1, 3])
def test_an_error_in_the_engines_thread_is_raised_and_leaves_nothing_behind(failing_call):
    model, calls = training_model(), []

    def fail(module, args):
        calls.append(1)
        if len(calls) == failing_call:
            raise FloatingPointError("the planted failure")

    model.model.layers[1].register_forward_pre_hook(fail)
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match="the planted failure"):
        sample_responses(make(model, max_new_tokens=6, batch_size=2), mixed_prompts(6), seed=0)
    assert Snapshot(model).state == before.state


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_of_the_caller_stops_the_engines_thread(error):
    model = training_model()
    before = Snapshot(model)

    def advance(count):
        raise error

    with pytest.raises(error):
        sample_responses(make(model, max_new_tokens=50, batch_size=2), mixed_prompts(30), seed=0, advance=advance)
    assert Snapshot(model).state == before.state


def test_an_interrupt_while_the_engines_thread_starts_stops_it_too(monkeypatch):
    """The thread does not run at once, as on a busy machine; the caller waits for that."""
    begin = threading.Thread._bootstrap_inner

    def begin_late(thread):
        if "generation_loop" in thread.name:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "_bootstrap_inner", begin_late)
    model, handler = training_model(), signal.getsignal(signal.SIGINT)
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        sample_responses(make(model, max_new_tokens=50, batch_size=2), mixed_prompts(30), seed=0)
    assert Snapshot(model).state == before.state and signal.getsignal(signal.SIGINT) == handler


class BrokenSampler:
    name, version = "broken", "0"

    def __init__(self, indices):
        self.indices = indices

    def generate(self, prompts, *, seed):
        for index in self.indices:
            yield index, Response(np.array([2], np.int32), "length", seed, self.name, self.version, 0)


@pytest.mark.parametrize(
    ("indices", "message"), [([0, 2], "3 prompts, but 2 responses"), ([0, 1, 1, 2], "'p1' was answered twice")]
)
def test_a_missing_or_doubled_response_is_an_error(indices, message):
    with pytest.raises(RuntimeError, match=message):
        sample_responses(BrokenSampler(indices), mixed_prompts(3), seed=0)


def test_samples_come_in_prompt_order_and_each_is_announced():
    announced = []
    samples = sample_responses(BrokenSampler([2, 0, 1]), mixed_prompts(3), seed=5, advance=announced.append)
    assert [sample.rendered.prompt.id for sample in samples] == ["p0", "p1", "p2"]
    assert announced == [1, 1, 1]
    assert sample_responses(make(make_model(), max_new_tokens=4), [], seed=0) == []


def test_a_model_that_cannot_end_a_response_is_refused():
    model = make_model()
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no EOS token"):
        make(model, tokenizer=make_tokenizer(eos=None))


@pytest.fixture
def stored_run(tmp_path):
    """A run folder with an epoch of samples, one prompt twice in it, and held-out ones."""
    prompts = mixed_prompts(5)
    prompts.append(prompts[2])
    sampler = make(make_model(), max_new_tokens=8, batch_size=4)
    samples = sample_responses(sampler, prompts, seed=11)
    held_out = sample_responses(sampler, mixed_prompts(2, seed=9), seed=12)
    for name, drawn in (("samples/epoch_0001.jsonl", samples), ("held_out.jsonl", held_out)):
        offsets = np.cumsum([0, *(sample.num_actions for sample in drawn)])
        unscored = torch.zeros(int(offsets[-1]))
        write_samples(tmp_path / name, ScoredSamples(drawn, unscored, unscored, offsets), make_tokenizer())
    assert responses_of(samples[2:3]) != responses_of(samples[5:6])
    return tmp_path, samples, held_out


def replay(path, **options):
    return make(None, backend="replay", replay_path=str(path), **{"max_new_tokens": 8} | options)


@pytest.mark.parametrize("folder", [".", "samples"])
def test_replay_gives_the_stored_responses(stored_run, folder):
    path, samples, held_out = stored_run
    sampler = replay(path / folder)
    for stored, seed in ((samples, 11), (held_out, 12), (samples[:2], 11)):
        replayed = sample_responses(sampler, [sample.rendered for sample in stored], seed=seed)
        assert responses_of(replayed) == responses_of(stored)
        for new, old in zip(replayed, stored, strict=True):
            for field in ("finish_reason", "seed", "engine", "engine_version", "weights_step"):
                assert getattr(new.response, field) == getattr(old.response, field)


def test_replay_refuses_what_was_not_sampled_there(stored_run, tmp_path):
    path, samples, _ = stored_run
    rendered = [sample.rendered for sample in samples]
    with pytest.raises(ValueError, match=r"prompt 'p0' with seed 13.*\{11: 1\}"):
        sample_responses(replay(path), rendered, seed=13)
    with pytest.raises(ValueError, match="no response number 3 to prompt 'p2'"):
        sample_responses(replay(path), [*rendered, rendered[2]], seed=11)
    other_view = (np.array([9], np.int32), rendered[0].prefix_ids[1])
    other = RenderedPrompt(rendered[0].prompt, other_view, rendered[0].prompt_ids)
    with pytest.raises(ValueError, match="stored for its token ids are none"):
        sample_responses(replay(path), [other], seed=11)
    with pytest.raises(ValueError, match="max_new_tokens is 1"):
        sample_responses(replay(path, max_new_tokens=1), rendered, seed=11)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no epoch_NNNN.jsonl"):
        replay(tmp_path / "empty")
