"""Whole training steps of real models: `python benchmarks/step.py FOLDER` (of real_models.py).

Teacher, student, loss, backward pass, clipping and AdamW, fp32, one sequence; T = 2, alpha = 0.7.

    naive    plain PyTorch: both models' logits, F.kl_div and F.cross_entropy
    whole    `fastkd.recipes.train` on whole logits
    fastkd   the same, as it chooses itself (logits="auto")

Every run is a process of its own, whose high-water mark is the peak; the three take turns, and the
median of all steps but each process's first one counts. Writes results/step.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkd.recipes import LM, Distil, Recipe, train
from fastkd.training.measure import peak_memory

HERE = Path(__file__).parent
SETUPS = {"smollm2": (256, 1024), "gemma3": (256, 512, 1024)}
KINDS = ("naive", "whole", "fastkd")
T, ALPHA, STEPS = 2.0, 0.7, 4


def naive_step(student, teacher, batch, optimizer) -> None:
    labels = batch["labels"][:, 1:].flatten()
    with torch.no_grad():
        t = teacher(batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
    s = student(batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
    kl = F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean")
    (ALPHA * T**2 * kl + (1 - ALPHA) * F.cross_entropy(s, labels)).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measure(folder: Path, name: str, tokens: int, kind: str) -> None:
    """Prints seconds of each step but the first, the peak in MB, and the first loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    batch = {"input_ids": ids, "labels": ids}
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder / which, dtype=torch.float32)
        for which in (name, f"{name}-third")
    )
    teacher.eval().requires_grad_(False)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-5)
    seconds, loss = [], None
    if kind == "naive":
        for _ in range(STEPS):
            start = time.perf_counter()
            naive_step(student, teacher, batch, optimizer)
            seconds.append(time.perf_counter() - start)
    else:

        def clip(*_):
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)

        optimizer.register_step_pre_hook(clip)
        logits = "whole" if kind == "whole" else "auto"
        recipe = Recipe(repeat([batch]), LM(teacher, logits), Distil(temperature=T, alpha=ALPHA))
        for _ in range(STEPS):
            start = time.perf_counter()
            (row,) = train(LM(student, logits), recipe, optimizer, 1)
            seconds.append(time.perf_counter() - start)
            loss = row["loss"] if loss is None else loss
    peak = peak_memory(torch.device("cpu"))
    print(json.dumps({"seconds": seconds[1:], "peak_mb": peak, "loss": loss}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "TOKENS", "KIND"))
    arguments = parser.parse_args()
    if arguments.one:
        name, tokens, kind = arguments.one
        return measure(arguments.folder, name, int(tokens), kind)
    results = []
    for name, lengths in SETUPS.items():
        for tokens in lengths:
            found: dict[str, dict] = {kind: {"seconds": [], "peak_mb": []} for kind in KINDS}
            for _ in range(arguments.rounds):
                for kind in KINDS:
                    command = [sys.executable, __file__, str(arguments.folder)]
                    command += ["--one", name, str(tokens), kind]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    one = json.loads(done.stdout.splitlines()[-1])
                    found[kind]["seconds"] += one["seconds"]
                    found[kind]["peak_mb"].append(one["peak_mb"])
            for kind, x in found.items():
                results.append(
                    {
                        "model": name,
                        "tokens": tokens,
                        "provider": kind,
                        "median": statistics.median(x["seconds"]),
                        "peak_mb": max(x["peak_mb"]),
                        "seconds": x["seconds"],
                    }
                )
                print(results[-1], flush=True)
    machine = {
        "device": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    out = HERE / "results" / "step.json"
    out.write_text(json.dumps({"machine_info": machine, "steps": results}, indent=1) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
