"""A head split over two ranks gives the whole one's values and gradients (two gloo processes), on both backends."""

import importlib
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from inverseq_kernels import IGNORE_INDEX, contrastive_logprob, linear_logprob
from inverseq_kernels.vocab_parallel import local_valid_vocab

from tests import kernels_oracle as oracle

NUM_WORDS, SPLIT, NUM_VALID = 23, 9, 20
NUM_ROWS = 40  # on the triton backend: two row blocks, so two chunks where the workspace is small
HAS_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
SHARDS = [slice(0, SPLIT), slice(SPLIT, NUM_WORDS)]


def make_problems(num_rows=12):
    # Widths that tiles can load: on the triton backend bf16 takes them and fp32 stored logits.
    better = oracle.make_problem(num_rows, 16, NUM_WORDS, dtype=torch.float64, ignored=(3,))
    plain = oracle.make_problem(num_rows, 32, NUM_WORDS, dtype=torch.float64, seed=1)
    better.token_ids.clamp_(max=NUM_VALID - 1)
    better.token_ids[:3] = torch.tensor([0, SPLIT - 1, SPLIT])
    with torch.no_grad():
        better.bias[2], plain.bias[SPLIT + 1] = -math.inf, -math.inf
        better.bias[:SPLIT] += 30.0  # the ranks' maxima differ, so a combination that forgets them shows
    return better, plain


def run_rank(rank: int, store: str, failures) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        check_logprob(rank)
        check_contrast(rank)
        check_shard_of_padding(rank)
        if HAS_INTERPRETER:
            importlib.import_module("tests.conftest")  # for bf16 products, in this process too
            for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
                check_triton_logprob(rank, dtype, tolerance)
                check_triton_contrast(rank, dtype)
        check_sum_in_fp32(rank)
        check_bad_arguments(rank)
        dist.barrier()
    except Exception as error:
        failures.put(f"rank {rank}: {error!r}")
        raise
    finally:
        dist.destroy_process_group()


def check_logprob(rank: int) -> None:
    whole, _ = make_problems()
    words = SHARDS[rank]
    hidden = whole.hidden.detach().clone().requires_grad_()
    weight, bias = (tensor.detach()[words].clone().requires_grad_() for tensor in (whole.weight, whole.bias))
    upstream = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    settings = {"softcap": 8.0, "temperature": 1.3, "num_valid_vocab": NUM_VALID, "return_entropy": True}
    outputs = linear_logprob(
        hidden,
        weight,
        whole.token_ids,
        bias=bias,
        vocab_group=dist.group.WORLD,
        vocab_start=words.start,
        workspace_bytes=2000,
        **settings,
    )
    expected = linear_logprob(whole.hidden, whole.weight, whole.token_ids, bias=whole.bias, **settings)
    for output, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, reference)
    finite = expected[0].detach().isfinite()
    for used in ((0, 1), (1,)):  # both outputs, the entropy alone
        gradients, references = (
            torch.autograd.grad(
                sum((found[k][finite] * upstream[k, finite]).sum() for k in used), leaves, retain_graph=True
            )
            for found, leaves in ((outputs, (hidden, weight, bias)), (expected, whole.leaves))
        )
        torch.testing.assert_close(gradients[0], references[0])
        torch.testing.assert_close(gradients[1], references[1][words])
        torch.testing.assert_close(gradients[2], references[2][words])


def check_contrast(rank: int) -> None:
    better, plain = make_problems()
    words = SHARDS[rank]
    for alpha in (1.4, torch.linspace(-1, 2, 12, dtype=torch.float64)):
        actual = contrastive_logprob(
            better.hidden,
            better.weight[words],
            plain.hidden,
            plain.weight[words],
            better.token_ids,
            alpha,
            bias_w=better.bias[words],
            bias_l=plain.bias[words],
            num_valid_vocab=NUM_VALID,
            return_reference=True,
            vocab_group=dist.group.WORLD,
            vocab_start=words.start,
        )
        expected = contrastive_logprob(
            better.hidden,
            better.weight,
            plain.hidden,
            plain.weight,
            better.token_ids,
            alpha,
            bias_w=better.bias,
            bias_l=plain.bias,
            num_valid_vocab=NUM_VALID,
            return_reference=True,
        )
        for output, reference in zip(actual, expected, strict=True):
            assert not output.requires_grad
            torch.testing.assert_close(output, reference)


