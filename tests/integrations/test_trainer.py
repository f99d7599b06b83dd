"""Distillation in Hugging Face's Trainer: its numbers are those of a single big batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_lms import V, tiny
from transformers import TrainingArguments

from fastkd.integrations.transformers import DistillationTrainer

LOSS = dict(temperature=2.0, alpha=0.7)


def rows(count=8, length=12):
    """Of unequal targets; the third has none."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (count, length), generator=generator)
    made = []
    for i, row in enumerate(ids):
        labels = row.clone()
        labels[: length if i == 2 else 1 + 3 * i % 10] = -100
        made.append({"input_ids": row, "labels": labels})
    return made


def arguments(folder, **others):
    usual = dict(
        output_dir=str(folder), per_device_train_batch_size=8, per_device_eval_batch_size=2,
        max_steps=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=1e9,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    return TrainingArguments(**usual | others)


def trainer_of(folder, *, arguments_=None, kind=DistillationTrainer, **settings):
    usual = dict(model=tiny(0), teacher_model=tiny(1), train_dataset=rows(), **LOSS)
    return kind(args=arguments(folder, **arguments_ or {}), **usual | settings)


def truth(student, teacher, data, temperature=2.0, alpha=0.7):
    """The loss of all rows, and its averages, in float64."""
    student, teacher = student.double(), teacher.double()
    ids, labels = (
        torch.stack([torch.as_tensor(r[k]) for r in data]) for k in ("input_ids", "labels")
    )
    z = student(input_ids=ids).logits[:, :-1]
    t = teacher(input_ids=ids).logits[:, :-1].detach()
    labels, counts = labels[:, 1:], labels[:, 1:] != -100
    z, t, labels = z[counts], t[counts], labels[counts]

    def kl(T):
        log_p, log_q = (t / T).log_softmax(-1), (z / T).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    kd, ce = kl(temperature), F.cross_entropy(z, labels)
    return {
        "loss": alpha * temperature**2 * kd + (1 - alpha) * ce,
        "kd": kd,
        "ce": ce,
        "kl": kl(1.0),
        "top1_agreement": (z.argmax(-1) == t.argmax(-1)).double().mean(),
    }


def norm(model):
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()


@pytest.mark.parametrize("size, accumulation", [(8, 1), (2, 4), (1, 8), (3, 3)])
def test_a_step_is_that_of_its_whole_batch(tmp_path, size, accumulation):
    """However it is cut: one micro-batch has no target, the last of three is not full."""
    cut = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    trainer = trainer_of(tmp_path, arguments_=cut)
    trainer.train()
    student = tiny(0)
    expected = truth(student, tiny(1), rows())
    expected["loss"].backward()
    line = trainer.state.log_history[0]
    for name in ("loss", "kd", "ce", "top1_agreement"):
        assert line[name] == pytest.approx(expected[name].item(), rel=2e-6), name
    assert line["grad_norm"] == pytest.approx(norm(student).item(), rel=1e-5)


def test_evaluation_is_over_tokens(tmp_path):
    """Seven rows in batches of two, of unequal targets."""
    data = rows()[:7]
    trainer = trainer_of(tmp_path, eval_dataset=data)
    found = trainer.evaluate()
    expected = truth(tiny(0), tiny(1), data)
    for name in ("loss", "kl", "top1_agreement"):
        assert found[f"eval_{name}"] == pytest.approx(expected[name].item(), rel=1e-5), name
    assert found["eval_perplexity"] == pytest.approx(math.exp(expected["ce"]), rel=1e-5)
