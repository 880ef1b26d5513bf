"""The memory table: its formulas are compared with what PyTorch really keeps."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from inverseq import memory
from inverseq.attention import ATTENTION_NAME, attention_layout
from inverseq.config import LoraConfig
from inverseq.config_loading import load_config
from inverseq.lora import add_adapters
from inverseq.memory import (
    PHASES,
    Hardware,
    Job,
    Placement,
    activation_bytes_per_token,
    adapter_parameters,
    available_bytes,
    estimate_memory,
    host_bytes_of,
    model_size,
    needed_bytes,
    peak_of_phases,
)
from inverseq.memory_zero import pinned_bytes
from inverseq.packing import pack_views
from tests.tiny import make_tiny_model
from tests.tiny_samples import make_samples
from tests.zero_memory_job import Live

LLAMA_7B = LlamaConfig()
GIB = 2**30


def sizes_of(parts):
    return {part.name: part.num_bytes for part in parts}


WHOLE = Placement(0, False, False, "replicated", gradient_checkpointing=True)


def hardware_of(device_type, **options):
    return Hardware("test", device_type, device_bytes=2**60, host_bytes=None, **options)


def estimate(config, policy, plain=None, weight_bytes=2, device_type="cuda", placement=WHOLE, world_size=1):
    job = Job(config, policy, plain, weight_bytes, 1000, hardware_of(device_type), world_size)
    return estimate_memory(job, placement)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_weights_and_tied_ones_once(tmp_path, tied):
    path = make_tiny_model(tmp_path / "m", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(path)
    size = model_size(AutoConfig.from_pretrained(path))
    assert size.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (size.num_layers, size.hidden, size.intermediate, size.vocab) == (2, 64, 128, 512)
    assert (size.query_width, size.key_value_width) == (64, 32)


def kept_bytes(model, pack):
    """Bytes of distinct storages, weights aside, that autograd keeps between a forward and its backward."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_decoder()(
            input_ids=pack.input_ids[None],
            position_ids=pack.position_ids[None],
            use_cache=False,
            layout=attention_layout(pack),
        )
    return sum(num_bytes for num_bytes, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_activation_formula_is_what_autograd_keeps(tmp_path, dtype, checkpointing):
    path = make_tiny_model(tmp_path / "m", layers=6)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION_NAME).train()
    [pack] = pack_views(make_samples(6, longest=60), (-1,), token_budget=1024)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    size = model_size(model.config)
    per_token = activation_bytes_per_token(size, dtype.itemsize, checkpointing=checkpointing)
    measured = kept_bytes(model, pack) / pack.num_tokens
    if checkpointing:  # the one layer that is recomputed is not kept by the forward
        per_token -= activation_bytes_per_token(size, dtype.itemsize, checkpointing=False) / 6
    assert per_token == pytest.approx(measured, rel=0.1 if not checkpointing else 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_of_a_scoring_pack_is_the_most_that_a_forward_holds(tmp_path, dtype):
    path = make_tiny_model(tmp_path / "m", layers=3)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION_NAME).eval()
    [pack] = pack_views(make_samples(6, longest=60), (-1,), token_budget=1024)
    layout = attention_layout(pack)
    live = Live()
    with torch.inference_mode(), live:
        model.get_decoder()(pack.input_ids[None], position_ids=pack.position_ids[None], use_cache=False, layout=layout)
    config = load_config("demo", [f"packing.score_tokens={pack.num_tokens}"])
    found = sizes_of(estimate(config, model_size(model.config), weight_bytes=dtype.itemsize))
    assert found["activations, scoring pack"] == pytest.approx(live.peak, rel=0.06)


def test_a_7b_model_in_bf16_takes_what_is_published_for_it():
    policy = model_size(LLAMA_7B)
    assert policy.num_parameters == 6_738_415_616
    found = sizes_of(estimate(load_config("vicuna-7b"), policy))
    assert found["policy weights"] == found["frozen model"] == pytest.approx(12.55 * GIB, rel=1e-3)
    assert found["fp32 master weights"] == found["gradients"] == pytest.approx(25.10 * GIB, rel=1e-3)
    assert found["AdamW moments"] == pytest.approx(50.21 * GIB, rel=1e-3)
    assert found["gradient of one weight"] == 2 * 32000 * 4096
    assert found["head gradient accumulator"] == 32000 * 4096 * 4
    assert found["keys and values, sampling"] == 64 * 2024 * 32 * 2 * 4096 * 2  # half a MiB a token
    assert found["workspace of the operations"] == 512 * 2**20