def check_shard_of_padding(rank: int) -> None:
    """The last rank's words are all past the valid ones: it adds nothing, and takes part in every sum."""
    better, plain = make_problems()
    words, token_ids = SHARDS[rank], better.token_ids.clamp(max=SPLIT - 1)
    settings = {"num_valid_vocab": SPLIT, "bias": better.bias, "return_entropy": True}
    expected = linear_logprob(better.hidden, better.weight, token_ids, **settings)
    references = torch.autograd.grad(expected[0][:2].sum() + expected[1].sum(), better.leaves)
    parallel = {"vocab_group": dist.group.WORLD, "vocab_start": words.start}
    weight, settings["bias"] = (t.detach()[words].clone().requires_grad_() for t in (better.weight, better.bias))
    outputs = linear_logprob(better.hidden, weight, token_ids, **settings, **parallel)
    leaves = (better.hidden, weight, settings["bias"])
    gradients = torch.autograd.grad(outputs[0][:2].sum() + outputs[1].sum(), leaves)
    for output, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, reference)
    torch.testing.assert_close(gradients[0], references[0])
    torch.testing.assert_close(gradients[1:], tuple(reference[words] for reference in references[1:]))
    heads = (better.hidden, better.weight, plain.hidden, plain.weight)
    shards = (better.hidden, better.weight[words], plain.hidden, plain.weight[words])
    torch.testing.assert_close(
        contrastive_logprob(*shards, token_ids, 1.4, num_valid_vocab=SPLIT, **parallel),
        contrastive_logprob(*heads, token_ids, 1.4, num_valid_vocab=SPLIT),
    )


def in_dtype(problem, dtype):
    """Fresh hidden, weight and bias of a problem, rounded; the bias stays away from -inf words' gradients."""
    return [tensor.detach().to(dtype).requires_grad_() for tensor in (problem.hidden, problem.weight, problem.bias)]


def check_triton_logprob(rank: int, dtype: torch.dtype, tolerance: float) -> None:
    """All words of a rank may be padding; ignored rows, a word that the bias removes and several chunks are in it."""
    whole, _ = make_problems(NUM_ROWS)
    whole.hidden.data[3] = math.nan  # ignored
    for num_valid, softcap in ((NUM_VALID, 8.0), (NUM_VALID, None), (SPLIT, None)):
        token_ids = whole.token_ids.clamp(max=num_valid - 1)
        words, tensors = SHARDS[rank], in_dtype(whole, dtype)
        shard = [tensors[0].detach().clone(), tensors[1].detach()[words].clone(), tensors[2].detach()[words].clone()]
        for tensor in shard:
            tensor.requires_grad_()
        truth = [tensor.detach().double().requires_grad_() for tensor in tensors]
        settings = {"softcap": softcap, "temperature": 1.3, "num_valid_vocab": num_valid, "return_entropy": True}
        parallel = {"vocab_group": dist.group.WORLD, "vocab_start": words.start, "backend": "triton"}
        outputs = linear_logprob(*shard[:2], token_ids, bias=shard[2], workspace_bytes=1, **settings, **parallel)
        expected = linear_logprob(*truth[:2], token_ids, bias=truth[2], **settings)
        upstream = torch.randn(2, NUM_ROWS, generator=torch.Generator().manual_seed(5))
        finite = expected[0].detach().isfinite()
        for output, reference in zip(outputs, expected, strict=True):
            assert output.dtype == torch.float32
            torch.testing.assert_close(output.double(), reference, rtol=1e-5, atol=1e-5)
        for tensors_, (logprobs, entropy) in ((shard, outputs), (truth, expected)):
            gradient = (logprobs[finite] * upstream[0, finite]).sum() + (entropy * upstream[1]).sum()
            gradient.backward()
            assert all(tensor.grad is not None for tensor in tensors_)
        for actual, reference in zip(shard, (truth[0].grad, truth[1].grad[words], truth[2].grad[words]), strict=True):
            assert actual.grad.dtype == dtype
            error = (actual.grad.double() - reference).norm() / truth[1].grad.norm()
            assert error < tolerance, (dtype, num_valid, softcap, actual.shape, error)


