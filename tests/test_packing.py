"""Packs equal a slow Python oracle; every action stands once; ranks take equal micro-steps; bad input is named."""

import dataclasses
import importlib.util
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import inverseq.packing
from inverseq.packing import FlatSamples, pack_views, plan_packs, view_lengths, write_pack
from inverseq.records import Prompt, RenderedPrompt, Response, Sample
from tests.packing_oracle import oracle_pack, oracle_plan
from tests.tiny_samples import make_samples

PROMPT = Prompt("tiny", ({"role": "user", "content": "question"},))
VOCAB = 5  # few ids, so that prefixes often agree by chance


def make_sample(prefixes, prompt, response) -> Sample:
    def ids(tokens):
        return np.array(tokens, dtype=np.int32)

    rendered = RenderedPrompt(PROMPT, tuple(ids(prefix) for prefix in prefixes), ids(prompt))
    return Sample(rendered, Response(ids(response), "stop", 0, "tiny", "0", 0))


def with_response(sample: Sample, token_ids: np.ndarray) -> Sample:
    return dataclasses.replace(sample, response=dataclasses.replace(sample.response, token_ids=token_ids))


@st.composite
def sample_lists(draw, num_views=None):
    num_views = draw(st.integers(1, 2)) if num_views is None else num_views
    common = [draw(st.lists(st.integers(0, VOCAB - 1), max_size=6)) for _ in range(num_views)]
    token = st.integers(0, VOCAB - 1)
    samples = []
    for _ in range(draw(st.integers(1, 12))):
        prefixes = [view + draw(st.lists(token, max_size=2)) for view in common]
        prompt = draw(st.lists(token, min_size=0 if all(prefixes) else 1, max_size=5))
        samples.append(make_sample(prefixes, prompt, draw(st.lists(token, min_size=1, max_size=6))))
    return samples


def assert_equals_oracle(pack, samples, indices, views, share_prefix):
    expected = oracle_pack(samples, indices, views, share_prefix=share_prefix)
    for name in ("input_ids", "position_ids", "token_ids", "sample_index", "action_index"):
        tensor = getattr(pack, name)
        assert tensor.dtype == torch.int64 and tensor.tolist() == expected[name], name
    for name in ("cu_seqlens", "parent_seq"):
        tensor = getattr(pack, name)
        assert tensor.dtype == torch.int32 and tensor.tolist() == expected[name], name
    assert pack.seqlens == tuple(expected["seqlens"]) and pack.max_seqlen == max(expected["seqlens"])
    assert not pack.is_dummy


@given(sample_lists(), st.booleans(), st.data())
def test_written_pack_equals_the_oracle(samples, share_prefix, data):
    indices = data.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, unique=True))
    views = [(0,), (-1,), (0, 1)][data.draw(st.integers(0, 2 if len(samples[0].rendered.prefix_ids) == 2 else 1))]
    for source in (samples, FlatSamples.of(samples)):
        pack = write_pack(source, indices, views, share_prefix=share_prefix)
        assert_equals_oracle(pack, samples, indices, views, share_prefix)


def test_action_rows_are_the_rows_that_predict_hand_written():
    samples = [make_sample([[1, 2], []], [3], [4]), make_sample([[1], [2]], [3, 4], [3, 2, 1])]
    pack = write_pack(samples, [1, 0], (0, 1))
    assert pack.input_ids.tolist() == [1, 3, 4, 3, 2, 1, 2, 3, 2, 3, 4, 3, 2, 3]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 0]
    assert pack.cu_seqlens.tolist() == [0, 5, 8, 13, 14]
    assert pack.action_index.tolist() == [[2, 3, 4, 7], [10, 11, 12, 13]]
    assert pack.token_ids.tolist() == [3, 2, 1, 4]
    assert pack.sample_index.tolist() == [1, 1, 1, 0]


