"""The training loop: read it top-down, from `distill` to what it leaves on disk."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, set_seed
from datasets import Dataset
from tqdm.auto import tqdm

from fastkd.divergences import Divergence
from fastkd.loss import KDParts, kd_loss
from fastkd.recipes.lm import find_head, logits_of
from fastkd.sources import LMHead
from fastkd.training.config import DistillConfig, InputError
from fastkd.training.data import (
    IGNORED,
    Collator,
    batches_per_epoch,
    encode,
    eval_batches,
    load_rows,
    train_batches,
)
from fastkd.training.evaluate import evaluate
from fastkd.training.measure import peak_memory
from fastkd.training.models import open_student, open_teacher, open_tokenizer
from fastkd.training.optim import make_optimizer, make_scheduler
from fastkd.training.outputs import Log, checkpoint_to_resume, resume, save_checkpoint, save_model

# What the log calls the parts of the loss; an average over the target tokens of the steps.
MEASURES = {
    "loss": "loss",
    "kd": "divergence",
    "ce": "cross_entropy",
    "teacher_entropy": "teacher_entropy",
    "student_entropy": "student_entropy",
    "top1_agreement": "top1_agreement",
}


@dataclass
class Run:
    """What a finished run leaves.

    Attributes:
        output: the folder with the model.
        scores: the last evaluation; empty without held-out data.
        history: the lines of the log.
        seconds: how long training took, without evaluations and checkpoints.
    """

    output: Path
    scores: dict[str, float]
    history: list[dict[str, float]]
    seconds: float


def distill(config: DistillConfig) -> Run:
    """Train `config.student` under `config.teacher`, and save it in `config.output`.

    Raises:
        InputError: settings, models or data that do not go together; before any training.
        FloatingPointError: the loss is no longer finite.
    """
    config.check()
    output = Path(config.output)
    checkpoint = checkpoint_to_resume(config.resume_from_checkpoint, output)
    if (output / "config.json").exists() and not (config.overwrite or checkpoint):
        raise InputError(
            f"{output} already holds a model: name another --output, or pass --overwrite"
        )
    tokenizer, vocab = open_tokenizer(config)
    divergence = config.build_divergence()
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise InputError(
            "accelerate is set to compile the model (dynamo_backend"
            f" {accelerator.state.dynamo_plugin.backend.value}), which this loop does not support"
        )
    set_seed(config.seed)
    with accelerator.main_process_first():  # the others read what the first one has cached
        train_rows, eval_rows = _open_data(config, tokenizer)

    student, teacher = open_student(config), open_teacher(config)
    student, optimizer = accelerator.prepare(student, make_optimizer(config, student))
    bare = accelerator.unwrap_model(student)
    # accelerate's wrapper would copy the logits to fp32; the loop enters autocast itself.
    vars(bare).pop("forward", None)
    if teacher is not None:
        teacher.to(accelerator.device)
    heads = (None, None)
    if teacher is not None and config.logits == "auto":
        ids = torch.tensor([train_rows[0]["input_ids"]], device=accelerator.device)
        with accelerator.autocast():
            heads = find_head(bare, ids), find_head(teacher, ids)

    accumulate = config.gradient_accumulation_steps
    world, rank = accelerator.num_processes, accelerator.process_index
    size = batches_per_epoch(len(train_rows), config.batch_size, world)
    if not size:
        raise InputError(f"{len(train_rows)} rows cannot be shared by {world} processes")
    steps = config.max_steps or math.ceil(config.epochs * math.ceil(size / accumulate))
    scheduler = make_scheduler(config, optimizer, steps)
    accelerator.register_for_checkpointing(scheduler)
    # What decides which rows a step sees: a resumed run must agree.
    order = {
        "rows": len(train_rows),
        "batch_size": config.batch_size,
        "accumulation": accumulate,
        "processes": world,
        "seed": config.seed,
    }
    done = resume(accelerator, checkpoint, order) if checkpoint else 0

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate = Collator(pad or 0)
    groups = train_batches(
        train_rows, collate, config.batch_size, accumulate, world, rank, config.seed, done
    )
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        config.save(output / "fastkd.yaml")
        _announce(config, student, teacher, heads, train_rows, eval_rows, steps)
    bar = tqdm(total=steps, initial=done, disable=not accelerator.is_main_process, desc=output.name)
    log = Log(output / "log.jsonl", done, bar)
    scores, paused, started = {}, 0.0, time.perf_counter()
    # Since the last line of the log: measures and targets; time; steps.
    sums, window, logged = torch.zeros(len(MEASURES) + 1, device=accelerator.device), started, done

    for step in range(done + 1, steps + 1):
        micro_batches = next(groups)
        # Every target token of the step counts the same, in whichever micro-batch and process.
        targets = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in micro_batches)
        num_items = accelerator.reduce(targets.to(accelerator.device), "sum")
        for i, batch in enumerate(micro_batches, 1):
            batch = {name: x.to(accelerator.device, non_blocking=True) for name, x in batch.items()}
            labels = batch.pop("labels")
            with nullcontext() if i == len(micro_batches) else accelerator.no_sync(student):
                with accelerator.autocast():
                    logits, target = logits_of(student, heads[0], batch), None
                    if teacher is not None:
                        with torch.no_grad():
                            target = logits_of(teacher, heads[1], batch)
                    parts = _loss(logits, target, labels, num_items, divergence, vocab, config)
                del logits, target
                # Data parallelism averages over processes, but the loss is per token of them all.
                accelerator.backward(parts.loss * world)
            measures = [getattr(parts, name) for name in MEASURES.values()]
            for k, measure in enumerate(measures):
                if measure is not None:
                    sums[k] += measure.detach()
        sums[-1] += targets
        norm = accelerator.clip_grad_norm_(student.parameters(), config.max_grad_norm or math.inf)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            scheduler.step()
        optimizer.zero_grad()
        bar.update()

        if step == steps or step % config.logging_steps == 0:
            *totals, tokens = accelerator.reduce(sums, "sum").tolist()
            n, now = step - logged, time.perf_counter()
            named = zip(MEASURES, totals, measures, strict=True)
            row = {
                "step": step,
                **{name: total / n for name, total, x in named if x is not None},
                "lr": lr,
                "grad_norm": float(norm),
                "tokens_per_second": tokens / (now - window),
                "peak_memory_mb": peak_memory(accelerator.device),
            }
            log.write(row)
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"the loss is {row['loss']} at step {step}: try a lower --learning_rate, or"
                    " bf16"
                )
            sums, window, logged = torch.zeros_like(sums), now, step
        pause = time.perf_counter()
        due = step == steps or (config.eval_steps and step % config.eval_steps == 0)
        if due and eval_rows is not None:
            held_out = eval_batches(eval_rows, collate, config.batch_size, world, rank)
            scores = evaluate(bare, held_out, accelerator, teacher, heads)
            log.write({"step": step} | {f"eval_{name}": value for name, value in scores.items()})
        if config.save_steps and step % config.save_steps == 0:
            limit = config.save_total_limit
            save_checkpoint(accelerator, output, step, bare, tokenizer, order, limit)
        pause = time.perf_counter() - pause
        window, paused = window + pause, paused + pause

    seconds = time.perf_counter() - started - paused
    bar.close()
    if accelerator.is_main_process:
        save_model(output, bare, tokenizer)
        kind = "peft.AutoPeft" if config.lora_r else "transformers.Auto"
        print(f"The model is in {output}. To load it:")
        print(f'    {kind}ModelForCausalLM.from_pretrained("{output}")')
    accelerator.wait_for_everyone()
    return Run(output, scores, log.rows, seconds)


def _loss(
    student: torch.Tensor | LMHead,
    teacher: torch.Tensor | LMHead | None,
    labels: torch.Tensor,
    num_items: torch.Tensor,
    divergence: Divergence,
    vocab: str,
    config: DistillConfig,
) -> KDParts:
    if teacher is None:
        rows = student[:, :-1].flatten(0, 1).float()
        total = F.cross_entropy(
            rows, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss = total / num_items
        return KDParts(loss, loss.new_zeros(()), loss.detach(), num_items)
    return kd_loss(
        student,
        teacher,
        labels,
        divergence=divergence,
        temperature=config.temperature,
        alpha=config.alpha,
        shift=True,
        num_items=num_items,
        vocab=vocab,
        inplace=True,
        return_parts=True,
    )


def _open_data(config: DistillConfig, tokenizer: Any) -> tuple[Dataset, Dataset | None]:
    rows, held_out = load_rows(config.data, config.data_split, config.data_name), None
    if config.eval_data:
        held_out = load_rows(config.eval_data, config.data_split, config.data_name)
    elif config.eval_fraction and len(rows) > 1:
        count = max(1, round(config.eval_fraction * len(rows)))
        parts = rows.train_test_split(count, seed=config.seed)
        rows, held_out = parts["train"], parts["test"]
    train = encode(rows, tokenizer, config.max_length, config.packing)
    return train, None if held_out is None else encode(
        held_out, tokenizer, config.max_length, config.packing
    )


def _announce(config, student, teacher, heads, train_rows, eval_rows, steps) -> None:
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    frozen = (
        "no teacher"
        if teacher is None
        else f"a teacher of {sum(p.numel() for p in teacher.parameters()):,}"
    )
    held_out = 0 if eval_rows is None else len(eval_rows)
    print(
        f"{trained:,} parameters to train under {frozen};"
        f" {len(train_rows):,} sequences, {held_out:,} held out"
    )
    print(
        f"{steps:,} steps of {config.batch_size} x {config.gradient_accumulation_steps}"
        " sequences per device"
    )
    if teacher is not None:
        ways = ["whole" if head is None else "in chunks, from hidden states" for head in heads]
        print(f"logits: the student's {ways[0]}; the teacher's {ways[1]}")
