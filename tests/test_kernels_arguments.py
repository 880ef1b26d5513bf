"""Bad arguments raise ValueErrors that name them, and backends are chosen as documented."""

import math

import inverseq_kernels
import pytest
import torch
from inverseq_kernels import (
    IGNORE_INDEX,
    backends,
    checks,
    contrastive_logprob,
    contrastive_logprob_sweep,
    linear_logprob,
    squared_log_ratio_loss,
)
from inverseq_kernels.checks import MAX_ALPHA
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from tests import kernels_oracle as oracle

INFINITY = math.inf

GOOD = dict(hidden=torch.zeros(2, 3), weight=torch.zeros(4, 3), token_ids=torch.tensor([0, 3]), bias=None)
BAD_ARGUMENTS = {
    "hidden": [torch.zeros(2, 3, 1), torch.zeros(2, 3, dtype=torch.int64), [[0.0]], torch.zeros(2, 4)],
    "weight": [
        torch.zeros(4, 2),
        torch.zeros(3),
        torch.zeros(4, 3, dtype=torch.float64),
        torch.zeros(0, 3),
        torch.zeros(4, 3, device="meta"),
        torch.zeros(4, 3).to_sparse(),
    ],
    "token_ids": [
        torch.tensor([0]),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([0, 4]),
        torch.tensor([-1, 0]),
        torch.tensor([[0, 1]]),
        None,
    ],
    "bias": [
        torch.zeros(3),
        torch.zeros(4, 1),
        torch.zeros(4, dtype=torch.int64),
        torch.full((4,), math.nan),
        torch.full((4,), INFINITY),
    ],
    "softcap": [0.0, -1.0, math.nan, "5", True],
    "temperature": [0.0, -1.0, INFINITY, None],
    "num_valid_vocab": [0, 5, 2.0, True, "3", torch.tensor(3)],
    "workspace_bytes": [0, -1, 1e6, True],
    "backend": ["cuda", "Torch", 1],
}
LOSS_ARGUMENTS = {
    "targets": [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, 1), 0.5],
    "denominator": [0.0, -1, math.nan, None, torch.zeros(()), torch.ones(1), "1", True],
    "loss_mask": [torch.ones(3), torch.ones(2, dtype=torch.int64), torch.tensor([1.0, -1.0]),
                  torch.tensor([1.0, math.nan])],
}  # fmt: skip


@pytest.mark.parametrize("name", [*BAD_ARGUMENTS, *LOSS_ARGUMENTS])
def test_bad_arguments_raise_value_errors_that_name_them(name):
    for value in (BAD_ARGUMENTS | LOSS_ARGUMENTS)[name]:
        arguments = GOOD | {"targets": torch.zeros(2), "denominator": 1.0} | {name: value}
        loss_tensors = [arguments.pop(key) for key in ("hidden", "weight", "token_ids", "targets")]
        expected = "weight|hidden" if name == "hidden" else name
        with pytest.raises(ValueError, match=expected):
            squared_log_ratio_loss(*loss_tensors, **arguments)
        if name in LOSS_ARGUMENTS:
            continue
        arguments.pop("denominator")
        with pytest.raises(ValueError, match=expected):
            linear_logprob(*loss_tensors[:3], **arguments)
        bias = arguments.pop("bias")
        hidden, weight, token_ids, _ = loss_tensors
        with pytest.raises(ValueError, match=expected):
            contrastive_logprob(
                hidden, weight, torch.zeros(2, 3), torch.zeros(4, 3), token_ids, 1.4, bias_w=bias, **arguments
            )


def log_prob_sum(hidden, weight, bias):
    return linear_logprob(hidden, weight, torch.tensor([1, 3]), bias=bias).sum()


def loss_of(hidden, weight, bias):
    token_ids, targets = torch.tensor([1, 3]), torch.tensor([-1.0, -2.0])
    return squared_log_ratio_loss(hidden, weight, token_ids, targets, bias=bias, denominator=2.0)[0]


@pytest.mark.parametrize("function", [log_prob_sum, loss_of])
def test_a_tangent_is_refused_and_constants_under_forward_mode_are_not(function):
    leaves = [torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True), torch.randn(4)]
    for place, leaf in enumerate(leaves):

        def of(value, place=place):
            return function(*leaves[:place], value, *leaves[place + 1 :])

        one = leaf.detach()
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(of, (one,), (torch.ones_like(one),))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            of(forward_ad.make_dual(one, torch.ones_like(one)))
    primal, tangent = torch.func.jvp(lambda x: x * function(*leaves), (torch.tensor(2.0),), (torch.tensor(1.0),))
    torch.testing.assert_close(primal, 2.0 * tangent)


def test_the_largest_alpha_gives_finite_targets():
    hidden, weight, token_ids = GOOD["hidden"], GOOD["weight"], torch.zeros_like(GOOD["token_ids"])
    heads = (torch.ones_like(hidden), weight + 1.0, hidden, weight, token_ids)
    for alpha in (MAX_ALPHA, -MAX_ALPHA):
        assert contrastive_logprob(*heads, alpha).isfinite().all()
        assert contrastive_logprob(*heads, torch.full((len(hidden),), alpha)).isfinite().all()
        assert contrastive_logprob_sweep(*heads, alphas=[1.0, alpha]).isfinite().all()