def check_triton_contrast(rank: int, dtype: torch.dtype) -> None:
    better, plain = make_problems(NUM_ROWS)
    words = SHARDS[rank]
    tensors = [tensor.detach() for problem in (better, plain) for tensor in in_dtype(problem, dtype)]
    for alpha, softcap, num_valid in (
        (1.4, None, NUM_VALID),
        (torch.linspace(-1, 2, 2 * NUM_ROWS)[::2], 6.0, NUM_VALID),
        (0.5, None, SPLIT),
    ):
        token_ids = better.token_ids.clamp(max=num_valid - 1)
        results = []
        for cut, convert, parallel in (
            (words, lambda t: t, {"vocab_group": dist.group.WORLD, "vocab_start": words.start, "backend": "triton"}),
            (slice(None), lambda t: t.double(), {}),
        ):
            h_w, w_w, b_w, h_l, w_l, b_l = (
                convert(tensor if index % 3 == 0 else tensor[cut]) for index, tensor in enumerate(tensors)
            )
            settings = {"bias_w": b_w, "bias_l": b_l, "softcap": softcap, "num_valid_vocab": num_valid, **parallel}
            settings["workspace_bytes"] = 1
            results.append(contrastive_logprob(h_w, w_w, h_l, w_l, token_ids, alpha, return_reference=True, **settings))
        for actual, expected in zip(*results, strict=True):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-5)


def check_sum_in_fp32(rank: int) -> None:
    """No gradient in half precision is added over ranks; two ranks round alike, so the call itself is watched."""
    hidden, weight = (torch.randn(3, 4).bfloat16().requires_grad_() for _ in range(2))
    dtypes, all_reduce = [], dist.all_reduce

    def spy(tensor, *args, **kwargs):
        dtypes.append(tensor.dtype)
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = spy
    try:
        keywords = {"vocab_group": dist.group.WORLD, "vocab_start": 3 * rank}
        linear_logprob(hidden, weight, torch.arange(3), **keywords).sum().backward()
    finally:
        dist.all_reduce = all_reduce
    assert hidden.grad.dtype == torch.bfloat16
    assert len(dtypes) > 3 and set(dtypes) == {torch.float32}, dtypes


def check_bad_arguments(rank: int) -> None:
    hidden, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    keywords = {"vocab_group": dist.group.WORLD, "vocab_start": 4 * rank}
    for token_ids in (torch.tensor([0, 8]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="token_ids"):
            linear_logprob(hidden, weight, token_ids, **keywords)
    with pytest.raises(ValueError, match="vocab_start"):  # both ranks claim the same words
        linear_logprob(hidden, weight, torch.tensor([0, 1]), vocab_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="num_valid_vocab"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), num_valid_vocab=0, **keywords)
    ignored = linear_logprob(hidden, weight, torch.tensor([IGNORE_INDEX, 7]), **keywords)
    torch.testing.assert_close(ignored, torch.tensor([0.0, -math.log(8)]))


def test_two_ranks_give_the_whole_heads_values_and_gradients(tmp_path):
    context = mp.get_context("spawn")
    failures = context.SimpleQueue()
    processes = [context.Process(target=run_rank, args=(rank, str(tmp_path / "store"), failures)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
    messages = [] if failures.empty() else [failures.get()]
    assert [process.exitcode for process in processes] == [0, 0], messages


def test_a_shard_of_padding_alone_has_no_valid_words():
    assert [local_valid_vocab(5, start, 4) for start in (0, 4, 8)] == [4, 1, 0]


def test_vocab_arguments_raise_value_errors_that_name_them():
    hidden, weight, token_ids = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])
    for name, keywords in (
        ("vocab_start", {"vocab_start": 4}),
        ("vocab_start", {"vocab_start": -1}),
        ("vocab_start", {"vocab_start": 1.0}),
        ("vocab_group", {"vocab_group": "world"}),
    ):
        with pytest.raises(ValueError, match=name):
            linear_logprob(hidden, weight, token_ids, **keywords)
        with pytest.raises(ValueError, match=name):
            contrastive_logprob(hidden, weight, hidden, weight, token_ids, 1.4, **keywords)
