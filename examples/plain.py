"""Plain PyTorch: python examples/plain.py STUDENT TEACHER lines.txt OUTPUT"""

import sys

import torch
from texts import load

from fastkd import kd_loss
from fastkd.integrations.transformers import sources


def main(names, path, output, size=4, lr=1e-4, optimizer=torch.optim.AdamW):
    """One pass; returns the loss of each step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher, loader = load(*names, path, size)
    student, teacher = student.to(device), teacher.to(device)
    optimizer = optimizer(student.parameters(), lr=lr)
    losses = []
    for batch in loader:
        batch = {name: x.to(device) for name, x in batch.items()}
        s, t = sources(student, teacher, batch)
        loss = kd_loss(s, t, batch["labels"], shift=True, temperature=2.0, alpha=0.7)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    student.save_pretrained(output)
    return losses


if __name__ == "__main__":
    print(main(sys.argv[1:3], *sys.argv[3:5]))