def test_fp32_weights_are_their_own_masters_and_accumulate_in_place():
    found = sizes_of(estimate(load_config("vicuna-7b"), model_size(LLAMA_7B), weight_bytes=4, device_type="cpu"))
    assert "fp32 master weights" not in found and "head gradient accumulator" not in found
    assert found["workspace of the operations"] == 256 * 2**20


def test_the_model_contrast_holds_a_second_frozen_model():
    policy = model_size(LLAMA_7B)
    plain = model_size(LlamaConfig(num_hidden_layers=16))
    found = sizes_of(estimate(load_config("zephyr-7b-beta"), policy, plain))
    assert found["frozen plain model"] == plain.num_parameters * 2
    assert "frozen plain model" not in sizes_of(estimate(load_config("vicuna-7b"), policy))


def test_a_phase_holds_the_parts_that_name_it_and_the_largest_phase_decides():
    parts = estimate(load_config("vicuna-7b"), model_size(LLAMA_7B))
    totals = peak_of_phases(parts)
    by_name = {part.name: part for part in parts}
    assert by_name["gradients"].phases == ("train", "update")
    for phase in PHASES:
        assert totals[phase] == sum(part.num_bytes for part in parts if phase in part.phases)
    assert needed_bytes(parts, "cpu") == max(totals.values()) == totals["sample"]
    assert needed_bytes(parts, "cuda") == totals["train"]  # the cache takes what is free there


def test_a_replayed_run_has_no_cache_and_a_set_workspace_is_taken():
    config = load_config("demo", ["sampling.backend=replay", "sampling.replay_path=x", "engine.workspace_mib=64"])
    found = sizes_of(estimate(config, model_size(LLAMA_7B)))
    assert "keys and values, sampling" not in found
    assert found["workspace of the operations"] == 64 * 2**20


def test_zero_divides_what_its_stage_says_among_the_ranks():
    """The shares of the ZeRO paper, table 1: 16-bit weights, fp32 masters and moments, and fp32 gradients."""
    config, policy, n = load_config("vicuna-7b"), model_size(LLAMA_7B), 8
    count = policy.num_parameters
    largest = 4096 * 32000
    whole, divided = 1, n
    shares = {1: (whole, divided, whole), 2: (whole, divided, divided), 3: (divided, divided, divided)}
    for stage, (weights, optimizer, gradients) in shares.items():
        placement = Placement(stage, False, False, "replicated", True)
        found = sizes_of(estimate(config, policy, placement=placement, world_size=n))
        assert found["policy weights"] == pytest.approx(2 * count / weights, rel=1e-6)
        assert found["fp32 master weights"] == pytest.approx(4 * count / optimizer, rel=1e-6)
        assert found["AdamW moments"] == pytest.approx(8 * count / optimizer, rel=1e-6)
        assert found["gradients"] == pytest.approx(4 * count / gradients, rel=1e-6)
        assert found["gradient of one weight"] == (2 * largest if stage == 3 else (2 + 4) * largest)
        assert ("gathered layers" in found) == ("whole copy of the policy" in found) == (stage == 3)
        assert found["frozen model"] == 2 * count
    fp32 = sizes_of(estimate(config, policy, weight_bytes=4, placement=placement, world_size=n, device_type="cpu"))
    assert fp32["fp32 master weights"] == pytest.approx(4 * count / n, rel=1e-6)  # apart from the weights


