"""Continuous batching: its attention and shared prompts change no token, and a prompt's own seed fixes its response."""

from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
)

from inverseq.attention import ATTENTION_NAME
from inverseq.chat import ChatRenderer
from inverseq.config import SamplingConfig
from inverseq.prompts import PromptStream, repeat_prompts
from inverseq.records import Prompt
from inverseq.sampling import sample_responses
from inverseq.sampling_attention import PAGED_ATTENTION_NAME, paged_attention, paged_attention_is_supported
from inverseq.sampling_cache import CUDA_PAGE_TOKENS, CUDA_STEP_TOKENS, cache_bytes_per_token, engine_bytes
from inverseq.sampling_noise import gumbel_noise, prompt_keys
from inverseq.sampling_transformers import TransformersSampler, equal_prompts
from tests.test_sampling import (
    NUM_WORDS,
    chi_square_p_value,
    make_model,
    make_prompt,
    make_tokenizer,
    mixed_prompts,
    pair_probabilities,
    responses_of,
)
from tests.tiny import make_tiny_tokenizer


def make(model, **options) -> TransformersSampler:
    tokenizer = make_tokenizer()
    return TransformersSampler(SamplingConfig(**options), model, tokenizer, num_valid_vocab=len(tokenizer))


def by_id(samples) -> dict[str, list[int]]:
    return {sample.rendered.prompt.id: sample.response.token_ids.tolist() for sample in samples}


class Counted:
    """How many tokens a model reads, and with which attention."""

    def __init__(self, model):
        self.model, self.num_tokens, self.attention = model, 0, set()

    def __enter__(self):
        self.hook = self.model.register_forward_pre_hook(self.count, with_kwargs=True)
        return self

    def count(self, module, args, kwargs):
        self.num_tokens += kwargs["input_ids"].numel()
        self.attention.add(module.config._attn_implementation)

    def __exit__(self, *_):
        self.hook.remove()


def sliding_window_model(window: int) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=NUM_WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=window,
        initializer_range=0.3,
        eos_token_id=1,
        attn_implementation=ATTENTION_NAME,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MistralForCausalLM(config).eval()


def softcapped_model(window: int | None) -> Gemma2ForCausalLM:
    """Its second layer sees everything, its first one a window; ``attn_logit_softcapping`` changes the words."""
    config = Gemma2Config(
        vocab_size=NUM_WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=None,
        max_position_embeddings=512,
        sliding_window=window or 512,
        initializer_range=0.5,
        eos_token_id=1,
        tie_word_embeddings=False,
        attn_implementation=ATTENTION_NAME,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_attention_of_each_sequence_to_itself_decodes_what_the_model_would(family, window):
    """Prompts that need several steps to be read, and responses past the end of a sliding window."""
    if family == "gemma2":
        model = softcapped_model(window)
    elif window:
        model = sliding_window_model(window)
    else:
        model = make_model()
        model.config.max_position_embeddings = 512
    with torch.no_grad():
        model.lm_head.weight *= 1e4  # so peaked that sampling is greedy decoding
    rng = np.random.default_rng(0)
    lengths = (300, 1, 7, 40, 3, 25, 90, 60, 33, 50)  # the first word after each long one depends on its window
    prompts = [make_prompt(f"p{n}", rng.integers(2, NUM_WORDS, n)) for n in lengths]
    with Counted(model) as counted:
        samples = sample_responses(make(model, max_new_tokens=20, batch_size=3), prompts, seed=0)
    # Older releases (5.17) keep the paged cache from an attention function: there their own sdpa runs.
    ours = family == "gemma2" or paged_attention_is_supported()
    assert counted.attention == {PAGED_ATTENTION_NAME if ours else "paged|sdpa"}
    assert paged_attention_is_supported() or Version(transformers.__version__) < Version("5.23")
    assert model.config._attn_implementation == ATTENTION_NAME
    model.set_attn_implementation("eager")
    for sample in samples:
        ids = sample.rendered.policy_ids.tolist()
        expected = model(torch.tensor([ids + sample.response.token_ids.tolist()])).logits[0, :, :NUM_WORDS].argmax(-1)
        assert expected[len(ids) - 1 : -1].tolist() == sample.response.token_ids.tolist()


@pytest.mark.parametrize("wrong", [{"dropout": 0.1}, {"s_aux": torch.ones(1)}, {"cache": None}])
def test_attention_refuses_what_it_would_get_wrong(wrong):
    query = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match="paged"):
        paged_attention(torch.nn.Module(), query, query, query, None, **{"cache": object()} | wrong)


def test_copies_of_a_prompt_are_read_once_and_answered_independently():
    model = make_model()
    prompts = repeat_prompts([make_prompt(f"p{n}", [4] * n) for n in (30, 20)], 4)
    with Counted(model) as counted:
        samples = sample_responses(make(model, max_new_tokens=12, batch_size=8), prompts, seed=0)
    generated = sum(sample.num_actions for sample in samples)
    # A copy reads the prompt's last token itself, and no one reads the last token of a response.
    assert counted.num_tokens == (29 + 19) + 8 + (generated - 8)
    assert [sample.rendered for sample in samples] == prompts
    assert len(set(map(tuple, responses_of(samples)))) > 4


