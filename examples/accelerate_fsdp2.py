"""A training loop of one's own on accelerate and FSDP2, any number of processes, CPU or GPU.

torchrun --nproc-per-node 2 examples/accelerate_fsdp2.py MODEL [steps]
"""

import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM, AutoTokenizer

from inverseq.integrations.causal_lm import CausalLMLogprobs

TEXTS = ["The earth is almost a sphere.", "Seven is a prime number and nine is not."]


def main(model_path: str, steps: int = 4) -> list[float]:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False)
    accelerator = Accelerator(fsdp_plugin=plugin, cpu=not torch.cuda.is_available())
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    # The module is what is wrapped: its forward reads the head while FSDP has gathered it.
    module = CausalLMLogprobs(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    module, optimizer = accelerator.prepare(module, optimizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = TEXTS[accelerator.process_index % len(TEXTS) :]  # one or two, of different lengths
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(accelerator.device)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    num_tokens = accelerator.reduce((labels[:, 1:] != -100).sum(), "sum")  # over all processes, without padding
    losses = []
    for _ in range(steps):
        # FSDP averages gradients over the processes: times their number, a sum over tokens stays a mean over all.
        loss = -module(**batch, labels=labels).sum() * accelerator.num_processes / num_tokens
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.print(f"loss by step: {', '.join(f'{loss:.4f}' for loss in losses)}")
    del module, optimizer  # what FSDP holds of the process group goes before the group, or the exit may wait for ever
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
