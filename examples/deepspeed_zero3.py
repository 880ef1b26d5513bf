"""A training loop of one's own on DeepSpeed ZeRO-3, any number of processes, CPU or GPU.

torchrun --nproc-per-node 2 examples/deepspeed_zero3.py MODEL [steps]
"""

import sys

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from inverseq.integrations.causal_lm import CausalLMLogprobs

TEXTS = ["The earth is almost a sphere.", "Seven is a prime number and nine is not."]
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    "gradient_clipping": 0.0,
    "bf16": {"enabled": torch.cuda.is_available()},
}


def main(model_path: str, steps: int = 4) -> list[float]:
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    # The module is what is wrapped: its forward reads the head while ZeRO-3 has gathered it.
    module = CausalLMLogprobs(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32))
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=CONFIG)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = TEXTS[rank % len(TEXTS) :]  # one or two, of different lengths
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(engine.device)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    num_tokens = (labels[:, 1:] != -100).sum()
    torch.distributed.all_reduce(num_tokens)  # over all processes, without padding
    losses = []
    for _ in range(steps):
        # DeepSpeed averages gradients over the processes: times their number, a sum over tokens stays a mean over all.
        loss = -engine(**batch, labels=labels).sum() * world / num_tokens
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / world)
    if rank == 0:
        print(f"loss by step: {', '.join(f'{loss:.4f}' for loss in losses)}")
    torch.distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
