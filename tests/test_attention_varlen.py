"""The var-len kernels are called as their packages declare: by doubles that compute by definition on a CPU.

flash-attn cannot be installed here, and torch's kernels need CUDA; the tests marked gpu run the real ones.
"""

import inspect
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from inverseq import attention, attention_varlen, sampling_attention
from inverseq.attention import attention_layout
from inverseq.attention_sdpa import sdpa_attention
from inverseq.attention_varlen import Lengths, flash_attn_function, torch_varlen_function, varlen_attention
from tests.attention_oracle import (
    CONFIGS,
    flash_attn_double,
    make_pack,
    packed_hidden,
    random_sequences,
    separate_hidden,
    tiny,
    varlen_doubles,
    with_gradients,
)

INSTALLED = varlen.varlen_attn
DOUBLES = varlen_doubles()
PREFIXED = ([6, 4, 5, 3, 9, 2], [-1, 0, -1, -1, 0, 3])


@pytest.fixture(autouse=True)
def fresh_functions():
    flash_attn_function.cache_clear()
    torch_varlen_function.cache_clear()
    yield
    flash_attn_function.cache_clear()
    torch_varlen_function.cache_clear()


def use(monkeypatch, kernel: str, calls: list | None = None) -> None:
    """Let packed attention on this CPU take ``flash_attn`` or a version of torch's ``varlen_attn``."""
    if kernel == "flash_attn":
        monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_double(calls))
    else:
        monkeypatch.setattr(varlen, "varlen_attn", DOUBLES[kernel])
    monkeypatch.setattr(
        attention, "choose_backend", lambda backend, needs: "flash_attn" if kernel == "flash_attn" else "varlen"
    )


def serves(kernel: str, name: str) -> bool:
    """torch's kernels cannot cap attention logits, and torch 2.10's know no window."""
    return kernel == "flash_attn" or (name != "gemma2-softcap" and (kernel != "2.10" or name in ("llama", "qwen3")))


CASES = [(kernel, name) for kernel in ("flash_attn", *DOUBLES) for name in CONFIGS if serves(kernel, name)]


def test_torchs_double_has_the_signature_of_the_installed_torch():
    installed, double = (inspect.signature(function).parameters for function in (INSTALLED, DOUBLES["2.13"]))
    if torch.__version__.startswith("2.13"):
        assert [(p.name, p.kind, p.default) for p in installed.values()] == [
            (p.name, p.kind, p.default) for p in double.values()
        ]
    assert "window_size" in installed and "return_aux" in installed and "scale" in installed


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("parents", [None, PREFIXED[1]])
def test_the_installed_varlen_attn_takes_our_calls(parents, window):
    """Without a kernel: its shapes for outputs, log-sum-exp and gradients, as its fake implementation states them."""
    layout = attention_layout(make_pack(random_sequences(PREFIXED[0]), parents))
    num_tokens = sum(layout.seqlens_q)
    with FakeTensorMode(allow_non_fake_inputs=True):
        heads = [torch.empty(1, count, num_tokens, 8, requires_grad=True) for count in (4, 2, 2)]
        out = varlen_attention(torch_varlen_function(), *heads, layout, 0.3, window, None)
        assert out.shape == (1, num_tokens, 4, 8)
        gradients = torch.autograd.grad(out.sum(), heads)
        assert [gradient.shape for gradient in gradients] == [head.shape for head in heads]
        with torch.no_grad():
            assert varlen_attention(torch_varlen_function(), *heads, layout, 0.3, window, None).shape == out.shape


@pytest.mark.parametrize(("kernel", "name"), CASES)
def test_outputs_and_gradients_equal_separate_sequences(monkeypatch, kernel, name):
    use(monkeypatch, kernel)
    model, sequences = tiny(name), random_sequences([7, 1, 12, 3])
    expected = separate_hidden(model, sequences)
    gradients = with_gradients(model, expected)
    actual = packed_hidden(model, make_pack(sequences))
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    for gradient, own in zip(with_gradients(model, actual), gradients, strict=True):
        torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-4 * own.abs().max().item())


@pytest.mark.parametrize(("kernel", "name"), CASES)
def test_shared_prefixes_equal_repeating_them(monkeypatch, kernel, name):
    use(monkeypatch, kernel)
    model, (lengths, parents) = tiny(name), PREFIXED
    sequences = random_sequences(lengths)
    expected = [
        separate_hidden(model, [(sequences[parent] if parent >= 0 else []) + own])[-len(own) :]
        for own, parent in zip(sequences, parents, strict=True)
    ]
    with torch.inference_mode():
        actual = packed_hidden(model, make_pack(sequences, parents))
    torch.testing.assert_close(actual, torch.cat(expected).detach(), rtol=2e-5, atol=2e-5)
    under_grad = packed_hidden(model, make_pack(sequences, parents))
    for gradient, own in zip(
        with_gradients(model, under_grad), with_gradients(model, torch.cat(expected)), strict=True
    ):
        torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-4 * own.abs().max().item())


