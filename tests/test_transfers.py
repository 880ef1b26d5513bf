"""The host runs ahead of the device: copies and results overlap the work, and a step reads the device once.

Meta tensors have no values, so every operation that would make the host wait for a CUDA device raises on them.
"""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import inverseq.transfers as transfers
from inverseq import attention
from inverseq.attention_varlen import torch_varlen_function
from inverseq.config import Config, EngineConfig, ModelConfig, OptimConfig, PackingConfig
from inverseq.engine import TorchEngine, accumulate
from inverseq.model import FrozenPair, enable_gradient_checkpointing, load_model
from inverseq.packing import write_pack
from inverseq.policy import Policy
from inverseq.records import ScoredSamples
from inverseq.steps import plan_steps
from inverseq.targets import ScoringPacks, _contrast_models, _contrast_views
from inverseq.transfers import copied_ahead, copied_to, keep_together, read_behind
from tests.tiny import make_tiny_model
from tests.tiny_samples import make_samples

OPTIM = OptimConfig(samples_per_step=4)


class Record:
    """Something with a tensor that tells when it is copied."""

    def __init__(self, index, events):
        self.index, self.events = index, events

    def to(self, device):
        self.events.append(f"copied {self.index}")
        return self

    def device_tensors(self):
        return [SimpleNamespace(record_stream=lambda stream: self.events.append(f"kept for {stream.name}"))]


@pytest.fixture
def streams(monkeypatch):
    """Doubles of CUDA's streams; what happens, in order."""
    events = []

    class Stream:
        def __init__(self, device=None, name="copies"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} wait for {other.name}")

        def record_event(self):
            index = sum("launched" in event for event in events) - 1
            return SimpleNamespace(synchronize=lambda: events.append(f"waited for {index}"))

        def __enter__(self):
            events.append(f"on {self.name}")

        def __exit__(self, *_):
            events.append(f"off {self.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name="computes"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return events


def test_on_cuda_a_copy_is_made_beside_the_work_launched_before_it(streams):
    for there, here in copied_ahead([Record(0, streams), Record(1, streams)], torch.device("cuda")):
        assert there is here
        streams.append(f"launched {here.index}")
    each = ["on copies", "copied {}", "off copies", "computes wait for copies", "kept for computes", "launched {}"]
    assert streams == [event.format(index) for index in (0, 1) for event in each]


def test_on_cuda_a_result_is_waited_for_when_the_next_work_has_been_launched(streams):
    def launch():
        for index in range(3):
            streams.append(f"launched {index}")
            yield index, [torch.tensor([index])]

    found = list(read_behind(launch(), torch.device("cuda")))
    assert [(key, tensor.item()) for key, (tensor,) in found] == [(0, 0), (1, 1), (2, 2)]
    assert streams == ["launched 0", "launched 1", "waited for 0", "launched 2", "waited for 1", "waited for 2"]
    streams.clear()
    on_cpu = read_behind(launch(), torch.device("cpu"))
    assert next(on_cpu)[0] == 0 and streams == ["launched 0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_tiny_model(tmp_path_factory.mktemp("model"), scale=0.3)
    return load_model(path, ModelConfig(path="tiny", device="cpu", dtype="bfloat16"))


def first_step(model):
    samples = make_samples(4)
    offsets = np.cumsum([0, *(sample.num_actions for sample in samples)])
    logprobs = torch.linspace(-3, 0, int(offsets[-1]))
    step = plan_steps(ScoredSamples(samples, logprobs, logprobs, offsets), OPTIM, PackingConfig(train_tokens=40))[0]
    assert len(step.micro_batches) > 1
    return step


def make_engine(model, device):
    return TorchEngine(Policy(copy.deepcopy(model).to(device), 512, EngineConfig()), OPTIM, total_updates=10)


@pytest.mark.parametrize("initial", [False, True])
def test_all_that_goes_to_the_device_is_kept_until_the_work_has_read_it(model, initial):
    batch = first_step(model).micro_batches[0]
    batch = dataclasses.replace(batch, initial_logprobs=batch.targets if initial else None)
    for record in (batch, ScoringPacks((batch.pack, batch.pack))):
        moved = record.to("meta")
        owners = [moved, *(moved.packs if record is not batch else [moved.pack])]
        values = [getattr(owner, item.name) for owner in owners for item in dataclasses.fields(owner)]
        there = [value for value in values if isinstance(value, torch.Tensor) and value.device.type == "meta"]
        assert {id(tensor) for tensor in moved.device_tensors()} == {id(tensor) for tensor in there}
        assert len(there) == (6 + 3 + initial if record is batch else 2 * 6)


@pytest.fixture(params=["sdpa", "varlen"])
def backend(request, monkeypatch):
    """What serves on a CPU, and what serves on CUDA, whose kernel knows the shapes of meta tensors."""
    torch_varlen_function()
    monkeypatch.setattr(attention, "choose_backend", lambda asked, needs: request.param)


@pytest.fixture
def reads(monkeypatch):
    """How often a whole tensor was read from the device; nothing else can be."""
    seen, tolist = [], torch.Tensor.tolist

    def read(tensor):
        if tensor.device.type != "meta":
            return tolist(tensor)
        seen.append(tuple(tensor.shape))
        return [1.0] * tensor.numel()

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    return seen


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_reads_the_device_once(model, backend, reads, recompute):
    engine = make_engine(model, "meta")
    if recompute:
        enable_gradient_checkpointing(engine.policy.model)
    step = first_step(model)
    accumulate(step, engine.device, engine.policy, engine._backward)
    assert reads == []
    metrics = engine.train_step(step)
    assert len(reads) == 1 and metrics.grad_norm == 1.0


def test_reading_a_value_of_a_micro_batch_is_seen(model):
    engine = make_engine(model, "meta")
    policy = engine.policy.forward
    engine.policy.forward = lambda pack, targets, *rest: policy(pack, targets[targets < 0], *rest)
    with pytest.raises(NotImplementedError, match="meta"):
        accumulate(first_step(model), engine.device, engine.policy, engine._backward)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_scoring_a_pack_reads_nothing(model, backend, share_prefix):
    frozen = FrozenPair(*[copy.deepcopy(model).to("meta")] * 2)
    samples, config = make_samples(4), Config(model=ModelConfig(path="tiny"), run_dir="unused")
    for sample in samples:
        object.__setattr__(sample.rendered, "prefix_ids", samples[0].rendered.prefix_ids)
    both = write_pack(samples, range(4), (0, 1), share_prefix=share_prefix).to("meta")
    plain = write_pack(samples, range(4), (1,)).to("meta")
    with torch.inference_mode():
        assert _contrast_views(frozen, [both], config, 512)[0].shape == (both.num_actions,)
        assert _contrast_models(frozen, [both, plain], config, 512)[1].shape == (both.num_actions,)


@pytest.mark.gpu
def test_a_step_on_cuda_synchronises_at_its_end_only(model):
    engine, step = make_engine(model, "cuda"), first_step(model)
    engine.train_step(step)  # compiles, tunes and fills the caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        accumulate(step, engine.device, engine.policy, engine._backward)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_weights_that_are_kept_together_stay_the_same_and_fill_their_blocks(monkeypatch):
    monkeypatch.setattr(transfers, "BLOCK_BYTES", 4096)
    generator = torch.Generator().manual_seed(0)
    sizes = [(7, 5), (100,), (33, 9), (2000,), (1,), (0,), (64, 8)]
    dtypes = [torch.float32, torch.bfloat16] * 4
    weights = [
        torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype))
        for size, dtype in zip(sizes, dtypes, strict=False)
    ]
    before = [weight.detach().clone() for weight in weights]
    keep_together(weights, pin_memory=False)
    for weight, values in zip(weights, before, strict=True):
        assert torch.equal(weight.data, values) and weight.dtype == values.dtype and weight.is_contiguous()
        assert (weight.data_ptr() - weight.untyped_storage().data_ptr()) % transfers.ALIGNMENT == 0 or not len(values)
    blocks = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
    assert sorted(blocks.values()) == [4096] * 3  # 140 + 200 + 1188, then 4000 + 4, then 2048
    weights[0].data.fill_(7.0)
    assert all(torch.equal(weight.data, values) for weight, values in zip(weights[1:], before[1:], strict=True))


