"""TRL's own trainers on ``linear_logprob``: same losses, metrics and gradients as stock TRL, in less memory."""

import contextlib

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from inverseq.integrations import trl as adapter
from inverseq.integrations import versions
from tests.tiny import make_tiny_model

pytest.importorskip("trl", reason="the extra trl is not installed")
COMMON = {"per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "bf16": False, "max_steps": 1}
WORDS = ("what is true", "help me find water", "explain number one", "how do they make oil")
EVERY_OUTPUT = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
FLOOR = {"loss": 1e-6, "gradient": 1e-6}  # beside twice the error of stock TRL in the same dtype


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("trl") / "model", scale=0.2)


@contextlib.contextmanager
def linear_logprob_inside(active):
    undo = adapter.use_linear_logprob(workspace_bytes=2**20) if active else (lambda: None)
    try:
        yield
    finally:
        undo()


def load(path, dtype, seed=0):
    """The tiny model in bf16 values, held in ``dtype``, moved a little by ``seed``."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter.bfloat16().float())
    return model.to(dtype)


def make_trainer(kind, path, dtype, folder):
    import trl
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(path)
    keywords = {"model": load(path, dtype), "processing_class": tokenizer}
    if kind == "sft":
        rows = [{"prompt": words, "completion": f" {words} and more"} for words in WORDS]
        arguments = trl.SFTConfig(output_dir=str(folder), max_length=64, **COMMON)
        return trl.SFTTrainer(args=arguments, train_dataset=Dataset.from_list(rows), **keywords)
    if kind == "dpo":
        rows = [{"prompt": words, "chosen": " the fact is kind", "rejected": f" no {words}"} for words in WORDS]
        arguments = trl.DPOConfig(output_dir=str(folder), max_length=64, **COMMON)
        keywords["ref_model"] = load(path, dtype, seed=1)
        return trl.DPOTrainer(args=arguments, train_dataset=Dataset.from_list(rows), **keywords)
    arguments = trl.GRPOConfig(
        output_dir=str(folder), num_generations=2, max_completion_length=8, temperature=0.7, beta=0.1, **COMMON
    )
    rewards = lambda completions, **_: [float(len(text)) for text in completions]  # noqa: E731
    rows = [{"prompt": words} for words in WORDS]
    return trl.GRPOTrainer(args=arguments, reward_funcs=rewards, train_dataset=Dataset.from_list(rows), **keywords)


def batch_of(kind, trainer):
    if kind != "grpo":
        return next(iter(trainer.get_train_dataloader()))
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[0, 6:] = mask[2, 4:] = 0

    def numbers():
        return torch.randn(4, 9, generator=generator)

    return {
        "prompt_ids": torch.randint(3, 512, (4, 5), generator=generator),
        "prompt_mask": torch.ones(4, 5, dtype=torch.long),
        "completion_ids": torch.randint(3, 512, (4, 9), generator=generator),
        "completion_mask": mask,
        "advantages": torch.randn(4, generator=generator),
        "ref_per_token_logps": numbers() - 6,
        "old_per_token_logps": numbers() - 6,
        "num_items_in_batch": mask.sum(),
    }


def loss_and_gradients(kind, path, dtype, folder, *, fused):
    """(loss, gradients as one vector, the trainer's own metrics) of one batch."""
    with linear_logprob_inside(fused):
        trainer = make_trainer(kind, path, dtype, folder)
        inputs = batch_of(kind, trainer)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # what Trainer.train sets before its first step
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
    gradients = torch.cat([p.grad.double().flatten() for p in trainer.model.parameters() if p.grad is not None])
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradients, metrics


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_losses_and_gradients_are_those_of_stock_trl(kind, model_path, tmp_path):
    truth, true_gradients, true_metrics = loss_and_gradients(kind, model_path, torch.float32, tmp_path, fused=False)
    stock, stock_gradients, _ = loss_and_gradients(kind, model_path, torch.bfloat16, tmp_path, fused=False)
    ours, our_gradients, our_metrics = loss_and_gradients(kind, model_path, torch.bfloat16, tmp_path, fused=True)
    assert true_gradients.norm() > 1e-3 and stock != truth
    assert abs(ours - truth) <= 2 * abs(stock - truth) + 0.005 * abs(truth)  # the backbone's own bf16 error
    norm = true_gradients.norm()
    error, stock_error = ((g - true_gradients).norm() / norm for g in (our_gradients, stock_gradients))
    assert error <= 2 * stock_error + FLOOR["gradient"]
    exact, exact_gradients, exact_metrics = loss_and_gradients(kind, model_path, torch.float32, tmp_path, fused=True)
    assert exact == pytest.approx(truth, abs=FLOOR["loss"], rel=1e-5)
    assert (exact_gradients - true_gradients).norm() <= 1e-5 * norm
    assert exact_metrics == pytest.approx(true_metrics, rel=1e-4, abs=1e-5) and set(our_metrics) == set(true_metrics)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_head_with_scale_softcap_temperature_and_bias_is_read_as_trl_reads_it(softcap, monkeypatch):
    """Models that TRL's trainers meet beside plain ones: Gemma 2, Cohere, Granite; all its outputs, in small chunks."""
    import trl.trainer.utils as utils

    monkeypatch.setattr(adapter, "METRIC_BYTES", 4 * 40 * 3)  # three rows
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((7, 6), (40, 6), (40,))]
    labels, upstream = torch.arange(7), torch.randn(2, 7, generator=generator)
    labels[0] = (tensors[0][0] @ tensors[1].T + tensors[2]).argmax()
    results = []
    for fused in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        with linear_logprob_inside(fused):
            found = getattr(utils, adapter.NAME).apply(*leaves, labels, 0.7, 16, softcap, 0.5, EVERY_OUTPUT)
        gradients = torch.autograd.grad((found[0] * upstream[0] + found[1] * upstream[1]).sum(), leaves)
        results.append((*found, *gradients))
    assert results[0][4].any() and not results[0][4].all() and all(len(one[2]) == 7 for one in results)
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_autocast_reads_the_hidden_states_in_its_dtype():
    import trl.trainer.utils as utils

    hidden, weight, labels = torch.randn(5, 8), torch.randn(30, 8), torch.arange(5)
    settings = (labels, 1.0, 16, None, 1.0, ("log_probs",))
    with linear_logprob_inside(True):
        apply = getattr(utils, adapter.NAME).apply
        with torch.autocast("cpu", torch.bfloat16):
            found = apply(hidden, weight, None, *settings)[0]
        expected = apply(hidden.bfloat16(), weight, None, *settings)[0]
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_training_step_runs_in_each_trainer_with_generation(model_path, tmp_path):
    with linear_logprob_inside(True):
        trainer = make_trainer("grpo", model_path, torch.float32, tmp_path)
        before = trainer.model.lm_head.weight.detach().clone()
        trainer.train()
    assert trainer.state.global_step == 1
    assert not torch.equal(before, trainer.model.lm_head.weight)


