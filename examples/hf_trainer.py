"""``transformers.Trainer`` with the fused next-token loss.

python examples/hf_trainer.py MODEL [max_steps]
"""

import sys

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from inverseq.integrations.hf_trainer import NextTokenLoss

TEXTS = ["The earth is almost a sphere.", "Seven is a prime number and nine is not."]


def main(model_path: str, max_steps: int = 4) -> float:
    model = AutoModelForCausalLM.from_pretrained(model_path)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    arguments = TrainingArguments(
        output_dir="runs/hf-trainer", max_steps=max_steps, report_to=[], save_strategy="no", logging_steps=1
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[tokenizer(text) for text in TEXTS * 16],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        compute_loss_func=NextTokenLoss(model),  # the one line
    )
    return trainer.train().training_loss


if __name__ == "__main__":
    print(f"training loss {main(sys.argv[1], *map(int, sys.argv[2:])):.4f}")
