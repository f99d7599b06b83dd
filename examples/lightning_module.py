"""Lightning: python examples/lightning_module.py STUDENT TEACHER lines.txt OUTPUT"""

import sys

import torch
from lightning import LightningModule, Trainer
from texts import load

from fastkd import kd_loss
from fastkd.integrations.transformers import sources


class Distillation(LightningModule):
    """Under `accumulate_grad_batches` Lightning averages the micro-batches' means, in which tokens
    of a short one weigh more; divided by a fixed number (`num_items`) all weigh the same."""

    def __init__(self, student, teacher, optimizer, num_items=None):
        super().__init__()
        self.student, self.optimizer, self.num_items = student, optimizer, num_items
        vars(self)["teacher"] = teacher  # hidden: not in parameters, checkpoints and summaries

    def configure_optimizers(self):
        return self.optimizer

    def training_step(self, batch, _):
        s, t = sources(self.student, self.teacher.to(self.device), batch)
        loss = kd_loss(s, t, batch["labels"], shift=True, num_items=self.num_items)
        self.log("loss", loss)
        return loss


def main(names, path, output, size=4, num_items=None, optimizer=torch.optim.AdamW, **settings):
    student, teacher, loader = load(*names, path, size)
    module = Distillation(student, teacher, optimizer(student.parameters(), lr=1e-4), num_items)
    Trainer(max_epochs=1, **settings).fit(module, loader)
    student.save_pretrained(output)


if __name__ == "__main__":
    main(sys.argv[1:3], *sys.argv[3:5])
