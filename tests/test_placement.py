"""The planner takes the cheapest placement that fits, explains itself, and refuses what cannot fit."""

import dataclasses
import logging

import pytest
from safetensors.torch import save_file
from transformers import LlamaConfig

from inverseq.config_loading import load_config
from inverseq.distributed import Ranks
from inverseq.memory import GIB, Hardware, Job, estimate_memory, model_size, needed_bytes, peak_of_phases
from inverseq.placement import (
    candidates,
    check_fits,
    parse_hardware,
    place_run,
    plan_placement,
    problem_of,
    smallest_hardware,
)
from inverseq.resolve import resolve
from tests.tiny import make_tiny_model

LLAMA_7B = model_size(LlamaConfig())
LLAMA_13B = model_size(
    LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    )
)
SMOLLM2 = model_size(
    LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
)
RECIPES = {LLAMA_7B: "vicuna-7b", LLAMA_13B: "vicuna-13b", SMOLLM2: "demo"}


def job(size, hardware, *overrides, checkpointing="auto", plain=None):
    recipe = "zephyr-7b-beta" if plain else RECIPES[size]
    config = load_config(recipe, overrides)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, gradient_checkpointing=checkpointing))
    if isinstance(hardware, str):
        hardware, world_size = parse_hardware(hardware)
    else:
        world_size = hardware.ranks_per_host
    return Job(config, size, plain, 2 if hardware.device_type == "cuda" else 4, 1024, hardware, world_size)


def cpu(gib, ranks=1):
    return Hardware("a CPU", "cpu", int(gib * GIB), int(gib * GIB), ranks)


def choice(job):
    placement = plan_placement(job)
    assert problem_of(job, placement) is None
    offload = placement.offload_optimizer + placement.offload_parameters
    return placement.zero_stage, offload, placement.frozen, placement.gradient_checkpointing


def test_llama_2_7b_on_eight_80_gb_gpus_needs_zero_2_and_nothing_else():
    assert choice(job(LLAMA_7B, "8x80GB")) == (2, 0, "replicated", False)


def test_frozen_models_stay_on_every_rank_rather_than_zero_1():
    """ZeRO-1 with the frozen model on the host would fit as well: no gain, for a transfer in every epoch."""
    asked = job(LLAMA_7B, "8xA800")
    assert choice(asked) == (2, 0, "replicated", False)
    lower = dataclasses.replace(plan_placement(asked), zero_stage=1, frozen="host")
    assert needed_bytes(estimate_memory(asked, lower), "cuda") <= asked.hardware.usable_bytes
    beside = dataclasses.replace(lower, frozen="replicated")
    assert needed_bytes(estimate_memory(asked, beside), "cuda") > asked.hardware.usable_bytes


def test_llama_2_13b_on_eight_80_gb_gpus_recomputes_and_shards_its_frozen_model():
    asked = job(LLAMA_13B, "8x80GB")
    assert choice(asked) == (2, 0, "sharded", True)
    # ZeRO-3 with the frozen model on the host would do without recomputation, by 0.9 GiB more than there is.
    without = dataclasses.replace(plan_placement(asked), zero_stage=3, frozen="host", gradient_checkpointing=False)
    assert "69.7 of 68.8 GiB" in problem_of(asked, without)


def test_llama_2_7b_on_one_80_gb_gpu_keeps_its_optimizer_on_the_host():
    assert choice(job(LLAMA_7B, "1x80GB+256GB")) == (2, 1, "host", False)  # its fp32 gradients stay on the GPU
    small_host = job(LLAMA_7B, "1x80GB+128GB")
    problem = problem_of(small_host, plan_placement(small_host))
    assert "take 2 such GPUs" in problem
    keys = ["engine.offload_optimizer=cpu", "engine.frozen=host"]
    asked = job(LLAMA_7B, "1x80GB+128GB", *keys)
    placement = dataclasses.replace(plan_placement(asked), zero_stage=2, offload_parameters=False)
    assert "143.0 of the host's 119.2 GiB" in problem_of(asked, placement)


def test_the_ranks_of_a_host_share_its_memory():
    keys = ["engine.frozen=host", "engine.offload_optimizer=none", "engine.zero_stage=2"]
    asked = job(LLAMA_7B, "8x80GB+64GB", *keys)
    assert "100.4 of the host's 59.6 GiB" in problem_of(asked, plan_placement(asked))  # a whole copy for each of 8
    assert choice(job(LLAMA_7B, "8x80GB+128GB", *keys)) == (2, 0, "host", False)


def test_the_small_model_runs_whole_on_a_cpu_and_on_one_gpu():
    assert choice(job(SMOLLM2, cpu(16))) == choice(job(SMOLLM2, "1x24GB")) == (0, 0, "replicated", False)
    assert choice(job(SMOLLM2, cpu(32, ranks=2))) == (1, 0, "replicated", False)


