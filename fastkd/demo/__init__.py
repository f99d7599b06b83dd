"""`fastkd distill` without arguments: what is a teacher worth to a small student?

Two equal students find out: fresh Llamas of a million parameters, trained by `distill` on the same
sequences from the same weights, one on cross-entropy alone, the other on the distributions of the
small teacher that comes with the package. The text is the source code of Python's own standard
library; the modules that all are scored on were never trained on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd.demo.corpus import stdlib_texts

if TYPE_CHECKING:
    from fastkd.training.train import Run

TEACHER = Path(__file__).parent / "teacher"
STEPS, BATCH, LENGTH = 120, 8, 256
HELD_OUT_CHARACTERS = 2_500  # of each held-out file
PROMPT = "def read_lines(path):\n"
NAMES = ("teacher", "student, cross-entropy", "student, distilled")


def run(output: str = "fastkd-demo", steps: int = STEPS) -> dict[str, Any]:
    """Train and score both students on the CPU, offline; about three minutes on two cores.

    Args:
        output: folder for everything; what an earlier demonstration left there is replaced.
        steps: optimizer steps of 2,048 tokens, for each student.

    Returns:
        What `results.json` holds: scores, times, samples and memory.

    Raises:
        InputError: this installation lacks the teacher, or Python the sources of its library.
    """
    # The libraries read these when first imported; nothing here needs the network or a GPU.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    from fastkd.training.config import DistillConfig, InputError
    from fastkd.training.train import distill

    if not (TEACHER / "model.safetensors").exists():
        raise InputError(f"this installation lacks the demonstration's teacher, {TEACHER}")
    started = time.perf_counter()
    folder = Path(output)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    print(__doc__)
    try:
        _write_corpus(folder / "data")
    except FileNotFoundError as error:
        raise InputError(str(error)) from error
    _write_fresh_student(folder / "fresh")
    settings = DistillConfig(
        student=str(folder / "fresh"),
        data=str(folder / "data" / "train.jsonl"),
        eval_data=str(folder / "data" / "held_out.jsonl"),
        overwrite=True,
        max_length=LENGTH,
        max_steps=steps,
        batch_size=BATCH,
        learning_rate=3e-3,
        warmup_ratio=0.1,
        dtype="float32",
        eval_steps=40,
        save_steps=0,
    )
    alone = replace(settings, output=str(folder / "cross-entropy"), alpha=0.0)
    taught = replace(settings, output=str(folder / "distilled"), alpha=1.0, teacher=str(TEACHER))
    runs = {name: distill(config) for name, config in zip(NAMES[1:], (alone, taught), strict=True)}

    print("\nScoring the three models, and measuring the memory of one loss.")
    folders = {NAMES[0]: TEACHER} | {name: done.output for name, done in runs.items()}
    models = _score(folders, settings)
    for name, done in runs.items():
        models[name]["training_seconds"] = done.seconds
    _plot(runs, models[NAMES[0]]["perplexity"], folder / "curves.png")
    results = {
        "models": models,
        "loss_peak_mb": {kind: _loss_memory(kind) for kind in ("naive", "fastkd")},
        "tokens_seen": steps * BATCH * LENGTH,
        "seconds": time.perf_counter() - started,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    _report(results, folder, runs[NAMES[2]].output)
    return results


def _write_corpus(folder: Path) -> None:
    held_out = []
    for text in stdlib_texts(held_out=True):
        start = text.find("\n", len(text) // 2) + 1  # the middle: files begin alike
        held_out.append(text[start : start + HELD_OUT_CHARACTERS])
    for name, texts in (("train", stdlib_texts(held_out=False)), ("held_out", held_out)):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _write_fresh_student(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _score(folders: dict[str, Path], settings: Any) -> dict[str, dict[str, Any]]:
    """Held-out scores of each model against the first, and how it continues the prompt."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastkd.training.data import Collator, encode, eval_batches, load_rows
    from fastkd.training.evaluate import evaluate

    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    rows = encode(load_rows(settings.eval_data), tokenizer, LENGTH)
    collate = Collator(tokenizer.pad_token_id)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    teacher, scores = None, {}  # the teacher comes first, and is scored against nothing
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        batches = eval_batches(rows, collate, BATCH, 1, 0)
        scores[name] = evaluate(model, batches, Accelerator(), teacher)
        teacher = teacher or model
        torch.manual_seed(0)
        ids = model.generate(**prompt, max_new_tokens=48, do_sample=True, temperature=0.7, top_k=20)
        scores[name]["sample"] = tokenizer.decode(ids[0], skip_special_tokens=True)
    return scores


def _loss_memory(kind: str) -> float:
    """MB that one loss and its gradient add to a process that holds the logits of one step."""
    command = [sys.executable, "-m", "fastkd.demo.memory", kind, str(BATCH * LENGTH), "8192"]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _plot(runs: dict[str, Run], teacher_perplexity: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, done in runs.items():
        for axes, key in ((left, "ce"), (right, "eval_perplexity")):
            points = [(row["step"], row[key]) for row in done.history if key in row]
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
    left.set(xlabel="step", ylabel="cross-entropy, nats per token", title="training text")
    right.axhline(teacher_perplexity, color="gray", linestyle="--", label="teacher")
    right.set(xlabel="step", ylabel="perplexity", yscale="log", title="held-out text")
    right.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _report(results: dict[str, Any], folder: Path, model: Path) -> None:
    columns = ("perplexity", "KL to teacher", "top-1 agreement", "training, s")
    print("\nHeld-out text" + " " * 11 + "".join(f"{column:>17}" for column in columns))
    for name, scores in results["models"].items():
        cells = [
            format(scores[key], how) if key in scores else "-"
            for key, how in (
                ("perplexity", ".1f"),
                ("kl", ".3f"),
                ("top1_agreement", ".1%"),
                ("training_seconds", ".0f"),
            )
        ]
        print(f"{name:<24}" + "".join(f"{cell:>17}" for cell in cells))
    naive, ours = (results["loss_peak_mb"][kind] for kind in ("naive", "fastkd"))
    alone, taught = (results["models"][name]["perplexity"] for name in NAMES[1:])
    better = "lower" if taught < alone else "higher"
    print(
        f"\nThe distilled student's perplexity is {abs(taught / alone - 1):.0%} {better}."
        f"\nOne loss and its gradient on {BATCH * LENGTH:,} x 8,192 logits add {naive:,.0f} MB"
        f" in plain PyTorch, {ours:,.0f} MB with fastkd.\n"
    )
    for name, scores in results["models"].items():
        print(f"--- {name}\n{scores['sample']}\n")
    print(
        f"{results['seconds']:.0f} s in all. In {folder}: results.json, curves.png, both students."
        " To load one:"
    )
    print(f'    transformers.AutoModelForCausalLM.from_pretrained("{model}")')
