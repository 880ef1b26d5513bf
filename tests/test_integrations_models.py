"""The adapters for plain training loops: the module of log-probabilities and the Trainer's loss function."""

import copy

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    Trainer,
    TrainingArguments,
)

from inverseq.integrations import causal_lm, hf_trainer
from inverseq.integrations.causal_lm import CausalLMLogprobs, head_keywords
from inverseq.integrations.hf_trainer import NextTokenLoss
from tests.tiny import make_tiny_model

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make_model(name, tmp_path):
    torch.manual_seed(0)
    if name == "llama":
        return AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model", scale=0.2), dtype=torch.float32)
    if name == "granite":
        return GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0))
    if name == "cohere":
        return CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25))
    if name == "hyperclovax":  # multiplies by what Granite divides by
        return HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**SHAPE, logits_scaling=0.25))
    if name == "recurrent gemma":
        shape = {**SHAPE, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16}
        return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**shape, logits_soft_cap=1.0))
    if name == "phi":
        model = PhiForCausalLM(PhiConfig(**SHAPE))
        nn.init.normal_(model.lm_head.bias)
        return model
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0))


def make_batch(vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (3, 11), generator=generator)
    labels = ids.clone()
    labels[0, :4] = labels[1, 8:] = labels[2] = -100
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def stock_logprobs(model, batch, temperature):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    logprobs = (logits / temperature).log_softmax(-1)
    labels = batch["labels"][:, 1:]
    picked = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return picked.where(labels != -100, 0.0), entropy.where(labels != -100, 0.0)


@pytest.mark.parametrize("name", ["llama", "granite", "cohere", "hyperclovax", "gemma2", "phi", "recurrent gemma"])
def test_logprobs_entropies_and_gradients_are_those_of_the_models_own_logits(name, tmp_path):
    model = make_model(name, tmp_path)
    batch = make_batch(model.config.vocab_size)
    module = CausalLMLogprobs(copy.deepcopy(model), temperature=0.7, return_entropy=True)
    upstream = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(1))
    expected, got = stock_logprobs(model, batch, 0.7), module(**batch)
    for one, two, grad in zip(expected, got, upstream, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-5)
        (one * grad).sum().backward(retain_graph=True)
        (two * grad).sum().backward(retain_graph=True)
    for (label, one), two in zip(model.named_parameters(), module.model.parameters(), strict=True):
        torch.testing.assert_close(
            one.grad, two.grad, atol=2e-4, rtol=1e-4, msg=lambda text, label=label: f"{label}: {text}"
        )
    assert (got[0][2] == 0).all()  # a sequence without labels


def test_autocast_reads_the_head_in_its_dtype_and_grads_stay_fp32(tmp_path, monkeypatch):
    model = make_model("llama", tmp_path)
    batch, module, read = make_batch(512), CausalLMLogprobs(copy.deepcopy(model)), []
    truth = stock_logprobs(model, batch, 1.0)[0].detach()

    def spy(hidden, *rest, real=causal_lm.linear_logprob, **options):
        read.append(hidden.dtype)
        return real(hidden, *rest, **options)

    monkeypatch.setattr(causal_lm, "linear_logprob", spy)
    with torch.autocast("cpu", torch.bfloat16):
        ours, stock = module(**batch), stock_logprobs(model, batch, 1.0)[0]
    assert ours.dtype == torch.float32 and read == [torch.bfloat16]
    assert (ours - truth).norm() <= 2 * (stock - truth).norm()
    ours.sum().backward()
    assert module.model.lm_head.weight.grad.dtype == torch.float32


def test_a_float64_model_has_float64_logprobs(tmp_path):
    model, batch = make_model("llama", tmp_path).double(), make_batch(512)
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].where(labels != -100, 0.0)
    module = CausalLMLogprobs(model)
    for autocast in (False, True):  # which leaves float64 alone
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.testing.assert_close(module(**batch), expected, atol=1e-10, rtol=0)


@pytest.fixture
def one_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded_by_layer(module):
    """FSDP2 as users apply it: each layer, then the rest with the tied head."""
    for layer in module.model.model.layers:
        fully_shard(layer)
    return fully_shard(module)


