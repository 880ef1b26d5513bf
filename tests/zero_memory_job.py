"""What the engines really hold while they train: run as a process of its own, prints bytes of every case as JSON.

``held`` is what stands between two steps; ``train`` and ``update`` are the most in a step before and behind its last
backward, as in ``inverseq.memory``: there every storage that an operation makes is counted until it is freed.
"""

import gc
import json
import sys
import weakref

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, LlamaForCausalLM

from inverseq.attention import ATTENTION_NAME
from inverseq.config import EngineConfig, OptimConfig, PackingConfig
from inverseq.distributed import Ranks
from inverseq.engine import TorchEngine
from inverseq.engine_deepspeed import DeepSpeedEngine
from inverseq.policy import Policy
from inverseq.records import ScoredSamples
from inverseq.steps import plan_steps
from tests.tiny_samples import make_samples

SHAPE = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 8, "num_attention_heads": 4}
VOCAB = 512


class Live(TorchDispatchMode):
    """Bytes of the storages that operations have made since and that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.total, self.peak = dict.fromkeys(visible(), 0), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage._cdata not in self.sizes and storage.nbytes():
            self.sizes[storage._cdata] = storage.nbytes()
            self.total += storage.nbytes()
            self.peak = max(self.peak, self.total)
            weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, key):
        self.total -= self.sizes.pop(key)


def visible() -> dict[int, int]:
    """Bytes of the storages of all tensors that Python knows and that have memory."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [tensor for tensor in tensors if not tensor.is_meta and tensor.layout == torch.strided]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


def make_step():
    samples = make_samples(12, vocab=VOCAB)
    counts = [sample.num_actions for sample in samples]
    offsets = np.cumsum([0, *counts]).astype(np.int64)
    values = torch.full((sum(counts),), -5.0)
    scored = ScoredSamples(samples, targets=values, plain_logprobs=values.clone(), offsets=offsets)
    [step] = plan_steps(scored, OptimConfig(samples_per_step=12), PackingConfig(train_tokens=40, score_tokens=512))
    assert len(step.micro_batches) > 2
    return step


def measure(stage: int, dtype: torch.dtype, offload: bool) -> dict[str, int]:
    before, step, found = visible(), make_step(), {}
    config = LlamaConfig(**SHAPE, vocab_size=VOCAB, attn_implementation=ATTENTION_NAME)
    policy = Policy(LlamaForCausalLM(config).to(dtype), VOCAB, EngineConfig())
    num_parameters = sum(weight.numel() for weight in policy.parameters())
    if stage:
        options = {"ranks": Ranks(), "zero_stage": stage, "offload_optimizer": offload}
        engine = DeepSpeedEngine(policy, OptimConfig(), 4, **options)
    else:
        engine = TorchEngine(policy, OptimConfig(), 4)
    engine.train_step(step)
    held = sum(size for key, size in visible().items() if key not in before)
    updating, name = (engine.engine, "step") if stage else (engine, "_update")
    update = getattr(updating, name)

    def marked_update():
        found["train"], live.peak = held + live.peak, live.total
        return update()

    setattr(updating, name, marked_update)
    live = Live()
    with live:
        engine.train_step(step)
    setattr(updating, name, update)
    return found | {"held": held, "update": held + live.peak, "num_parameters": num_parameters}


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = [(stage, getattr(torch, dtype), offload) for stage, dtype, offload in json.loads(sys.argv[1])]
    print("MEASURED", json.dumps([measure(*case) for case in cases]))