def test_two_frozen_models_are_sharded_where_they_do_not_fit_twice():
    assert choice(job(LLAMA_7B, "8x80GB", plain=LLAMA_7B)) == (2, 0, "sharded", False)


def test_adapters_on_many_gpus_hold_the_base_once_a_rank_and_their_optimizer_over_the_ranks():
    asked = job(LLAMA_7B, "8x80GB", "policy.lora.rank=64")
    assert choice(asked) == (1, 0, "replicated", False)
    assert choice(job(LLAMA_13B, "8x80GB", "policy.lora.rank=64")) == (1, 0, "replicated", False)
    parts = {part.name: part.num_bytes for part in estimate_memory(asked, plan_placement(asked))}
    assert parts["adapters"] == parts["gradients as they are reduced"] == 2 * 159_907_840
    assert parts["fp32 master weights"] == parts["AdamW moments"] / 2 == 4 * 159_907_840 / 8
    assert parts["policy weights"] == 2 * LLAMA_7B.num_parameters and "frozen model" not in parts
    assert choice(job(LLAMA_7B, "8x80GB", "policy.lora.rank=64", "engine.zero_stage=2"))[0] == 2
    assert choice(job(LLAMA_7B, "1x80GB", "policy.lora.rank=64", "engine.kind=deepspeed"))[0] == 1
    too_small = job(LLAMA_13B, "8x24GB", "policy.lora.rank=64")
    assert problem_of(too_small, plan_placement(too_small)) is not None
    assert {plan.zero_stage for plan in candidates(too_small)} == {1, 2}


def test_adapters_hold_the_base_once():
    asked = job(LLAMA_7B, "1x40GB", "policy.lora.rank=64")
    assert choice(asked) == (0, 0, "replicated", True)
    assert choice(job(LLAMA_7B, "1x80GB", "policy.lora.rank=64")) == (0, 0, "replicated", False)
    parts = {part.name: part.num_bytes for part in estimate_memory(asked, plan_placement(asked))}
    num_adapters = 159_907_840  # what peft counts for Llama-2-7B at rank 64 on all linear layers
    assert parts["adapters"] == parts["gradients"] == parts["AdamW moments"] / 2 == 4 * num_adapters
    assert "frozen model" not in parts and "fp32 master weights" not in parts
    assert parts["policy weights"] == 2 * LLAMA_7B.num_parameters
    both = job(LLAMA_7B, "1x80GB", "policy.lora.rank=64", plain=LLAMA_7B)
    parts = {part.name: part.num_bytes for part in estimate_memory(both, plan_placement(both))}
    assert "frozen model" not in parts and parts["frozen plain model"] == 2 * LLAMA_7B.num_parameters
    # π_l is not moved to the host for it
    assert choice(job(LLAMA_7B, "1x48GB", "policy.lora.rank=64", plain=LLAMA_7B)) == (0, 0, "replicated", True)


@pytest.mark.parametrize("hardware", ["8x80GB", "2x80GB", "1x80GB", "4x40GB", "16x24GB"])
@pytest.mark.parametrize("size", [LLAMA_7B, LLAMA_13B], ids=["7b", "13b"])
def test_the_chosen_placement_fits_and_the_next_lower_stage_would_not(size, hardware):
    asked = job(size, hardware)
    chosen = plan_placement(asked)
    if problem_of(asked, chosen):
        return
    needed = needed_bytes(estimate_memory(asked, chosen), "cuda")
    assert needed <= asked.hardware.usable_bytes
    lowest = 2 if chosen.offload_optimizer else min(1, asked.world_size - 1)
    for stage in range(lowest, chosen.zero_stage):
        for frozen in ("replicated", "sharded", "host"):
            lower = dataclasses.replace(chosen, zero_stage=stage, frozen=frozen, offload_parameters=False)
            assert problem_of(asked, lower) is not None


def test_what_the_configuration_sets_stays():
    keys = [
        "engine.zero_stage=3",
        "engine.offload_optimizer=cpu",
        "engine.offload_parameters=cpu",
        "engine.frozen=host",
    ]
    placement = plan_placement(job(LLAMA_7B, "8x80GB", *keys, checkpointing=True))
    assert placement.offload_optimizer and placement.offload_parameters and placement.gradient_checkpointing
    assert (placement.zero_stage, placement.frozen) == (3, "host")
    assert all(reason.endswith("(set)") for reason in placement.reasons)
    assert plan_placement(job(LLAMA_7B, "8x80GB", "engine.zero_stage=3", checkpointing=True)).zero_stage == 3
    for keys in (["engine.offload_parameters=cpu"], ["engine.offload_parameters=cpu", "engine.offload_optimizer=none"]):
        placement = plan_placement(job(LLAMA_7B, "8x80GB", *keys))
        assert (placement.zero_stage, placement.offload_parameters, placement.offload_optimizer) == (3, True, False)


