"""The README is true: its code runs, its tables are the saved results, its commands exist."""

import re
import sys
from pathlib import Path

import pytest
import torch

import fastkd

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOOP, TRAINER, HEADS, SOURCES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
V = 48


def tiny_model(seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **size))


def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (4, 12), generator=generator)
    labels = ids.clone()
    for row, prompt in enumerate((1, 9, 4, 10)):  # unequal targets
        labels[row, :prompt] = -100
    return [dict(input_ids=i, labels=y) for i, y in zip(ids, labels, strict=True)]


def test_loop():
    student, teacher = tiny_model(0), tiny_model(1)
    loader = [{k: torch.stack([r[k] for r in rows()]) for k in ("input_ids", "labels")}]
    exec(LOOP, dict(student=student, teacher=teacher, loader=loader, torch=torch))
    assert student.lm_head.weight.grad.abs().sum() > 0 and teacher.lm_head.weight.grad is None


def test_heads_and_other_sources():
    """The same loss without logits; every line of the other sources runs."""
    student, teacher = tiny_model(0), tiny_model(1)
    batch = {"input_ids": torch.stack([r["input_ids"] for r in rows()])}
    labels = torch.stack([r["labels"] for r in rows()])
    names = dict(student=student, teacher=teacher, batch=batch, labels=labels, torch=torch)
    exec(HEADS, names)
    z = [model(**batch).logits.detach() for model in (student, teacher)]
    expected = fastkd.kd_loss(*z, labels, shift=True, temperature=2.0, alpha=0.7)
    torch.testing.assert_close(names["loss"].detach(), expected)
    assert student.lm_head.weight.grad.abs().sum() > 0 and teacher.lm_head.weight.grad is None
    other, longer = z[1].flip(-1), torch.nn.functional.pad(z[1], (0, 3))
    exec(
        SOURCES,
        dict(
            zip(("student_logits", "teacher_logits"), z, strict=True),
            other_logits=other,
            longer_logits=longer,
        ),
    )


def test_trainer(tmp_path):
    """Accumulating four micro-batches of unequal token counts is one step on all of them."""
    from transformers import Trainer, TrainingArguments

    names = dict(Trainer=Trainer, KDLoss=fastkd.KDLoss, torch=torch)
    exec(TRAINER, names)
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        student = tiny_model(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=size, max_steps=2, optim="sgd",
            gradient_accumulation_steps=accumulation, learning_rate=0.1,
            lr_scheduler_type="constant",
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=0,
        )  # fmt: skip
        trainer = names["DistillationTrainer"](
            student, arguments, train_dataset=rows(), teacher=tiny_model(1).eval()
        )
        trainer.train()
        weights.append(torch.cat([w.detach().flatten() for w in student.parameters()]))
    start = torch.cat([w.detach().flatten() for w in tiny_model(0).parameters()])
    assert (weights[0] - start).norm() > 1e-3
    assert (weights[0] - weights[1]).norm() < 1e-5 * (weights[0] - start).norm() + 1e-6


def test_tables_are_the_saved_results():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import table

    assert table.load("cpu") is not None
    assert table.rendered(README) == README, "run `make tables`"


@pytest.mark.parametrize("command", ["make distill", "make test", "make bench", "make tables"])
def test_commands_exist(command):
    assert command in README
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_every_divergence_is_in_the_table():
    for cls in fastkd.divergences._REGISTRY.values():
        if cls.__module__.startswith("fastkd"):
            assert f"`{cls.__name__}(" in README