def test_a_prefix_is_attended_in_a_second_part_without_copies_of_its_keys(monkeypatch):
    calls = []
    use(monkeypatch, "flash_attn", calls)
    model, (lengths, parents) = tiny("llama"), PREFIXED
    pack = make_pack(random_sequences(lengths), parents)
    with torch.inference_mode():
        packed_hidden(model, pack)
    own = {"causal": True, "window_size": (-1, -1), "keys": sum(lengths)}
    assert calls == [own, {"causal": False, "window_size": (-1, -1), "keys": 6 + 3}] * 2
    calls.clear()
    packed_hidden(model, pack)  # under grad the keys are repeated: the log-sum-exp has no gradient
    assert calls == [own | {"keys": sum(lengths) + 6 + 6 + 3}] * 2


def test_the_two_parts_of_16_bit_outputs_are_merged_in_float32():
    layout = attention_layout(make_pack(random_sequences([3, 4, 5]), [-1, 0, 0]))
    generator = torch.Generator().manual_seed(4)
    parts = [
        (torch.randn(rows, 2, 8, generator=generator).bfloat16(), torch.randn(2, rows, generator=generator))
        for rows in (12, 9)
    ]
    (own, own_lse), (prefix, prefix_lse) = [(out.double(), lse.double()) for out, lse in parts]
    share = torch.sigmoid(own_lse[:, 3:] - prefix_lse).T[..., None]
    expected = torch.cat([own[:3], share * own[3:] + (1 - share) * prefix])
    calls = iter(parts)
    heads = [torch.zeros(1, 2, 12, 8, dtype=torch.bfloat16)] * 3
    actual = varlen_attention(lambda *args, **kwargs: next(calls), *heads, layout, None, None, None)[0]
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-6)  # one rounding, at the end


def test_windows_are_said_by_the_keys_before_the_querys_own(monkeypatch):
    calls = []
    use(monkeypatch, "flash_attn", calls)
    with torch.inference_mode():
        packed_hidden(tiny("gemma2-softcap"), make_pack(random_sequences([9, 4])))
    assert [call["window_size"] for call in calls] == [(5, 0), (-1, -1)]
    calls.clear()
    with torch.inference_mode():  # a window that no sequence reaches does not keep a prefix from being shared
        packed_hidden(tiny("mistral-window"), make_pack(random_sequences([2, 3, 2]), [-1, 0, 0]))
    assert [call["causal"] for call in calls] == [True, False] * 2


def test_torch_2_10_cannot_serve_a_window_that_is_reached(monkeypatch):
    use(monkeypatch, "2.10")
    model = tiny("mistral-window")
    with torch.no_grad(), pytest.raises(ValueError, match="sliding window 5"):
        packed_hidden(model, make_pack(random_sequences([6])))
    with torch.no_grad():
        packed_hidden(model, make_pack(random_sequences([5])))


@pytest.mark.parametrize("kernel", ["flash_attn", *DOUBLES])
def test_scores_are_scaled_as_the_model_says(monkeypatch, kernel):
    use(monkeypatch, kernel)
    generator = torch.Generator().manual_seed(5)
    heads = [torch.randn(1, count, 9, 8, generator=generator) for count in (4, 2, 2)]
    layout = attention_layout(make_pack(random_sequences([4, 5])))
    actual = attention.packed_attention(torch.nn.Module(), *heads, None, scaling=0.9, layout=layout)[0]
    expected = sdpa_attention(*heads, layout, 0.9, None, None)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", DOUBLES)
def test_keys_of_grouped_heads_are_not_repeated(monkeypatch, version):
    seen = []
    double = DOUBLES[version]

    def kernel(query, key, value, *args, **kwargs):
        seen.append((query.shape[1], key.shape[1], value.shape[1]))
        return double(query, key, value, *args, **kwargs)

    kernel.__signature__ = inspect.signature(double)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    layout = attention_layout(make_pack(random_sequences([4, 5])))
    heads = [torch.randn(1, count, 9, 8) for count in (6, 2, 2)]
    actual = varlen_attention(torch_varlen_function(), *heads, layout, None, None, None)
    torch.testing.assert_close(actual, sdpa_attention(*heads, layout, None, None, None), rtol=1e-5, atol=1e-5)
    assert seen == [(6, 2, 2)]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("kernel", "softcap"), [("2.11", None), ("2.13", None), ("flash_attn", None), ("flash_attn", 0.5)]
)
def test_the_samplers_cuda_path_equals_its_cpu_path(monkeypatch, kernel, softcap, window):
    use(monkeypatch, kernel)
    generator = torch.Generator().manual_seed(6)
    query, key, value = (
        torch.randn(1, count, tokens, 8, generator=generator) for count, tokens in ((4, 6), (2, 14), (2, 14))
    )
    bounds = ([0, 1, 5, 6], [0, 4, 9, 14])
    expected = sampling_attention._per_sequence(query, key, value, bounds, 0.4, window, softcap)
    lengths = Lengths(*(torch.tensor(bound, dtype=torch.int32) for bound in bounds), 4, 5)
    function = flash_attn_function() if kernel == "flash_attn" else torch_varlen_function()
    actual = sampling_attention._varlen(function, (query, key, value), lengths, 0.4, window, softcap)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class SynchronisingOperations(TorchDispatchMode):
    """Collects operations for which the host must wait for a device; tolist and numpy show as resolve_neg."""

    NAMES = ("item", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "resolve_neg")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("parents", [None, [-1, 0, 0]])