def test_copies_follow_the_policys_softmax_each():
    model, prompt_ids = make_model(), [3, 7, 4]
    probabilities = pair_probabilities(model, prompt_ids)
    prompts = repeat_prompts([make_prompt("p", prompt_ids)], 2000)
    samples = sample_responses(make(model, max_new_tokens=2, batch_size=150), prompts, seed=5)
    assert chi_square_p_value(responses_of(samples), probabilities) > 0.01


def test_a_prefix_that_is_in_the_cache_is_not_read_again():
    model = make_model()
    common = [5] * 64
    prompts = [make_prompt(f"p{n}", common + [n] * 8) for n in range(2, 6)]
    with Counted(model) as counted:
        samples = sample_responses(make(model, max_new_tokens=2, batch_size=1), prompts, seed=0)
    generated = sum(sample.num_actions for sample in samples)
    assert counted.num_tokens == 64 + 4 * 8 + generated - 4


def test_what_is_kept_of_earlier_prompts_gives_way_to_new_ones():
    model, rng = make_model(), np.random.default_rng(0)
    model.config.max_position_embeddings = 512
    prompts = [make_prompt(f"p{i}", rng.integers(2, NUM_WORDS, 100)) for i in range(20)]
    with Counted(model) as counted:
        samples = sample_responses(make(model, max_new_tokens=40, batch_size=3), prompts, seed=0)
    generated = sum(sample.num_actions for sample in samples)
    assert counted.num_tokens == 20 * 100 + generated - 20  # nothing was given up and read again


def test_equal_prompts_stand_together_but_no_more_than_are_decoded_at_once():
    prompts = [make_prompt(str(i), ids) for i, ids in enumerate([[2, 3], [4], [2, 3], [2, 3], [4]])]
    assert equal_prompts(prompts, 8) == [[0, 2, 3], [1], [4]]
    assert equal_prompts(prompts, 2) == [[0, 2], [3], [1], [4]]


def test_repeated_prompts_have_distinct_ids():
    first, second = make_prompt("a", [2, 3]), make_prompt("b", [4, 5])
    copies = repeat_prompts([first, second, first], 2)
    assert [copy.prompt.id for copy in copies] == ["a", "b", "a#1", "a#2", "b#1", "a#3"]
    assert repeat_prompts([first, second], 1) == [first, second]
    assert copies[2].prompt.messages == first.prompt.messages and copies[2].prompt_ids is first.prompt_ids


def test_the_stream_repeats_prompts_and_counts_responses():
    renderer = ChatRenderer(make_tiny_tokenizer(), principle_text="be safe", plain_system="")
    prompts = [Prompt(f"p{i}", ({"role": "user", "content": f"word {i}"},)) for i in range(4)]
    stream = PromptStream(prompts, renderer, seed=0, shuffle=False)
    assert [item.prompt.id for item in stream.next(6, copies=3)] == ["p0", "p1", "p0#1", "p1#1", "p0#2", "p1#2"]
    assert [item.prompt.id for item in stream.next(2, copies=1)] == ["p2", "p3"]
    with pytest.raises(ValueError, match="copies=3: expected a divisor of count=4"):
        stream.next(4, copies=3)


def test_what_an_epoch_draws_again_has_noise_of_its_own_whichever_rank_answers_it():
    renderer = ChatRenderer(make_tiny_tokenizer(), principle_text="be safe", plain_system="")
    prompts = [Prompt(f"p{i}", ({"role": "user", "content": f"word {i}"},)) for i in range(3)]
    drawn = PromptStream(prompts, renderer, seed=0, shuffle=False).next(8)
    assert [item.prompt.id for item in drawn] == ["p0", "p1", "p2", "p0#1", "p1#1", "p2#1", "p0#2", "p1#2"]
    keys = [key.tobytes() for key in prompt_keys(drawn, seed=5)]
    assert len(set(keys)) == 8
    for rank in range(3):
        assert [key.tobytes() for key in prompt_keys(drawn[rank::3], seed=5)] == keys[rank::3]


def test_with_seeds_of_their_own_responses_do_not_depend_on_what_else_is_sampled():
    model, prompts = make_model(), repeat_prompts(mixed_prompts(12), 2)
    order = np.random.default_rng(0).permutation(len(prompts))
    whole = make(model, max_new_tokens=12, batch_size=64, per_prompt_seeds=True)
    few = make(model, max_new_tokens=12, batch_size=3, per_prompt_seeds=True)
    reference = by_id(sample_responses(whole, prompts, seed=3))
    assert by_id(sample_responses(whole, [prompts[i] for i in order], seed=3)) == reference
    assert by_id(sample_responses(few, prompts, seed=3)) == reference
    shards = [sample_responses(few, prompts[rank::3], seed=3) for rank in range(3)]
    assert by_id([sample for shard in shards for sample in shard]) == reference
    assert by_id(sample_responses(whole, prompts, seed=4)) != reference
    assert sum(reference[f"p{i}"] != reference[f"p{i}#1"] for i in range(12)) > 6  # copies have noise of their own