def test_layers_are_gathered_where_they_are_not_whole_and_the_policy_once_more_for_the_sampler():
    config, size = load_config("vicuna-7b"), model_size(LLAMA_7B)

    def parts(offload, world_size):
        placement = Placement(3, offload, offload, "replicated", True)
        return sizes_of(estimate(config, size, placement=placement, world_size=world_size))

    gathered = 2 * (10**9 + 32000 * 4096 + 5 * 10**7 + 32000 * 4096)
    for found in (parts(False, 8), parts(True, 8), parts(True, 1)):
        assert found["gathered layers"] == gathered
    assert "gathered layers" not in parts(False, 1)
    for found in (parts(False, 1), parts(True, 8)):
        assert found["whole copy of the policy"] == 2 * size.num_parameters
        assert found["buffers of its gathering"] == 2 * 2 * 2**28  # one is filled, and copied out of another


def test_what_is_sharded_is_read_one_weight_after_the_other_and_never_stands_whole():
    config, size = load_config("zephyr-7b-beta"), model_size(LLAMA_7B)
    largest = 2 * 4096 * 32000
    for stage, frozen in ((3, "sharded"), (3, "replicated"), (2, "sharded"), (2, "replicated")):
        parts = estimate(config, size, size, placement=Placement(stage, False, False, frozen, True), world_size=8)
        kept = sum(part.num_bytes for part in parts if part.phases == PHASES)
        reading = 2 * largest if stage == 3 or frozen == "sharded" else 0
        assert peak_of_phases(parts)["load"] == kept + reading
    # Frozen models for the host pass through the GPU, but for a copy of a policy that stands there.
    for stage, num_loaded in ((3, 2), (2, 1)):
        parts = estimate(config, size, size, placement=Placement(stage, False, False, "host", True), world_size=8)
        loaded = [part.num_bytes for part in parts if part.name.startswith("frozen") and part.phases[0] == "load"]
        assert loaded.count(2 * size.num_parameters) - 2 == num_loaded  # two more are their homes on the host


def test_frozen_models_are_whole_divided_or_on_the_gpu_for_scoring_only():
    config, size = load_config("zephyr-7b-beta"), model_size(LLAMA_7B)

    def parts(frozen, **options):
        return estimate(config, size, size, placement=Placement(2, False, False, frozen, True), world_size=8, **options)

    whole, divided, away = (peak_of_phases(parts(frozen)) for frozen in ("replicated", "sharded", "host"))
    both = 2 * 2 * size.num_parameters
    assert whole["train"] - divided["train"] == pytest.approx(both * 7 / 8, abs=8)
    assert whole["train"] - away["train"] == both and whole["score"] == away["score"]
    assert host_bytes_of(parts("host")) == both and host_bytes_of(parts("replicated")) == 0
    assert host_bytes_of(parts("host", device_type="cpu")) == 0  # a CPU's memory is the host's


def test_offload_moves_the_optimizer_and_then_the_weights_to_the_host():
    config, size = load_config("vicuna-7b"), model_size(LLAMA_7B)
    count = size.num_parameters
    optimizer = estimate(config, size, placement=Placement(2, True, False, "replicated", True))
    # Pinned memory is taken in powers of two: masters, gradients, 16-bit weights and one weight's gradient.
    pinned = [pinned_bytes(size) for size in (4 * count, 4 * count, 2 * count, 2 * 4096 * 32000)]
    assert pinned == [2**35, 2**35, 2**34, 2**28]
    assert host_bytes_of(optimizer) == sum(pinned) + 8 * count
    on_gpu = sizes_of([part for part in optimizer if not part.on_host])
    assert on_gpu["gradients"] == 4 * count  # DeepSpeed sums in fp32 on the GPU all the same
    assert "policy weights" in sizes_of([part for part in optimizer if not part.on_host])
    everything = estimate(config, size, placement=Placement(3, True, True, "replicated", True))
    # Two sets of gradients are pinned: one whole, and one in sub-groups of 1e9 weights, six and a rest.
    assert host_bytes_of(everything) == (2 + 4 + 8) * count + 2**35 + 6 * 2**32 + 2**32
    assert "gradients" not in sizes_of(everything)
    on_cpu = estimate(config, size, placement=Placement(3, True, True, "replicated", True), device_type="cpu")
    assert host_bytes_of(on_cpu) == 0


