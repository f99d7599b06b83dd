"""Hugging Face's Trainer, distilling: python examples/trainer.py STUDENT TEACHER data.jsonl OUTPUT

The data have a column `text`. On several GPUs: accelerate launch examples/trainer.py …
"""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

from fastkd.integrations.transformers import DistillationTrainer


def main(student, teacher, data, output, **settings):
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_dataset("json", data_files=data, split="train").train_test_split(0.1, seed=0)
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512))
    trainer = DistillationTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        TrainingArguments(output, learning_rate=2e-4, **settings),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        teacher_model=teacher,
        temperature=2.0,
        alpha=0.7,
    )
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
