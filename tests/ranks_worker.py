"""Runs one job after the other in the processes of one torchrun: starting them is what costs.

``python -m tests.ranks_worker JOBS`` with JOBS a JSON list of {"name", "action", "overrides", …}. Rank 0 writes NAME.ok
beside JOBS, or every rank that raised NAME.error.RANK; a job that raises without meaning to ends all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.logging import disable_progress_bar

from inverseq import run_state, trainer
from inverseq.config import Config
from inverseq.config_loading import load_config
from inverseq.distributed import Ranks, init_ranks
from inverseq.engine import NonFiniteError
from inverseq.model import load_model
from inverseq.resolve import resolve
from inverseq.run_state import State, build_state
from inverseq.sample_files import read_samples, samples_path
from inverseq.steps import plan_steps
from inverseq.zero_loading import load_sharded
from tests.ranks_jobs import cut_back
from tests.zero_memory_job import Live


def train(config: Config, ranks: Ranks, job: dict) -> None:
    trainer.train_ranks(config, ranks, resume=False)


def resume(config: Config, ranks: Ranks, job: dict) -> None:
    """Go on from a copy of another run's first checkpoints."""
    if ranks.is_main:
        cut_back(Path(job["copy"]), Path(config.run_dir), num_epochs=job["num_epochs"])
    ranks.barrier()
    trainer.train_ranks(config, ranks, resume=True)


def one_process(config: Config, ranks: Ranks, job: dict) -> None:
    """``resume`` by the command in one process, while the ranks wait."""
    if ranks.is_main:
        cut_back(Path(job["copy"]), Path(config.run_dir), num_epochs=job["num_epochs"])
        launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in launched}
        command = [sys.executable, "-m", "inverseq.cli", "--config", "demo", "--resume", *job["overrides"]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    ranks.barrier()


def state_of(config: Config, ranks: Ranks, job: dict) -> tuple[State, list]:
    """A run before its first step, and the steps of the epoch that another run has sampled."""
    state = build_state(resolve(config), ranks)
    scored = read_samples(samples_path(job["samples_of"], 1))
    return state, plan_steps(scored, config.optim, config.packing, num_ranks=ranks.world_size, rank=ranks.rank)


def in_bfloat16(config: Config) -> Config:
    return replace(config, model=replace(config.model, dtype="bfloat16"))


def weights_of(state: State) -> list[torch.Tensor]:
    weights = [weight.clone() for weight in state.engine.full_model().parameters()]
    state.engine.release_full_model()
    return weights


def no_16_bit_gradient_stays(config: Config, ranks: Ranks, job: dict) -> None:
    """ZeRO-1 sums gradients in fp32 and drops each; the update is made from the sums."""
    state, steps = state_of(in_bfloat16(config), ranks, job)
    before, left = weights_of(state), []
    weights = [weight for weight in state.policy.parameters() if weight.requires_grad]
    for weight in weights:  # behind DeepSpeed's own hook
        weight.register_post_accumulate_grad_hook(lambda _: left.append(sum(w.grad is not None for w in weights)))
    state.engine.train_step(steps[0])
    assert left == [0] * len(weights) * len(steps[0].micro_batches)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights_of(state), strict=True))


def not_a_number_on_one_rank(config: Config, ranks: Ranks, job: dict) -> None:
    """Rank 1 spoils its loss, then only its gradient: no rank updates and all raise."""
    state, steps = state_of(config, ranks, job)
    before = weights_of(state)
    state.engine.train_step(steps[0])
    after_one = weights_of(state)
    assert any(not torch.equal(a, b) for a, b in zip(before, after_one, strict=True))
    good = steps[0].micro_batches[0].targets.clone()
    for spoil in ("loss", "gradient"):
        if ranks.rank == 1 and spoil == "loss":
            steps[0].micro_batches[0].targets[0] = float("nan")
        if ranks.rank == 1 and spoil == "gradient":
            norm = state.policy.model.get_decoder().norm
            norm.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * float("inf"),))
        try:
            state.engine.train_step(steps[0])
        except NonFiniteError as error:
            assert "optimizer step 2" in str(error)
        else:
            raise AssertionError(f"a spoilt {spoil} was trained on")
        steps[0].micro_batches[0].targets.copy_(good)
        assert all(torch.equal(a, b) for a, b in zip(after_one, weights_of(state), strict=True)), spoil
        assert state.engine.num_updates == 1


