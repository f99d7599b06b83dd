"""`fastkd distill` without arguments: what is a teacher worth to a small student?

Two equal students find out: fresh Llamas of a million parameters, trained on the same sequences
from the same weights, one on cross-entropy alone, the other on the distributions of the small
teacher that comes with the package. The text is the source code of Python's own standard library;
the modules that all are scored on were never trained on. The loop is `fastkd.recipes.train`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastkd.demo.corpus import stdlib_texts

TEACHER = Path(__file__).parent / "teacher"
STEPS, BATCH, LENGTH = 120, 8, 256
WARMUP, LEARNING_RATE, EVAL_EVERY = 0.1, 3e-3, 40
HELD_OUT_CHARACTERS = 2_500  # of each held-out file
PROMPT = "def read_lines(path):\n"
NAMES = ("teacher", "student, cross-entropy", "student, distilled")


def run(output: str = "fastkd-demo", steps: int = STEPS) -> dict[str, Any]:
    """Train and score both students on the CPU, offline; a minute or two on two cores.

    Args:
        output: folder for everything; what an earlier demonstration left there is replaced.
        steps: optimizer steps of 2,048 tokens, for each student.

    Returns:
        What `results.json` holds: scores, times, samples and memory.

    Raises:
        InputError: this installation lacks the teacher, or Python the sources of its library; the
            folder holds other things.
    """
    # The libraries read these when first imported; nothing here needs the network or a GPU.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastkd.recipes import LM, Distil, evaluate
    from fastkd.training.errors import InputError
    from fastkd.training.outputs import Folder

    if not (TEACHER / "model.safetensors").exists():
        raise InputError(f"this installation lacks the demonstration's teacher, {TEACHER}")
    started = time.perf_counter()
    folder = Folder(output, overwrite=True)
    folder.begin()
    print(__doc__)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    try:
        texts, held_out = _texts()
    except FileNotFoundError as error:
        raise InputError(str(error)) from error
    rows, held_out = (_encoded(x, tokenizer) for x in (texts, held_out))
    print(f"{len(rows):,} sequences of up to {LENGTH} tokens; {len(held_out):,} held out\n")
    teacher = LM(AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval())
    objectives = {NAMES[1]: (None, Distil(alpha=0.0)), NAMES[2]: (teacher, Distil())}

    models = {NAMES[0]: evaluate(teacher, _in_order(held_out, tokenizer))}
    models[NAMES[0]]["sample"] = _sample(teacher.model, tokenizer)
    histories, taught = {}, None
    for name, (teaches, objective) in objectives.items():
        student = LM(_fresh_student(tokenizer, teacher.model.config.vocab_size))
        histories[name], seconds = _train(
            student, teaches, objective, (rows, held_out, tokenizer), name, steps
        )
        models[name] = evaluate(student, _in_order(held_out, tokenizer), teacher)
        models[name] |= {"training_seconds": seconds, "sample": _sample(student.model, tokenizer)}
        taught = student.model
    folder.fill(lambda path: (taught.save_pretrained(path), tokenizer.save_pretrained(path)))

    print("\nMeasuring the memory of one loss.")
    _plot(histories, models[NAMES[0]]["perplexity"], folder.own("curves.png"))
    results = {
        "models": models,
        "loss_peak_mb": {kind: _loss_memory(kind) for kind in ("naive", "fastkd")},
        "tokens_seen": steps * BATCH * LENGTH,
        "seconds": time.perf_counter() - started,
    }
    folder.text("results.json", json.dumps(results, indent=2))
    folder.finish()
    _report(results, folder.path)
    return results


def _texts() -> tuple[list[str], list[str]]:
    """To train on, and held out: the middle of each file, for files begin alike."""
    held_out = []
    for text in stdlib_texts(held_out=True):
        start = text.find("\n", len(text) // 2) + 1
        held_out.append(text[start : start + HELD_OUT_CHARACTERS])
    return stdlib_texts(held_out=False), held_out


def _encoded(texts: list[str], tokenizer: Any) -> Any:
    from datasets import Dataset, disable_progress_bars

    from fastkd.training.data import encode

    disable_progress_bars()
    return encode(Dataset.from_dict({"text": texts}), tokenizer, LENGTH, packing=True)


def _fresh_student(tokenizer: Any, entries: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=entries, hidden_size=96, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def _train(
    student: Any, teacher: Any, objective: Any, data: tuple, name: str, steps: int
) -> tuple[list[dict], float]:
    """The log, with evaluations, and the seconds of training alone."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    from fastkd.recipes import Recipe, evaluate, train

    rows, held_out, tokenizer = data
    optimizer = torch.optim.AdamW(student.model.parameters(), LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    recipe = Recipe(_shuffled(rows, tokenizer, seed=0), teacher, objective)
    history, seconds = [], 0.0
    student.model.train()
    for done in range(0, steps, EVAL_EVERY):
        before = time.perf_counter()
        part = train(student, recipe, optimizer, min(EVAL_EVERY, steps - done))
        seconds += time.perf_counter() - before
        history += [row | {"step": row["step"] + done} for row in part]
        scores = evaluate(student, _in_order(held_out, tokenizer))
        history[-1] |= {f"eval_{key}": x for key, x in scores.items()}
        last = history[-1]
        print(
            f"{name:<23} step {last['step']:>4}  cross-entropy {last['ce']:.3f}"
            f"  held-out perplexity {last['eval_perplexity']:,.0f}",
            flush=True,
        )
    return history, seconds


def _shuffled(rows: Any, tokenizer: Any, seed: int) -> Iterator[list[dict]]:
    """A step's one micro-batch after the other, for ever; the same for the same seed."""
    import torch
    from torch.utils.data import DataLoader

    from fastkd.training.data import collator

    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        rows, BATCH, shuffle=True, drop_last=True, collate_fn=collator(tokenizer),
        generator=generator,
    )  # fmt: skip
    while True:
        for batch in loader:
            yield [batch]


def _in_order(rows: Any, tokenizer: Any) -> Any:
    from torch.utils.data import DataLoader

    from fastkd.training.data import collator

    return DataLoader(rows, BATCH, collate_fn=collator(tokenizer))


def _sample(model: Any, tokenizer: Any) -> str:
    from fastkd.recipes import generate

    ((_, text),) = generate(
        model, tokenizer, [PROMPT], max_new_tokens=48, temperature=0.7, top_k=20
    )
    return PROMPT + text


def _loss_memory(kind: str) -> float:
    """MB that one loss and its gradient add to a process that holds the logits of one step."""
    command = [sys.executable, "-m", "fastkd.demo.memory", kind, str(BATCH * LENGTH), "8192"]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _plot(histories: dict[str, list[dict]], teacher_perplexity: float, path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, history in histories.items():
        for axes, key in ((left, "ce"), (right, "eval_perplexity")):
            points = [(row["step"], row[key]) for row in history if key in row]
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
    left.set(xlabel="step", ylabel="cross-entropy, nats per token", title="training text")
    right.axhline(teacher_perplexity, color="gray", linestyle="--", label="teacher")
    right.set(xlabel="step", ylabel="perplexity", yscale="log", title="held-out text")
    right.legend()
    figure.savefig(path, dpi=120)


def _report(results: dict[str, Any], folder: Path) -> None:
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
        f"{results['seconds']:.0f} s in all. In {folder}: results.json, curves.png and the"
        " distilled student. To load it:"
    )
    print(f'    transformers.AutoModelForCausalLM.from_pretrained("{folder}")')