def test_a_block_is_filled_to_its_end_and_a_larger_weight_has_one_of_its_own(monkeypatch):
    monkeypatch.setattr(transfers, "BLOCK_BYTES", 4096)
    sizes = (10, 1008, 1500, 20)  # 64 + 4032, 6016 and 128 bytes
    weights = [torch.nn.Parameter(torch.full((size,), float(size))) for size in sizes]
    keep_together(weights, pin_memory=False)
    assert [weight.untyped_storage().nbytes() for weight in weights] == [4096, 4096, 6016, 4096]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 3
    assert [weight.unique().tolist() for weight in weights] == [[float(size)] for size in sizes]


def test_blocks_are_pinned_where_that_is_asked_for(monkeypatch):
    asked, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory=False, **kwargs: asked.append(pin_memory) or empty(*size, **kwargs)
    )
    for pin_memory in (False, True):
        asked.clear()
        keep_together([torch.nn.Parameter(torch.ones(3))], pin_memory=pin_memory)
        assert asked[-1] is pin_memory


def test_a_copy_to_cuda_goes_through_pinned_memory_and_is_not_waited_for():
    def tensor(name, **more):
        return SimpleNamespace(to=lambda device, non_blocking: (name, device, non_blocking), **more)

    pageable = tensor("pageable", is_cuda=False, pin_memory=lambda: tensor("pinned"))
    assert copied_to(pageable, "cuda") == ("pinned", "cuda", True)
    assert copied_to(tensor("there", is_cuda=True), "cuda")[0] == "there"
    assert copied_to(pageable, torch.device("cpu"))[0] == "pageable"