def test_the_plain_engine_is_never_given_what_needs_deepspeed():
    placement = plan_placement(job(LLAMA_7B, "1x80GB", "engine.kind=torch"))
    assert (placement.zero_stage, placement.offload_optimizer, placement.offload_parameters) == (0, False, False)
    assert plan_placement(job(SMOLLM2, cpu(16), "engine.kind=deepspeed")).zero_stage == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.offload_parameters=cpu", "engine.zero_stage=2"], "engine.offload_parameters='cpu'.*zero_stage=3"),
        (["engine.offload_optimizer=cpu", "engine.zero_stage=0"], "engine.offload_optimizer='cpu'.*not 0"),
        (["engine.kind=torch", "engine.zero_stage=2"], "engine.zero_stage='2': needs DeepSpeed"),
        (["engine.kind=torch", "engine.offload_optimizer=cpu"], "engine.offload_optimizer='cpu': needs DeepSpeed"),
        (["engine.kind=torch", "engine.frozen=sharded"], "engine.frozen='sharded': needs DeepSpeed"),
        (["policy.lora.rank=8", "engine.zero_stage=3"], "engine.zero_stage='3': expected auto.*policy.lora.rank=8"),
        (["policy.lora.rank=8", "engine.offload_optimizer=cpu"], "engine.offload_optimizer='cpu': expected auto.*lora"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        plan_placement(job(LLAMA_7B, "8x80GB", *overrides))


def test_every_choice_says_what_the_cheaper_one_would_need():
    reasons = "\n".join(plan_placement(job(LLAMA_13B, "8x80GB")).reasons)
    assert "engine.zero_stage=2, as 1 would need 118.2 of 68.8 GiB" in reasons
    assert "engine.frozen=sharded, as replicated would need" in reasons
    assert "model.gradient_checkpointing=true, as false would need" in reasons
    assert "engine.offload_optimizer=none\n" in reasons
    reasons = plan_placement(job(LLAMA_7B, "4x40GB")).reasons
    assert "engine.zero_stage=3, as 2 would need 45.8 of 33.4 GiB" in reasons  # and not 1, which would need more


def test_a_problem_names_the_key_that_helps():
    asked = job(LLAMA_13B, "8x80GB", "engine.offload_optimizer=none", checkpointing=False)
    problem = problem_of(asked, plan_placement(asked))
    assert "69.7 of 68.8 GiB on 8x80GB with 8 ranks; set engine.offload_optimizer=auto, or set" in problem
    assert "set model.gradient_checkpointing=auto" in problem and "engine.zero_stage" not in problem


def test_a_set_stage_that_does_not_fit_is_offered_the_planners():
    asked = job(LLAMA_7B, "8x80GB", "engine.zero_stage=1", "engine.offload_optimizer=none", checkpointing=False)
    assert "set engine.zero_stage=auto" in problem_of(asked, plan_placement(asked))
    assert choice(job(LLAMA_7B, "8x80GB", "engine.offload_optimizer=none", checkpointing=False))[0] == 2


def test_a_smaller_pack_is_offered_where_activations_are_the_problem():
    asked = job(LLAMA_7B, "8x80GB", "packing.train_tokens=32768", checkpointing=False)
    asked = dataclasses.replace(
        asked,
        config=dataclasses.replace(asked.config, engine=load_config("demo", ["engine.offload_optimizer=none"]).engine),
    )
    problem = problem_of(asked, plan_placement(asked))
    assert "set packing.train_tokens=8192" in problem and "set model.gradient_checkpointing=auto" in problem


def test_a_pack_that_is_offered_holds_the_longest_sample():
    asked = job(LLAMA_7B, "8x40GB", "packing.train_tokens=8000", checkpointing=False)
    longest = asked.longest_prompt + asked.config.sampling.max_new_tokens - 1
    assert longest == 2047 and "set packing.train_tokens=2047 " in problem_of(asked, plan_placement(asked))
    keys = (
        "packing.score_tokens=400000",
        "packing.train_tokens=32768",
        "engine.kind=torch",
        "engine.frozen=replicated",
    )
    asked = job(SMOLLM2, Hardware("small", "cuda", 8 * GIB, None), *keys, checkpointing=True)
    asked = dataclasses.replace(asked, longest_prompt=30000)
    longest = 30000 + asked.config.sampling.max_new_tokens - 1
    assert f"set packing.score_tokens={4 * longest} " in problem_of(asked, plan_placement(asked))


def test_a_gpu_run_that_cannot_fit_is_refused_and_one_at_the_margin_is_not():
    asked = job(LLAMA_7B, "1x80GB", "engine.kind=torch")
    with pytest.raises(
        ValueError, match=r"the estimate does not fit: 116.* of 68.8 GiB on 1x80GB with 1 rank; take \d"
    ):
        check_fits(asked, plan_placement(asked))
    needed = needed_bytes(estimate_memory(asked, plan_placement(asked)), "cuda")
    margin = dataclasses.replace(asked, hardware=Hardware("edge", "cuda", needed + GIB, None))
    assert problem_of(margin, plan_placement(margin)) is not None
    check_fits(margin, plan_placement(margin))  # within the card, beyond what a plan may fill: a warning


def test_a_cpu_run_is_refused_only_when_weights_and_optimizer_alone_exceed_the_machine():
    kept = 12 * SMOLLM2.num_parameters / GIB
    tight = job(SMOLLM2, cpu(kept * 1.01))
    assert problem_of(tight, plan_placement(tight)) is not None
    check_fits(tight, plan_placement(tight))
    small = job(SMOLLM2, cpu(kept * 0.99))
    with pytest.raises(ValueError, match="the estimate does not fit"):
        check_fits(small, plan_placement(small))


@pytest.mark.parametrize("text", ["A800", "8x", "0x80GB", "8x0GB", "8x80", "8xT4", "8x80GB+", "8x80GB+1TB", "-1x80GB"])
def test_hardware_that_is_not_understood_is_refused(text):
    with pytest.raises(ValueError, match="--hardware .*: expected for example 8xA800"):
        parse_hardware(text)


def test_hardware_is_read_as_ranks_with_memory():
    hardware, ranks = parse_hardware("16x80GB+1000GB")
    assert (ranks, hardware.ranks_per_host, hardware.device_bytes, hardware.host_bytes) == (16, 8, 80 * 10**9, 10**12)
    assert parse_hardware("1xh100")[0].device_bytes == int(79.1 * GIB)


def test_the_estimate_that_is_logged_beside_the_measured_training_includes_the_update():
    keys = ["engine.zero_stage=1", "engine.offload_optimizer=none", "engine.frozen=host"]
    asked = job(LLAMA_13B, "8x80GB", *keys, checkpointing=True)
    placement = plan_placement(asked)
    peaks = peak_of_phases(estimate_memory(asked, placement))
    assert peaks["update"] > peaks["train"]  # all gradients once more, as they are reduced
    assert placement.phase_bytes["train"] == peaks["update"] and "update" not in placement.phase_bytes


def test_ranks_on_unequal_machines_plan_for_the_smallest():
    a, b = Hardware("a", "cuda", 80, 1000, ranks_per_host=8), Hardware("b", "cuda", 79, 600, ranks_per_host=4)
    for machines in ([a, b], [b, a]):
        found = smallest_hardware(machines)
        assert (found.device_bytes, found.host_bytes, found.ranks_per_host) == (79, 1000, 8)  # 125 and 150 a rank
    one, other = cpu(16, ranks=2), cpu(12, ranks=1)
    assert smallest_hardware([one, one, other]).rank_bytes == 8 * GIB
    assert smallest_hardware([a]) == a and smallest_hardware([one]) == one


def test_a_real_run_is_placed_and_logged_or_refused_before_weights_are_read(tmp_path, caplog, monkeypatch):
    model = make_tiny_model(tmp_path / "tiny")
    save_file({}, model / "model.safetensors")  # whoever reads the weights fails
    overrides = [f"model.path={model}", f"run_dir={tmp_path / 'run'}", "model.device=cpu"]
    caplog.set_level(logging.INFO, logger="inverseq")
    placement = place_run(resolve(load_config("demo", overrides)))
    assert placement.zero_stage == 0 and placement.phase_bytes["train"] > placement.phase_bytes["sample"]
    assert "placement: engine.zero_stage=0" in caplog.messages
    monkeypatch.setattr("inverseq.placement.available_bytes", lambda device_type: 2**20)
    with pytest.raises(ValueError, match="the estimate does not fit"):
        place_run(resolve(load_config("demo", overrides)))


def test_all_ranks_are_placed_for_the_smallest_of_their_machines_and_share_its_memory(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    told = []

    class Second(Ranks):
        def gather(self, value):
            told.append(value)
            return [dataclasses.replace(value, **first), value]

    overrides = [f"model.path={make_tiny_model(tmp_path / 'tiny')}", f"run_dir={tmp_path}/run", "model.device=cpu"]
    resolved, first = resolve(load_config("demo", overrides)), {}
    place_run(resolved, Second(rank=1, world_size=2))
    first = {"device_bytes": 2**20, "host_bytes": 2**20}
    with pytest.raises(ValueError, match="the estimate does not fit"):
        place_run(resolved, Second(rank=1, world_size=2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    first = {}
    place_run(resolved, Second(rank=1, world_size=2))
    assert [machine.ranks_per_host for machine in told] == [2, 2, 1]