def not_a_number_in_bfloat16(config: Config, ranks: Ranks, job: dict) -> None:
    """The same by DeepSpeed's other optimizers, which look for it only when they are told to."""
    not_a_number_on_one_rank(in_bfloat16(config), ranks, job)


def nothing_else_is_partitioned(config: Config, ranks: Ranks, job: dict) -> None:
    """Beside a policy under ZeRO-3 the frozen model and a model that is loaded later are whole on every rank."""
    state, _ = state_of(config, ranks, job)
    assert all(weight.numel() == 0 for weight in state.policy.model.get_decoder().layers[0].mlp.parameters())
    later = load_model(config.model.path, config.model)
    for model in (state.frozen.better, later, state.engine.full_model()):
        shapes = [tuple(weight.shape) for weight in model.parameters()]
        assert shapes == [tuple(weight.ds_shape) for weight in state.policy.model.parameters()]
    state.engine.release_full_model()
    assert all(weight.numel() == 0 for weight in state.engine.plain_copy.parameters())


def a_step_trains_and_log_probs_do_not(config: Config, ranks: Ranks, job: dict) -> None:
    """Recomputed activations and dropout are of the steps alone, whatever ran before."""
    state, steps = state_of(config, ranks, job)
    probe, modes = state.resolved.probe_pack(), []
    state.policy.model.get_decoder().register_forward_pre_hook(lambda module, _: modes.append(module.training))
    state.engine.logprobs(probe)
    state.engine.train_step(steps[0])
    state.engine.logprobs(probe)
    assert modes == [False, *[True] * len(steps[0].micro_batches), False], modes
    assert not any(module.training for module in state.engine.full_model().modules())
    state.engine.release_full_model()


def no_rank_holds_a_whole_model(config: Config, ranks: Ranks, job: dict) -> None:
    """What is sharded as it is read is what ``load_model`` reads: weights, buffers, other dtypes, names of an export.

    Beside its parts a rank makes two copies of one weight and what it takes to look for infinities in it. Rank 0 maps
    the file, whose pages are no copy.
    """
    import deepspeed

    for name in job["models"]:
        path, model_config = Path(config.model.path).parent / name, replace(config.model, dtype=job["dtype"])
        whole = load_model(path, model_config)
        with Live() as live, pytest.MonkeyPatch.context() as patched:
            # As transformers 5.17, which makes rotary frequencies in the weights' dtype.
            patched.setattr("transformers.modeling_utils.prevent_arange_dtype_change", nullcontext, raising=False)
            model = load_sharded(path, model_config, ranks=ranks)
        for part, expected in zip(tensors_of(model), tensors_of(whole), strict=True):
            with deepspeed.zero.GatheredParameters([part[1]]):
                assert part[0] == expected[0] and torch.equal(part[1], expected[1]), (name, part[0])
                assert part[1].dtype == expected[1].dtype, (name, part[0])
        assert model.generation_config.to_dict() == whole.generation_config.to_dict()
        ties = [each.get_input_embeddings().weight is each.get_output_embeddings().weight for each in (model, whole)]
        assert ties[0] == ties[1], name
        sizes = [weight.nbytes for weight in whole.parameters()]
        mine, mapped = sum(sizes) / ranks.world_size, (path / "model.safetensors").stat().st_size * ranks.is_main
        assert mine <= live.total < 1.1 * mine, (name, live.total, mine)
        assert live.peak - mapped < 1.1 * mine + 4.5 * max(sizes), (name, live.peak, mine)
        assert name != "deep" or live.peak - mapped < 0.8 * sum(sizes)
        if ranks.is_main:
            saved = [revert_weight_conversion(each, dict(whole.state_dict())) for each in (model, whole)]
            assert saved[0].keys() == saved[1].keys(), name
        ranks.barrier()


