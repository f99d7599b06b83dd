"""Peak memory of one distillation loss on the CPU: `python -m fastkd.demo.memory naive|fastkd ROWS
ENTRIES`.

Prints how many MB the loss and its gradient add to the high-water mark of a process that holds both
models' logits. A fresh process for each measurement: a high-water mark never sinks.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from fastkd.loss import kd_loss
from fastkd.training.measure import peak_memory


def main() -> None:
    kind, rows, entries = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for shape in ((1, 64), (rows, entries)):  # the small one first: threads and code are loaded
        teacher, leaf = torch.randn(shape), torch.randn(shape, requires_grad=True)
        student = leaf * 1.0  # like a model's output, not a leaf
        before = peak_memory(torch.device("cpu"))
        if kind == "naive":
            p, log_q = F.softmax(teacher, -1), F.log_softmax(student, -1)
            loss = F.kl_div(log_q, p, reduction="batchmean")
        else:
            loss = kd_loss(student, teacher, inplace=True)
        torch.autograd.grad(loss, student)
    print(peak_memory(torch.device("cpu")) - before)


if __name__ == "__main__":
    main()
