"""accelerate launch examples/accelerate_loop.py STUDENT TEACHER lines.txt OUTPUT"""

import sys
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from texts import load

from fastkd import kd_loss
from fastkd.integrations.transformers import sources


def main(names, path, output, size=4, steps=4, lr=1e-4, optimizer=torch.optim.AdamW):
    """One pass, in steps of so many micro-batches, of which all tokens weigh the same."""
    # By count alone: the loader runs ahead, and would end the step when it is through.
    plugin = GradientAccumulationPlugin(num_steps=steps, sync_with_dataloader=False)
    accelerator = Accelerator(gradient_accumulation_plugin=plugin)
    student, teacher, loader = load(*names, path, size)
    student, loader = accelerator.prepare(student, loader)
    optimizer = accelerator.prepare(optimizer(student.parameters(), lr=lr))
    teacher, batches = teacher.to(accelerator.device), iter(loader)
    while len(micro_batches := list(islice(batches, steps))) == steps:
        targets = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
        n = accelerator.reduce(targets)
        for batch in micro_batches:
            with accelerator.accumulate(student):
                s, t = sources(student, teacher, batch)
                loss = kd_loss(s, t, batch["labels"], shift=True, temperature=2.0, num_items=n)
                # accelerate divides by the steps, and averages over the processes.
                accelerator.backward(loss * (steps * accelerator.num_processes))
                optimizer.step()
                optimizer.zero_grad()
    student = accelerator.unwrap_model(student)
    student.save_pretrained(output, is_main_process=accelerator.is_main_process)


if __name__ == "__main__":
    main(sys.argv[1:3], *sys.argv[3:5])