def test_shared_prefix_is_emitted_once_and_continued_hand_written():
    samples = [make_sample([[1, 2]], [3, 4], [0, 1]), make_sample([[1, 2]], [3], [2])]
    pack = write_pack(samples, [0, 1], (0,), share_prefix=True)
    assert pack.input_ids.tolist() == [1, 2, 3, 4, 0, 3]  # the second sample keeps its last prompt token
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4, 2]
    assert pack.cu_seqlens.tolist() == [0, 2, 5, 6] and pack.parent_seq.tolist() == [-1, 0, 0]
    assert pack.action_index.tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("prompts", [([2], [2, 3]), ([2, 3], [2]), ([2], [2]), ([2], [2, 3], [2, 3])])
def test_sequences_keep_their_last_prompt_token_when_one_prompt_begins_another(prompts):
    samples = [make_sample([[1]], prompt, [4]) for prompt in prompts]
    pack = write_pack(samples, range(len(samples)), (0,), share_prefix=True)
    assert_equals_oracle(pack, samples, range(len(samples)), (0,), True)
    assert pack.seqlens == (1, *(len(prompt) for prompt in prompts))


@given(sample_lists(), st.integers(0, 40), st.booleans())
def test_pack_views_scores_every_action_once_within_the_budget(samples, slack, share_prefix):
    views = tuple(range(len(samples[0].rendered.prefix_ids)))
    lengths = view_lengths(samples, views)
    budget = int(lengths.max()) + slack
    packs = pack_views(samples, views, token_budget=budget, share_prefix=share_prefix)
    seen = [(int(i), int(token)) for pack in packs for i, token in zip(pack.sample_index, pack.token_ids, strict=True)]
    expected = [(i, int(token)) for i, sample in enumerate(samples) for token in sample.response.token_ids]
    assert sorted(seen) == sorted(expected)
    for pack in packs:
        assert pack.num_tokens <= budget
        indices = pack.sample_index.unique_consecutive().tolist()
        assert_equals_oracle(pack, samples, indices, views, share_prefix)
        if not share_prefix:
            assert pack.num_tokens == lengths[indices].sum()


def test_pack_views_counts_a_common_prefix_once():
    samples = [make_sample([[1] * 50], [2, i], [3]) for i in range(4)]
    assert len(pack_views(samples, (0,), token_budget=60)) == 4
    (pack,) = pack_views(samples, (0,), token_budget=60, share_prefix=True)
    assert pack.num_tokens == 51 + 4
    assert len(pack_views(samples, (0,), token_budget=54, share_prefix=True)) == 2


LENGTHS = st.one_of(
    st.lists(st.integers(1, 64), max_size=60),
    st.lists(st.integers(30, 34), max_size=40),  # two fill a pack, or just do not
    st.tuples(st.integers(1, 64), st.integers(1, 40)).map(lambda pair: [pair[0]] * pair[1]),  # all equal
    st.lists(st.integers(1, 4), max_size=60).map(lambda small: [64, *small]),  # one huge
    st.lists(st.sampled_from([64, 32, 16, 48]), max_size=60),  # exact fits
)


@given(LENGTHS, st.integers(1, 8), st.sampled_from([64, 65, 100, 5000]), st.sampled_from([0.0, 0.25]), st.data())
def test_plan_equals_the_oracle_and_keeps_its_promises(lengths, num_ranks, budget, attention_cost, data):
    step_sizes, left = [], len(lengths)
    while left:
        step_sizes.append(data.draw(st.integers(0, left)) if len(step_sizes) < 4 else left)
        left -= step_sizes[-1]
    plan = plan_packs(
        np.array(lengths, dtype=np.int64),
        token_budget=budget,
        num_ranks=num_ranks,
        step_sizes=step_sizes,
        attention_cost=attention_cost,
    )
    expected = oracle_plan(
        lengths, token_budget=budget, num_ranks=num_ranks, step_sizes=step_sizes, attention_cost=attention_cost
    )
    first = 0
    for step, size in enumerate(step_sizes):
        ranks = [[pack.tolist() for pack in plan.packs(step, rank)] for rank in range(num_ranks)]
        assert ranks == expected[step]
        packs = [pack for rank in ranks for pack in rank]
        assert sorted(i for pack in packs for i in pack) == list(range(first, first + size))
        assert {len(rank) for rank in ranks} == {plan.num_micro_steps(step)}
        assert all(sum(lengths[i] for i in pack) <= budget for pack in packs)
        first += size
    assert plan.num_steps == len(step_sizes)