def test_with_seeds_of_their_own_tokens_follow_the_policys_softmax():
    model, prompt_ids = make_model(), [3, 7, 4]
    probabilities = pair_probabilities(model, prompt_ids)
    sampler = make(model, max_new_tokens=2, batch_size=200, per_prompt_seeds=True)
    samples = sample_responses(sampler, [make_prompt(str(i), prompt_ids) for i in range(2000)], seed=1)
    assert chi_square_p_value(responses_of(samples), probabilities) > 0.01
    assert {sample.response.seed for sample in samples} == {1}


def test_noise_is_standard_gumbel_and_a_function_of_its_key_and_position():
    key, other = prompt_keys(mixed_prompts(2), seed=0)
    noise = gumbel_noise([(key, 0), (key, 1), (other, 0)], 50_000).double()
    assert torch.equal(gumbel_noise([(other, 0)], 50_000)[0].double(), noise[2])
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.02
    for probability in (0.01, 0.5, 0.99):  # P(G ≤ g) = exp(−exp(−g))
        quantile = -np.log(-np.log(probability))
        assert (noise <= quantile).double().mean().item() == pytest.approx(probability, abs=0.004)


def test_keys_differ_by_seed_prompt_and_occurrence():
    first, second = make_prompt("a", [2, 3]), make_prompt("b", [2, 3])
    same_name = make_prompt("a", [2, 4])
    keys = [*prompt_keys([first, second, first, same_name], 0), *prompt_keys([first], 1), *prompt_keys([first], -1)]
    counts = Counter(key.tobytes() for key in keys)
    assert len(counts) == 6 and all(key.shape == (2,) and key.dtype == np.uint64 for key in keys)
    assert prompt_keys([first], 0)[0].tobytes() == keys[0].tobytes()


def test_forced_lengths_are_exact_whatever_is_sampled():
    model, prompts = make_model(), repeat_prompts(mixed_prompts(4), 2)
    lengths = [1, 5, 30, 2, 9, 7, 3, 12]
    answers = dict(make(model, max_new_tokens=8, batch_size=3).generate(prompts, seed=0, lengths=lengths))
    assert [len(answers[i].token_ids) for i in range(8)] == lengths
    assert any(np.isin(answer.token_ids[:-1], (1, 5)).any() for answer in answers.values())  # past stop tokens


def test_the_recorded_seed_is_the_one_that_was_used_on_every_rank(monkeypatch):
    sampler, prompts = make(make_model(), max_new_tokens=8, batch_size=5), mixed_prompts(9)
    alone = sample_responses(sampler, prompts, seed=3)
    distributed = torch.distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        second_rank = sample_responses(sampler, prompts, seed=3)
    finally:
        distributed.destroy_process_group()
    assert responses_of(second_rank) == responses_of(alone)
    assert {sample.response.seed for sample in second_rank} == {3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt=0: expected a positive"),
        ({"samples_per_prompt": 3, "samples_per_epoch": 500}, "samples_per_prompt=3: expected a divisor"),
        ({"per_prompt_seeds": True, "backend": "replay", "replay_path": "x"}, "per_prompt_seeds=True: expected false"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


SHAPES = {
    "llama-2-7b": LlamaConfig(),
    "mistral-7b": MistralConfig(sliding_window=None),
    "llama-3-8b": LlamaConfig(vocab_size=128256, num_key_value_heads=8, intermediate_size=14336),
    "smollm2": LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    ),
}


@pytest.mark.skipif(not paged_attention_is_supported(), reason="an older transformers plans otherwise")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("num_pages", [64, 512])
def test_a_cache_that_is_asked_for_is_one_that_the_engine_starts_with(name, num_pages):
    """The engine refuses to start with a given number of pages when its own plan exceeds what is free."""
    from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16, attn_implementation="sdpa")
    bytes_per_page = CUDA_PAGE_TOKENS * cache_bytes_per_token(model)
    settings = ContinuousBatchingConfig(
        num_blocks=num_pages, page_size=CUDA_PAGE_TOKENS, max_batch_tokens=CUDA_STEP_TOKENS,
        max_requests_per_batch=64, max_memory_percent=0.8, max_blocks_per_request=0, use_async_batching=False,
    )  # fmt: skip
    plan = PagedAttentionMemoryHandler(
        config=model.config,
        cb_config=settings,
        dtype=model.dtype,
        bytes_per_sector=bytes_per_page,
        tokens_per_sector=CUDA_PAGE_TOKENS,
        bytes_per_block=bytes_per_page,
        attn_types=["full_attention"],
        model_supports_logits_to_keep=True,
    )
    planned = plan.compute_memory_footprint(CUDA_STEP_TOKENS, num_pages)
    assert planned > num_pages * bytes_per_page
    # 5.17 counts the logits of a whole step, 5.23 those of the requests.
    assert planned <= engine_bytes(model, num_pages * CUDA_PAGE_TOKENS) <= 1.3 * planned + 2**32