def tensors_of(model) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def a_run_that_shards_everything_loads_nothing_whole(config: Config, ranks: Ranks, job: dict) -> None:
    """Policy and frozen model are read as parts, and the head of what nobody has whole is checked all the same."""
    config = replace(config, engine=replace(config.engine, frozen="sharded"))

    def load_wrongly(*arguments, **options):
        model = load_sharded(*arguments, **options)
        model.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
        return model

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_state, "load_model", None)
        state, _ = state_of(config, ranks, job)
        for model in (state.policy.model, state.frozen.better):
            assert not any(layer.mlp.up_proj.weight.numel() for layer in model.get_decoder().layers)
        patched.setattr(run_state, "load_sharded", load_wrongly)
        with pytest.raises(ValueError, match="this architecture's head is not supported"):
            build_state(resolve(config), ranks)


def damaged_weights_are_refused_by_all(config: Config, ranks: Ranks, job: dict) -> None:
    """Only rank 0 reads values and compares shapes; no rank is left waiting."""
    name, folder = "model.layers.1.mlp.up_proj.weight", Path(config.model.path).with_name("damaged")
    damages = {
        "missing or of another shape: " + name: lambda weights: weights.pop(name),
        "size mismatch for lm_head.weight": lambda weights: weights.update({"lm_head.weight": torch.zeros(512, 32)}),
        "not finite": lambda weights: weights[name].view(-1)[7:8].fill_(float("nan")),
    }
    for said, damage in damages.items():
        if ranks.is_main:
            shutil.copytree(config.model.path, folder, dirs_exist_ok=True)
            weights = load_file(folder / "model.safetensors")
            damage(weights)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        ranks.barrier()
        try:
            load_sharded(folder, config.model, ranks=ranks)
        except ValueError as error:
            assert said in str(error) and str(folder) in str(error), error
        else:
            raise AssertionError(f"{said}: was not noticed")
        ranks.barrier()
    whole = load_model(config.model.path, config.model)  # and a failure leaves nothing that shards what comes next
    assert all(weight.numel() for weight in whole.parameters())


def a_damaged_part_is_found_by_all(config: Config, ranks: Ranks, job: dict) -> None:
    """Each rank checks some files of a checkpoint; all name the one that is bad before anything is loaded."""
    run_dir = Path(config.run_dir)
    if ranks.is_main:
        cut_back(Path(job["copy"]), run_dir, num_epochs=2)
        for part in (run_dir / "checkpoints/epoch_0002").glob("state_0001_*"):
            content = bytearray(part.read_bytes())
            content[len(content) // 2] ^= 1
            part.write_bytes(content)
    ranks.barrier()
    try:
        resolve(config, resume=True, ranks=ranks)
    except ValueError as error:
        assert "state_0001_000.safetensors: corrupt" in str(error) and "epoch_0001 is complete" in str(error), error
    else:
        raise AssertionError("the damage was not found")


def a_wrong_copy_is_noticed(config: Config, ranks: Ranks, job: dict) -> None:
    """A gathered copy that is not the trained model stops the run before anything is sampled from it."""
    state, _ = state_of(config, ranks, job)
    gathered = state.engine.zero.GatheredParameters

    for factor in (1.5, float("nan")):

        class Stale(gathered):
            def __enter__(self, factor=factor):
                super().__enter__()
                self.params[0].data.mul_(factor)

        state.engine.zero.GatheredParameters = Stale
        try:
            state.engine.full_model()
        except RuntimeError as error:
            assert "not the trained ones" in str(error)
        else:
            raise AssertionError(f"the copy was taken: {factor}")
        finally:
            state.engine.zero.GatheredParameters = gathered


def main(path: Path) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    jobs = json.loads(path.read_text())
    ranks = init_ranks(load_config("demo", jobs[0]["overrides"]))
    with ranks.failing_together():
        for job in jobs:
            try:
                globals()[job["action"]](load_config("demo", job["overrides"]), ranks, job)
            except Exception:
                (path.parent / f"{job['name']}.error.{ranks.rank}").write_text(traceback.format_exc())
                raise
            if ranks.is_main:
                (path.parent / f"{job['name']}.ok").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
