"""What test_trainer.py and trainer_ranks.py share: rows, trainers, and their step in float64."""

import tiny_lms
import torch
import torch.nn.functional as F
from tiny_lms import V
from torch import nn
from transformers import TrainingArguments

from fastkd.integrations.transformers import DistillationTrainer
from fastkd.recipes.lm import LM
from fastkd.recipes.objectives import Distil
from fastkd.recipes.recipe import Learnt

LOSS = dict(temperature=2.0, alpha=0.7)


def tiny(seed, **others):
    """Of weights large enough that models differ."""
    return tiny_lms.tiny(seed, **{"initializer_range": 0.3} | others)


def rows(count=16, length=12):
    """Of unequal targets; the third has none."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (count, length), generator=generator)
    made = []
    for i, row in enumerate(ids):
        labels = row.clone()
        labels[: length if i == 2 else 1 + 3 * i % 10] = -100
        made.append({"input_ids": row, "labels": labels})
    return made


def batch_of(data):
    return {k: torch.stack([torch.as_tensor(r[k]) for r in data]) for k in ("input_ids", "labels")}


def arguments_of(folder, **others):
    usual = dict(
        output_dir=str(folder), per_device_train_batch_size=16, per_device_eval_batch_size=2,
        max_steps=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=1e9,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    return TrainingArguments(**usual | others)


def trainer_of(folder, *, arguments=None, args=None, kind=DistillationTrainer, **settings):
    usual = dict(model=tiny(0), teacher_model=tiny(1), train_dataset=rows())
    usual |= {} if "objective" in settings else LOSS
    if args is None:
        args = arguments_of(folder, **arguments or {})
    return kind(args=args, **usual | settings)


def truth(student, teacher, data, temperature=2.0, alpha=0.7):
    """The loss of all rows, and its averages, in float64."""
    student, teacher = student.double(), teacher.double()
    batch = batch_of(data)
    ids, labels = batch["input_ids"], batch["labels"][:, 1:]
    counts = labels != -100
    z = student(input_ids=ids).logits[:, :-1][counts]
    t = teacher(input_ids=ids).logits[:, :-1][counts].detach()

    def kl(T):
        log_p, log_q = (t / T).log_softmax(-1), (z / T).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    kd, ce = kl(temperature), F.cross_entropy(z, labels[counts])
    averages = {
        "loss": alpha * temperature**2 * kd + (1 - alpha) * ce,
        "kd": kd,
        "ce": ce,
        "kl": kl(1.0),
        "perplexity": ce.detach().exp(),
        "top1_agreement": (z.argmax(-1) == t.argmax(-1)).double().mean(),
    }
    if averages["loss"].requires_grad:
        averages["loss"].backward()
    return {name: x.item() for name, x in averages.items()}


def norm(model):
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()


class Projected(nn.Module):
    """Two terms of unequal counts, over tokens and over rows; the second through a projection."""

    hidden_states = True

    def __init__(self):
        super().__init__()
        self.distil = Distil(**LOSS)
        torch.manual_seed(3)
        self.projection = nn.Linear(16, 16)

    def counts(self, batch):
        return torch.cat([self.distil.counts(batch), (batch["labels"] != -100).any(-1).sum()[None]])

    def forward(self, student, teacher, batch, num_items, progress):
        loss, measures = self.distil(student, teacher, batch, num_items[:1], progress)
        s, t = (x.hidden_states[1].mean(1) for x in (student, teacher))
        wide = (self.projection(s) - t).square().mean(-1)
        hidden = (wide * (batch["labels"] != -100).any(-1)).sum() / num_items[1].clamp(min=1)
        return Learnt(loss + hidden, measures | {"hidden": hidden.detach()})


def projected_truth(data):
    """The loss of all rows at once, the objective after it and the student, with gradients."""
    student, teacher, objective = tiny(0), tiny(1), Projected()
    batch = batch_of(data)
    with torch.no_grad():
        says = LM(teacher)(batch, True)
    learnt = objective(LM(student)(batch, True), says, batch, objective.counts(batch), 0.0)
    learnt.loss.backward()
    return learnt, objective, student


def tokenizer():
    """One token a word: w0 … w63; and those that mask, pad, and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(V - 3)] + ["<mask>", "<pad>", "<end>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, mask_token="<mask>", pad_token="<pad>", eos_token="<end>"
    )