def test_on_a_gpu_the_samplers_cache_takes_what_is_free():
    config, size = load_config("vicuna-7b"), model_size(LLAMA_7B)
    hardware = Hardware("test", "cuda", device_bytes=160 * GIB, host_bytes=None)
    job = Job(config, size, None, 2, 1000, hardware)
    found = peak_of_phases(estimate_memory(job, WHOLE))
    assert found["sample"] == hardware.usable_bytes == int(160 * GIB * 0.95) - 2 * GIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_counted_and_keep_what_the_formula_says(tmp_path, dtype):
    path = make_tiny_model(tmp_path / "m", layers=4)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION_NAME).train()
    add_adapters(model, LoraConfig(rank=4), seed=0)
    size = model_size(AutoConfig.from_pretrained(path))
    assert adapter_parameters(size, LoraConfig(rank=4)) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    [pack] = pack_views(make_samples(6, longest=60), (-1,), token_budget=1024)
    estimated = activation_bytes_per_token(size, dtype.itemsize, checkpointing=False)
    # On a 16-bit base the fp32 adapters keep fp32 copies of their inputs, which the estimate leaves out.
    tolerance = 0.2 if dtype == torch.float32 else 0.35
    assert estimated == pytest.approx(kept_bytes(model, pack) / pack.num_tokens, rel=tolerance)


def test_the_ranks_of_a_host_share_a_cpus_memory_and_have_a_gpu_each():
    assert Hardware("c", "cpu", 64 * GIB, 64 * GIB, ranks_per_host=4).usable_bytes == 16 * GIB
    assert Hardware("g", "cuda", 64 * GIB, 64 * GIB, ranks_per_host=4).rank_bytes == 64 * GIB


def test_a_rank_samples_its_share_of_an_epoch_together():
    config, size = load_config("vicuna-7b"), model_size(LLAMA_7B)
    assert (config.sampling.samples_per_epoch, config.sampling.batch_size) == (500, 64)
    for world_size, together in ((1, 64), (8, 63), (500, 1), (1000, 1)):
        found = sizes_of(estimate(config, size, world_size=world_size))
        assert found["keys and values, sampling"] == together * 2024 * 32 * 2 * 4096 * 2


def test_adapters_give_the_head_no_gradient():
    config, size = load_config("vicuna-7b", ["policy.lora.rank=8"]), model_size(LLAMA_7B)
    assert "head gradient accumulator" not in sizes_of(estimate(config, size))


def test_an_engine_of_its_own_holds_a_copy_of_the_policy_on_each_gpu():
    config, size = load_config("vicuna-7b"), model_size(LLAMA_7B)
    apart = replace(config, sampling=replace(config.sampling, backend="lmdeploy"))
    found = sizes_of(estimate(apart, size))
    assert found["weights of LMDeploy"] == found["weights of LMDeploy, host"] == 2 * size.num_parameters
    assert "weights of LMDeploy" not in sizes_of(estimate(config, size))
    sharded = sizes_of(estimate(apart, size, placement=Placement(3, False, False, "replicated", True), world_size=8))
    assert sharded["whole copy of the policy"] == sharded["weights of LMDeploy"]  # gathered, and still there


def test_scoring_while_sampling_is_counted_in_both_phases():
    size = model_size(LLAMA_7B)
    away = Placement(2, False, False, "host", True)
    apart = load_config("vicuna-7b")
    both = replace(apart, sampling=replace(apart.sampling, overlap=True))
    for config, phases in ((apart, ("score",)), (both, ("sample", "score"))):
        parts = {part.name: part for part in estimate(config, size, placement=away, world_size=8)}
        assert parts["frozen model"].phases == parts["activations, scoring pack"].phases == phases


def test_the_memory_of_a_gpu_is_what_it_has_and_not_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10, 80))
    assert available_bytes("cuda") == 80


def test_the_machines_memory_is_known_and_a_containers_limit_below_it_counts(tmp_path, monkeypatch):
    assert 2**28 < available_bytes("cpu") < 2**50
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTAINER_LIMITS", (limit, tmp_path / "absent"))
    physical = available_bytes("cpu")
    for text, expected in (("max\n", physical), (f"{2**29}\n", 2**29), (f"{2**62}\n", physical)):
        limit.write_text(text)
        assert available_bytes("cpu") == expected