def test_a_forward_does_not_wait_for_the_device(monkeypatch, parents):
    use(monkeypatch, "flash_attn")

    def kernel(q, *args, **kwargs):
        return q.clone(), torch.zeros(q.shape[1], q.shape[0]), None

    kernel.__signature__ = inspect.signature(flash_attn_double().flash_attn_varlen_func)
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", kernel)
    model, pack = tiny("llama"), make_pack(random_sequences([4, 5, 6]), parents)
    model.set_attn_implementation(attention.ATTENTION_NAME)
    layout = attention_layout(pack)
    with torch.inference_mode(), SynchronisingOperations() as operations:
        model.get_decoder()(pack.input_ids[None], position_ids=pack.position_ids[None], use_cache=False, layout=layout)
        assert not operations.found
        pack.cu_seqlens.max().item(), pack.cu_seqlens.tolist(), bool(pack.cu_seqlens[0] == 0)
        assert len(operations.found) == 3  # the collector sees what it must


def test_a_package_with_other_arguments_is_refused(monkeypatch):
    module = flash_attn_double()
    module.flash_attn_varlen_func = lambda q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: None
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    with pytest.raises(ValueError, match=r"flash-attn 2\.8\.3: flash_attn_varlen_func does not take dropout_p"):
        flash_attn_function()


def test_a_package_that_cannot_be_imported_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="flash-attn is not installed"):
        flash_attn_function()

    def fail(name):
        raise ImportError("undefined symbol: _ZN3c105ErrorC2E")

    monkeypatch.setattr(attention_varlen.importlib, "import_module", fail)
    with pytest.raises(ValueError, match="cannot be imported: undefined symbol"):
        flash_attn_function()


def test_a_varlen_attn_with_unknown_arguments_is_refused(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, causality: None)
    with pytest.raises(ValueError, match="causality is unknown"):
        torch_varlen_function()


def test_a_log_sum_exp_of_another_shape_is_refused():
    q = torch.zeros(5, 2, 8)
    assert attention_varlen.checked_lse(torch.zeros(2, 5), q).shape == (2, 5)
    assert attention_varlen.checked_lse(torch.zeros(5, 2), q).shape == (2, 5)
    with pytest.raises(ValueError, match=r"\(1, 2, 7\).*share_prefix=false"):
        attention_varlen.checked_lse(torch.zeros(1, 2, 7), q)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attn", "varlen", "flex"])
@pytest.mark.parametrize("parents", [None, PREFIXED[1]])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 2.0)])
def test_real_kernels_equal_sdpa_in_fp32(backend, parents, window, softcap):
    if backend == "varlen" and softcap:
        pytest.skip("torch's varlen_attn cannot cap attention logits")
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    pack = make_pack(random_sequences(PREFIXED[0]), parents)
    generator = torch.Generator().manual_seed(3)
    heads = [torch.randn(1, h, pack.num_tokens, 64, generator=generator) for h in (4, 2, 2)]
    upstream = torch.randn(1, pack.num_tokens, 4, 64, generator=generator).cuda()

    def run(name, dtype):
        inputs = [x.to("cuda", dtype).requires_grad_() for x in heads]
        layout = attention_layout(pack.to("cuda"), name)
        options = {"layout": layout, "sliding_window": window, "softcap": softcap}
        with torch.no_grad():
            forward = attention.packed_attention(torch.nn.Module(), *inputs, None, **options)[0]
        out = attention.packed_attention(torch.nn.Module(), *inputs, None, **options)[0]
        return [forward, out, *torch.autograd.grad((out.float() * upstream).sum(), inputs)]

    for actual, expected in zip(run(backend, torch.bfloat16), run("sdpa", torch.float32), strict=True):
        torch.testing.assert_close(actual.float(), expected, rtol=3e-2, atol=3e-2)