class PeakBytes(TorchDispatchMode):
    """The most bytes of new tensor storage alive at once while operations run."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: item for key, item in self.alive.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def test_the_head_needs_less_memory_than_stock_trl(monkeypatch):
    import trl.trainer.utils as utils

    monkeypatch.setattr(adapter, "METRIC_BYTES", 2**20)

    def peak(fused):
        hidden = torch.randn(1024, 32, requires_grad=True)
        weight = torch.randn(20_000, 32, requires_grad=True)
        labels = torch.randint(0, 20_000, (1024,))
        with linear_logprob_inside(fused), PeakBytes() as mode:
            arguments = (hidden, weight, None, labels, 1.0, 32768, None, 1.0, EVERY_OUTPUT)
            logprobs = getattr(utils, adapter.NAME).apply(*arguments)[0]
            logprobs.sum().backward()
        assert weight.grad.norm() > 0
        return mode.peak

    stock, ours = peak(False), peak(True)
    assert stock >= 1024 * 20_000 * 4  # one chunk of its logits
    assert ours < stock / 64  # a chunk of its own and the weight's gradient


@pytest.mark.parametrize("found", ["1.99.0", "1.17.0.dev0", "1.9.2", "0.24.0"])
def test_another_version_of_trl_gives_one_clear_message(monkeypatch, found):
    monkeypatch.setattr(versions, "version", lambda name: found)
    with pytest.raises(ValueError, match=rf"trl {found}: this adapter was tested with trl >= 1.16, < 1.17"):
        adapter.use_linear_logprob()


def test_a_second_call_is_no_error_and_each_is_undone_alone():
    import trl.trainer.utils as utils

    stock = getattr(utils, adapter.NAME)
    undo_first, first = adapter.use_linear_logprob(), getattr(utils, adapter.NAME)
    undo_second = adapter.use_linear_logprob(workspace_bytes=2**20)
    assert getattr(utils, adapter.NAME).options["workspace_bytes"] == 2**20
    undo_second()
    assert getattr(utils, adapter.NAME) is first
    undo_first()
    assert getattr(utils, adapter.NAME) is stock


def test_a_head_of_trl_with_other_parameters_gives_the_same_message(monkeypatch):
    import trl.trainer.utils as utils

    monkeypatch.delattr(utils, adapter.NAME)
    with pytest.raises(ValueError, match="this adapter was tested with"):
        adapter.use_linear_logprob()