def recomputing(module):
    module.model.gradient_checkpointing_enable({"use_reentrant": False})
    return module.train()


WRAPPERS = {
    "recomputed": recomputing,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "DDP": nn.parallel.DistributedDataParallel,
    "DDP that looks for unused": lambda module: nn.parallel.DistributedDataParallel(
        module, find_unused_parameters=True
    ),
    "FSDP2": sharded_by_layer,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_module_may_be_wrapped_and_have_nothing_to_score(name, tmp_path, one_process_group):
    model, batch = make_model("llama", tmp_path), make_batch(512)
    module = CausalLMLogprobs(copy.deepcopy(model))
    wrapped = WRAPPERS[name](module)
    wrapped(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).sum().backward()
    gradients = [parameter.grad for parameter in module.model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in map(whole, gradients))
    logprobs, expected = wrapped(**batch), stock_logprobs(model, batch, 1.0)[0]
    torch.testing.assert_close(logprobs, expected, atol=2e-5, rtol=1e-5)
    logprobs.square().sum().backward()
    expected.square().sum().backward()
    for one, two in zip(model.parameters(), module.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, whole(two.grad), atol=2e-4, rtol=1e-3)


def whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def test_a_model_that_is_sharded_inside_of_the_module_is_named(tmp_path, one_process_group):
    module = CausalLMLogprobs(fully_shard(make_model("llama", tmp_path)))
    with pytest.raises(ValueError, match="wrap the CausalLMLogprobs, not the model inside"):
        module(**make_batch(512))


def test_sequences_of_one_token_have_nothing_to_score(tmp_path):
    model = make_model("llama", tmp_path)
    ids = torch.tensor([[5]])
    logprobs, entropy = CausalLMLogprobs(model, return_entropy=True)(ids, ids)
    assert logprobs.shape == entropy.shape == (1, 0)
    logprobs.sum().backward()
    loss = NextTokenLoss(model)
    for labels, training in ((ids, True), (ids, False), (torch.full((1, 4), -100), True)):
        found = loss(model.train(training)(labels.clamp(min=5)), labels)
        assert found == 0
        found.backward()


def test_a_model_whose_logits_are_not_hidden_states_times_its_head_is_refused(tmp_path):
    bert = BertLMHeadModel(BertConfig(**SHAPE, is_decoder=True))  # a layer stands between decoder and head
    with pytest.raises(ValueError, match="BertLMHeadModel: hidden states times the output embedding differ"):
        CausalLMLogprobs(bert)
    mine = make_model("llama", tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        CausalLMLogprobs(mine.to(dtype))
    NextTokenLoss(mine)
    assert not any(module._forward_hooks for module in mine.modules())  # those of the check would keep hidden states
    other = make_model("llama", tmp_path)
    other.lm_head.register_forward_hook(lambda module, inputs, logits: 1.01 * logits)
    with pytest.raises(ValueError, match="differ from the model's own logits"):
        CausalLMLogprobs(other)
    mine = make_model("llama", tmp_path).bfloat16()
    mine.lm_head.register_forward_hook(lambda module, inputs, logits: 1.1 * logits)
    for adapter in (CausalLMLogprobs, NextTokenLoss):
        with pytest.raises(ValueError, match="LlamaForCausalLM: hidden states times the output embedding differ"):
            adapter(mine)


def test_adapters_beside_the_head_are_read_and_those_on_it_refused(tmp_path):
    peft, batch = pytest.importorskip("peft"), make_batch(512)
    for refused in (
        peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ):
        for adapter in (CausalLMLogprobs, NextTokenLoss):
            with pytest.raises(ValueError, match="an adapter on the output embedding|from the model's own logits"):
                adapter(peft.get_peft_model(make_model("llama", tmp_path), refused))
    for saved in (None, ["lm_head"]):
        config = peft.LoraConfig(
            target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(make_model("llama", tmp_path), config)
        expected = stock_logprobs(model, batch, 1.0)[0]
        torch.testing.assert_close(CausalLMLogprobs(model)(**batch), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lm_head_multiplier", "output_multiplier"])
def test_a_configuration_with_an_unknown_scale_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0.5 is not supported"):
        head_keywords(CohereConfig(**{name: 0.5}))


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"])
def test_a_softcap_stands_outside_of_the_scale(name):
    """3 tanh(s z / 3) = s · 12 tanh(z / 12) for s = 1/4, whatever a family calls the 3."""
    assert head_keywords(CohereConfig(**{name: 3.0, "logit_scale": 0.25})) == {"softcap": 12.0, "temperature": 4.0}


def train(model, folder, loss=None, **options):
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(*make_rows(), strict=True)]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3,
        learning_rate=1e-2, report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", seed=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, compute_loss_func=loss)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, trainer.evaluate()["eval_loss"]


def make_rows():
    batch = make_batch(96)
    labels = batch["labels"].clone()
    labels[2, 5:] = batch["input_ids"][2, 5:]
    return batch["input_ids"].repeat(4, 1), labels.repeat(4, 1)


@pytest.mark.parametrize("name", ["granite", "cohere"])
def test_the_trainer_takes_the_same_steps_with_the_fused_loss(name, tmp_path):
    stock, ours = make_model(name, tmp_path), make_model(name, tmp_path)
    expected, expected_eval = train(stock, tmp_path / "stock")
    losses, eval_loss = train(ours, tmp_path / "ours", NextTokenLoss(ours))
    assert losses == pytest.approx(expected, rel=1e-4) and losses[0] > 1.1 * losses[-1]
    assert eval_loss == pytest.approx(expected_eval, rel=1e-4)
    for one, two in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-3)


def test_logits_are_real_again_outside_of_training(tmp_path):
    model = make_model("llama", tmp_path)
    ids = make_batch(512)["input_ids"]
    expected = model.eval()(ids).logits
    loss = NextTokenLoss(model)
    torch.testing.assert_close(model(ids).logits, expected)
    assert model.train()(ids).logits.shape[-1] == model.config.hidden_size
    reference = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss(model(ids), ids).item() == pytest.approx(reference.item(), rel=1e-5)
    outputs = model.bfloat16().eval()(ids)  # whose sum over tokens would be bf16 too
    reference = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    assert loss(outputs, ids).item() == pytest.approx(reference.item(), rel=1e-5)


def test_a_model_in_training_mode_generates_what_it_did_before(tmp_path):
    model, ids = make_model("llama", tmp_path), make_batch(512)["input_ids"][:1]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    NextTokenLoss(model)
    assert torch.equal(model.train().generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_under_autocast_the_head_is_read_in_its_dtype_though_accelerate_gives_fp32(tmp_path, monkeypatch):
    model, ids, read = make_model("llama", tmp_path).train(), make_batch(512)["input_ids"], []
    exact = model(ids, labels=ids).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        stock = model(ids, labels=ids).loss.item()
    loss, real = NextTokenLoss(model), hf_trainer.linear_logprob

    def spy(hidden, *rest, **options):
        read.append(hidden)
        return real(hidden, *rest, **options)

    monkeypatch.setattr(hf_trainer, "linear_logprob", spy)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = convert_outputs_to_fp32(model)(ids)
    assert outputs.logits.dtype == torch.float32
    found = loss(outputs, ids)
    assert [hidden.dtype for hidden in read] == [torch.bfloat16]
    assert abs(found.item() - exact) <= 2 * abs(stock - exact) + 1e-4
    found.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_the_bias_of_a_head_is_scaled_as_the_model_scales_it(tmp_path):
    model = make_model("granite", tmp_path).train()
    model.lm_head = nn.Linear(32, 96, bias=True)
    nn.init.normal_(model.lm_head.bias)
    stock, batch = copy.deepcopy(model), make_batch(96)
    stock(**batch).loss.backward()
    labels = batch.pop("labels")
    loss = NextTokenLoss(model)(model(**batch), labels)
    assert loss.item() == pytest.approx(stock(**batch, labels=labels).loss.item(), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(model.lm_head.bias.grad, stock.lm_head.bias.grad, atol=1e-5, rtol=1e-4)


def test_a_model_that_caps_its_logits_is_refused_by_the_trainers_loss(tmp_path):
    with pytest.raises(ValueError, match="wrap it in CausalLMLogprobs"):
        NextTokenLoss(make_model("gemma2", tmp_path))