def test_bad_contrast_arguments_raise_value_errors_that_name_them():
    hidden, weight, token_ids = GOOD["hidden"], GOOD["weight"], GOOD["token_ids"]
    heads = (hidden, weight, hidden, weight, token_ids)
    for alpha in (
        math.nan,
        INFINITY,
        "1",
        None,
        True,
        torch.tensor(1.4),
        torch.ones(3),
        torch.ones(2).half(),
        1e300,
        -1e21,
        10**400,
    ):
        with pytest.raises(ValueError, match="alpha"):
            contrastive_logprob(*heads, alpha)
    for alpha in (math.nan, -INFINITY, 1e21, -1e38):
        with pytest.raises(ValueError, match=r"alpha\[1\] is .*, expected a finite number up to ±1e\+20"):
            contrastive_logprob(*heads, torch.tensor([1.0, alpha]))
    for alphas in ([], [1.0, math.nan], [1.0, 1e300], torch.ones(2), "1", None):
        with pytest.raises(ValueError, match="alphas"):
            contrastive_logprob_sweep(*heads, alphas=alphas)
    for name, bad in (
        ("hidden_l", (hidden, weight, torch.zeros(3, 3), weight)),
        ("weight_l", (hidden, weight, hidden, torch.zeros(5, 3))),
        ("hidden_l", (hidden, weight, hidden.double(), weight.double())),
    ):
        with pytest.raises(ValueError, match=name):
            contrastive_logprob(*bad, token_ids, 1.4)


def test_values_are_checked_on_cpu_elsewhere_only_on_request_and_never_under_compile(monkeypatch):
    on_cpu, elsewhere = torch.zeros(1), torch.zeros(1, device="meta")
    monkeypatch.delenv("INVERSEQ_CHECK", raising=False)
    assert checks.should_check_values(on_cpu) and not checks.should_check_values(elsewhere)
    monkeypatch.setenv("INVERSEQ_CHECK", "1")
    assert checks.should_check_values(elsewhere)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not checks.should_check_values(on_cpu) and not checks.should_check_values(elsewhere)


def test_backend_choice_is_torch_on_cpu_and_triton_never_falls_back(monkeypatch):
    problem = oracle.make_problem(2, 3, 4)
    for stem in (backends.CONTRASTIVE, backends.LOGPROB, backends.LOSS):
        assert backends.choose_backend(None, stem, problem.hidden) == "torch"
        with pytest.raises(ValueError, match="float64"):
            backends.choose_backend("triton", stem, problem.hidden.double())
        monkeypatch.setattr(backends, "_INTERPRETED", False)
        with pytest.raises(ValueError, match="backend='triton'"):
            backends.choose_backend("triton", stem, problem.hidden)
        monkeypatch.setattr(backends, "_TRITON_OPS", frozenset())
        with pytest.raises(ValueError, match="triton"):
            backends.choose_backend("triton", stem, problem.hidden)
        monkeypatch.undo()


def test_a_workspace_is_larger_on_a_gpu_unless_it_is_said():
    with FakeTensorMode():
        on_gpu = torch.empty(2, 3, device="cuda")
    assert backends.resolve_workspace(None, on_gpu) == 2 * backends.resolve_workspace(None, torch.empty(2, 3)) == 2**29
    assert backends.resolve_workspace(7, on_gpu) == 7


def test_choices_on_cuda_say_once_when_slower_or_never_verified(monkeypatch):
    with FakeTensorMode():
        double = torch.empty(2, 3, device="cuda", dtype=torch.float64)
        single = torch.empty(2, 3, device="cuda")
        half = torch.empty(2, 3, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    monkeypatch.setattr(backends, "_TRITON_OPS", frozenset({backends.LOSS}))
    monkeypatch.setattr(backends, "NEVER_VERIFIED", frozenset({("triton", "cuda")}))
    with pytest.warns(UserWarning) as record:
        for _ in range(2):
            assert backends.choose_backend(None, backends.LOSS, double) == "torch"
            assert backends.choose_backend(None, backends.LOSS, single) == "triton"
            assert backends.choose_backend(None, backends.LOSS, half) == "triton"
            assert backends.choose_backend("triton", backends.LOSS, single) == "triton"
            assert backends.choose_backend("torch", backends.LOSS, half) == "torch"
            assert backends.choose_backend("triton", backends.LOSS, half) == "triton"
    messages = [str(warning.message) for warning in record]
    assert len(messages) == 2
    assert "slower" in messages[0] and "float64" in messages[0]
    assert "triton backend has never been verified on cuda" in messages[1]


def test_public_names_are_the_documented_ones():
    assert sorted(inverseq_kernels.__all__) == [
        "IGNORE_INDEX",
        "contrastive_logprob",
        "contrastive_logprob_sweep",
        "linear_logprob",
        "squared_log_ratio_loss",
    ]
    assert IGNORE_INDEX == -100