@given(st.lists(st.integers(5, 40), min_size=1, max_size=40), st.integers(0, 4), st.integers(1, 4))
def test_plan_with_shared_tokens_equals_the_oracle(lengths, shared_tokens, num_ranks):
    keywords = {"token_budget": 70, "num_ranks": num_ranks, "shared_tokens": shared_tokens}
    plan = plan_packs(np.array(lengths), **keywords)
    (expected,) = oracle_plan(lengths, **keywords)
    assert [[pack.tolist() for pack in plan.packs(0, rank)] for rank in range(num_ranks)] == expected
    for pack in plan.packs():
        assert not len(pack) or shared_tokens + sum(lengths[i] - shared_tokens for i in pack) <= 70


def test_a_long_list_of_lengths_equals_the_oracle():
    """The search tree has three levels and lengths are sorted by counting, neither of which short lists reach."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.0, 1.0, 1500), 1, 5000).astype(np.int64)
    for num_ranks in (1, 3):
        plan = plan_packs(lengths, token_budget=5000, num_ranks=num_ranks)
        (expected,) = oracle_plan(lengths.tolist(), token_budget=5000, num_ranks=num_ranks)
        assert [[pack.tolist() for pack in plan.packs(0, rank)] for rank in range(num_ranks)] == expected


@pytest.mark.parametrize(
    "lengths",
    [
        [60] + [4] * 17,  # evenly spread cost would put 68 tokens into one pack
        [64, 33, 32, 31] + [8] * 20,
        np.random.default_rng(3).integers(1, 65, 50).tolist(),
    ],
)
def test_attention_cost_balances_packs_without_breaking_the_budget(lengths):
    keywords = {"token_budget": 64, "num_ranks": 2, "linear_cost": 0.0, "attention_cost": 1.0}
    plan = plan_packs(np.array(lengths), **keywords)
    (expected,) = oracle_plan(lengths, **keywords)
    assert [[pack.tolist() for pack in plan.packs(0, rank)] for rank in (0, 1)] == expected
    assert all(sum(lengths[i] for i in pack) <= 64 for rank in expected for pack in rank)


def test_packs_are_99_percent_full_where_lengths_allow():
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(5.5, 0.8, 20_000), 2, 4096).astype(np.int64)
    packs = plan_packs(lengths, token_budget=4096).packs()
    assert lengths.sum() >= 0.99 * 4096 * len(packs)


@pytest.mark.parametrize("attention_cost", [0.0, 1 / 1024])
def test_ranks_are_balanced_in_every_micro_step(attention_cost):
    rng = np.random.default_rng(2)
    lengths = rng.integers(100, 900, 640)
    costs = lengths + attention_cost * lengths**2
    plan = plan_packs(
        lengths, token_budget=2048, num_ranks=8, step_sizes=[16, 64, 560], attention_cost=attention_cost
    )
    for step, (first, size) in enumerate([(0, 16), (16, 64), (80, 560)]):
        by_rank = np.array([[costs[pack].sum() for pack in plan.packs(step, rank)] for rank in range(8)])
        ideal = costs[first : first + size].sum() / 8
        assert by_rank.max(axis=0).sum() <= 1.15 * ideal  # what the step lasts
        assert by_rank.sum(axis=1).max() <= 1.15 * ideal


def test_fewer_samples_than_ranks_leave_marked_dummy_packs():
    samples = make_samples(3)
    plan = plan_packs(view_lengths(samples, (0, 1)), token_budget=64, num_ranks=5)
    packs = [write_pack(samples, plan.packs(0, rank)[0], (0, 1)) for rank in range(5)]
    assert [pack.is_dummy for pack in packs] == [False] * 3 + [True] * 2
    dummy = packs[-1]
    assert dummy.input_ids.tolist() == [0, 0, 0, 0] and dummy.position_ids.tolist() == [0, 1, 0, 1]
    assert dummy.cu_seqlens.tolist() == [0, 2, 4] and dummy.seqlens == (2, 2) and dummy.max_seqlen == 2
    assert dummy.action_index.tolist() == [[1], [3]] and dummy.token_ids.tolist() == [0]
    assert dummy.parent_seq.tolist() == [-1, -1] and dummy.sample_index.tolist() == [0]
    for field in dataclasses.fields(dummy):
        if isinstance(getattr(dummy, field.name), torch.Tensor):
            assert getattr(dummy, field.name).dtype == getattr(packs[0], field.name).dtype, field.name


def test_no_samples_make_no_packs():
    assert plan_packs(np.zeros(0, dtype=np.int64), token_budget=8).packs() == []
    assert plan_packs(np.zeros(0, dtype=np.int64), token_budget=8, num_ranks=2, step_sizes=[0, 0]).packs(1, 1) == []
    assert pack_views([], (0,), token_budget=8) == []
    assert view_lengths([], (0, 1)).tolist() == []


def test_threads_give_the_same_packs():
    samples = make_samples(400, seed=7)
    flat = FlatSamples.of(samples)
    lengths = view_lengths(flat, (0, 1))

    def work(_):
        plan = plan_packs(lengths, token_budget=256, num_ranks=2)
        return [write_pack(flat, pack, (0, 1)).input_ids for rank in (0, 1) for pack in plan.packs(0, rank)]

    expected = work(0)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(work, range(16)):
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_the_interpreter_lock_is_released_while_planning():
    """With the lock held a counting thread would stand still for the whole plan."""
    lengths = np.full(2_000_000, 3, dtype=np.int64)
    counted, stop = 0, threading.Event()

    def count():
        nonlocal counted
        while not stop.is_set():
            counted += 1

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    sys.setswitchinterval(0.5)  # longer than the plan takes: the lock changes hands only where it is released
    try:
        thread.start()
        before = counted
        plan_packs(lengths, token_budget=2**24)
        after = counted
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert after > before + 1000


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lengths": [3, 9, 4], "token_budget": 8}, "sample 1 has 9 tokens, token_budget is 8"),
        ({"lengths": [3, 0]}, r"lengths\[1\]=0"),
        ({"lengths": [3, -1]}, r"lengths\[1\]=-1"),
        ({"lengths": [3.5]}, "lengths: expected whole numbers"),
        ({"lengths": [[3]]}, "lengths: expected whole numbers in one dimension"),
        ({"token_budget": 0}, "token_budget=0"),
        ({"token_budget": 2**24 + 1}, "token_budget=16777217: expected 1 to 16777216"),
        ({"num_ranks": 0}, "num_ranks=0"),
        ({"shared_tokens": 8}, "shared_tokens=8"),
        ({"shared_tokens": 3}, r"lengths\[0\]=3: expected more than 3"),
        ({"step_sizes": [1]}, "step_sizes: 1 of 2 samples are in no step"),
        ({"step_sizes": [1, 2]}, r"step_sizes\[1\]=2: expected 0 to the 1 samples left"),
        ({"step_sizes": [3, -1]}, r"step_sizes\[0\]=3"),
        ({"linear_cost": -1.0}, "linear_cost=-1"),
        ({"linear_cost": 0.0}, "one of them positive"),
        ({"attention_cost": float("nan")}, "attention_cost=-?nan"),
        ({"attention_cost": float("inf")}, "attention_cost=inf"),
    ],
)
def test_a_plan_refuses_bad_input_by_name(keywords, message):
    with pytest.raises(ValueError, match=message):
        plan_packs(**({"lengths": [3, 4], "token_budget": 8} | keywords))


def test_writing_refuses_bad_samples_by_number():
    samples = make_samples(3)
    empty = with_response(samples[1], np.empty(0, dtype=np.int32))
    with pytest.raises(ValueError, match="sample 1: its response is empty"):
        write_pack([samples[0], empty], [0, 1], (0,))
    with pytest.raises(ValueError, match="sample 1: its response is empty"):
        view_lengths([samples[0], empty], (0,))
    with pytest.raises(ValueError, match="sample 0: prefix and prompt of view 1 are empty"):
        write_pack([make_sample([[1], []], [], [2])], [0], (0, 1))
    with pytest.raises(ValueError, match="sample 2: response token 1 has id -4"):
        write_pack([*samples[:2], with_response(samples[2], np.array([3, -4], dtype=np.int32))], [0, 2], (0,))
    with pytest.raises(ValueError, match="sample 0: prefix of view 1 token 1 has id 7, expected 0 to 6"):
        write_pack([make_sample([[1], [6, 7]], [1], [2])], [0], (0, 1), num_valid_vocab=7)
    write_pack([make_sample([[1], [6, 7]], [1], [2])], [0], (0, 1), num_valid_vocab=8)
    with pytest.raises(ValueError, match="sample 1: response token_ids is int64, expected int32"):
        write_pack([samples[0], with_response(samples[1], np.array([3]))], [0, 1], (0,))
    with pytest.raises(ValueError, match="sample 1 has 1 views, sample 0 has 2"):
        FlatSamples.of([samples[0], make_sample([[1]], [1], [1])])
    with pytest.raises(ValueError, match="sample 2 has .* tokens, token_budget is 30"):
        lengthy = with_response(samples[2], np.full(40, 5, dtype=np.int32))
        pack_views([make_sample([[1], [2]], [1], [1])] * 2 + [lengthy], (0, 1), token_budget=30, share_prefix=True)


@pytest.mark.parametrize(
    ("indices", "views", "message"),
    [
        ([3], (0,), "indices: 3 is none of the 3 samples"),
        ([-1], (0,), "indices: -1"),
        ([0.5], (0,), "indices: expected whole numbers"),
        ([0], (2,), r"views=\(2,\): expected numbers from -2 to 1"),
        ([0], (), "views"),
        ([], (), "views"),
    ],
)
def test_writing_refuses_bad_indices_and_views(indices, views, message):
    for samples in (make_samples(3), FlatSamples.of(make_samples(3))):
        with pytest.raises(ValueError, match=message):
            write_pack(samples, indices, views)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 2, 99], "sample 1: prompt offsets 2 to 99 of 5 ids"),
        ([0, 4, 2], "sample 1: prompt offsets 4 to 2"),
        ([0, -2, 3], "sample 1: prompt offsets -2 to 3"),
        ([0, 2], "sample 1: row 1 of 1 prompt rows"),
        ([], "prompt offsets: expected at least one"),
    ],
)
def test_offsets_outside_their_ids_are_refused_before_they_are_read(offsets, message):
    from inverseq import _packing

    def ragged(offsets):
        return np.arange(5, dtype=np.int32), np.array(offsets, dtype=np.int64)

    rows = np.array([1])
    with pytest.raises(ValueError, match=message):
        _packing.write(
            [ragged([0, 2, 5])],
            ragged(offsets),
            ragged([0, 2, 5]),
            rows=rows,
            sample_numbers=rows,
            share_prefix=False,
            num_valid_vocab=9,
        )


def test_arrays_of_another_dtype_or_stride_are_refused():
    from inverseq import _packing

    for lengths in (np.ones(3), np.ones(6, dtype=np.int64)[::2], np.ones((3, 1), dtype=np.int64)):
        with pytest.raises(ValueError, match="lengths: expected a contiguous int64 array of one dimension"):
            _packing.plan(
                lengths,
                step_sizes=np.array([3]),
                token_budget=8,
                num_ranks=1,
                shared_tokens=0,
                linear_cost=1.0,
                attention_cost=0.0,
            )


def test_a_missing_extension_says_how_to_build_it(monkeypatch):
    monkeypatch.delattr(inverseq, "_packing")
    monkeypatch.setitem(sys.modules, "inverseq._packing", None)  # as if no such file were there
    spec = importlib.util.spec_from_file_location("inverseq.packing_again", inverseq.packing.__file__)
    with pytest.raises(ImportError, match="python setup.py build_ext --inplace"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
