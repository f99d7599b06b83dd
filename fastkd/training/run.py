"""`fastkd distill`, read top-down: from settings to a model in its folder."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

from datasets import Dataset
from safetensors import SafetensorError
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from fastkd.integrations.transformers import DistillationTrainer
from fastkd.recipes import LM, OnPolicy, evaluate
from fastkd.recipes.teachers import teachers_part
from fastkd.training.build import check_settings, make_objective
from fastkd.training.config import Config
from fastkd.training.curves import draw
from fastkd.training.data import Read, collator, keeps_documents_apart, open_data
from fastkd.training.errors import InputError, one_line
from fastkd.training.models import (
    check_models,
    describe,
    longest,
    open_student,
    open_teachers,
    open_tokenizer,
)
from fastkd.training.outputs import CHECKPOINT, Folder, is_complete, read_checkpoint, read_record
from fastkd.training.settings import LENGTH, DataSettings, ModelSettings
from fastkd.training.trainer import FolderTrainer, Interrupt, Lines, Log, Progress, points

# What a run that goes on must agree with: of `TrainingArguments` these, of our own all but those.
DECIDES = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16",
    "seed", "data_seed", "average_tokens_across_devices", "neftune_noise_alpha",
    "train_sampling_strategy", "dataloader_drop_last",
)  # fmt: skip
MAY_CHANGE = (
    "overwrite", "resume", "save_minutes", "early_stopping_patience", "eval_data", "logits",
    "attn_implementation",
)  # fmt: skip
EXTENT = ("max_steps", "num_train_epochs")  # may change too, and is said


# Of `TrainingArguments`.
NOT_NEGATIVE = (
    "learning_rate", "weight_decay", "max_grad_norm", "save_steps", "eval_steps", "logging_steps",
)  # fmt: skip
LOWER_IS_BETTER = ("loss", "perplexity", "kl")  # of what an evaluation measures


class Run(NamedTuple):
    """What a run leaves.

    Attributes:
        output: the folder with the model.
        scores: the last evaluation; empty without held-out data.
        history: the lines of the log.
        seconds: how long training took, with its evaluations and checkpoints.
        interrupted: Ctrl-C ended it before its last step.
    """

    output: Path
    scores: dict[str, float]
    history: list[dict[str, Any]]
    seconds: float
    interrupted: bool = False


def distill(config: Config) -> Run:
    """Train `config.models.student` and save it in `config.training.output_dir`; with
    `finetune_epochs` in two stages, the first of them in a folder beside it.

    Raises:
        InputError: settings, models or data that do not go together; before any training.
        FloatingPointError: loss or weights are no longer finite; before the next checkpoint.
    """
    if not config.loss.finetune_epochs:
        return train(config)
    output = config.training.output_dir
    between = f"{Path(output)}-distilled"  # a slash at its end is no part of its name
    first, second = _copy(config), _copy(config)
    first.training.output_dir = between
    first.loss.finetune_epochs = second.loss.finetune_epochs = 0.0
    second.models.student, second.models.teacher = between, []
    second.models.student_from_teacher, second.models.lora_r = None, 0
    second.loss.alpha, second.loss.hidden_loss, second.loss.on_policy = "0", None, 0.0
    second.training.num_train_epochs = config.loss.finetune_epochs
    second.training.max_steps = -1
    check_settings(first.models, first.loss)
    Folder(output, config.run.overwrite, config.run.resume)  # refused now, not after hours
    done = read_record(Path(between)) or {}
    if not (config.run.resume and done.get("finished")):
        run = train(first)
        if run.interrupted:
            return run
    return train(second)


def _copy(config: Config) -> Config:
    return Config(*map(copy.copy, config))


def train(config: Config) -> Run:
    """One stage."""
    disable_progress_bar()  # of files being opened; the training's own is not one of these
    run, args = config.run, config.training
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # or torch warns that there is no GPU
    say = print if args.process_index == 0 else _silent
    _check(config)
    folder, checkpoint = _folder(config)

    opened = _open(config, say)
    config, read = opened.config, opened.read
    about = _about(config, read.train)
    if checkpoint is not None:
        _check_same(checkpoint, about, say)
    elif run.resume:
        say(f"nothing to go on from in {folder.path}: starting")
    _set_evaluation(config, read, checkpoint)
    interrupt = Interrupt(run.save_minutes)
    progress = Lines() if args.disable_tqdm else Progress()
    callbacks = [interrupt, Log(folder, config.save)]
    if run.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(run.early_stopping_patience))
    trainer = _make_trainer(opened, folder, about, callbacks)
    trainer.add_callback(progress)
    if read.held_out is not None and checkpoint is None:
        for i, perplexity in enumerate(_perplexities(trainer, opened.teachers)):
            which = f"teacher {i + 1}" if len(opened.teachers) > 1 else "the teacher"
            say(f"held out: {which} has a perplexity of {perplexity:.4g}")

    with interrupt, closing(progress):
        try:
            result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except ImportError as error:  # of an optimizer, say: what a setting needs
            raise InputError(one_line(error)) from error
        except (UnpicklingError, EOFError, SafetensorError) as error:
            if checkpoint is None:
                raise
            raise InputError(f"{checkpoint} is broken: {one_line(error, 100)}") from error
    state = trainer.state
    stopped = f"stopped at step {state.global_step} of {state.max_steps}"
    if interrupt.interrupted and state.global_step < state.max_steps:
        say(f"{stopped}, and saved there; the same command with --resume goes on")
        return Run(folder.path, {}, points(state.log_history), _seconds(result), True)
    if state.global_step < state.max_steps:
        say(f"{stopped}: {run.early_stopping_patience} evaluations in a row were no better")
    trainer.check_finite()
    return _finish(trainer, folder, result, say)


class Opened(NamedTuple):
    """What a run needs of files, and its settings with the length of sequences."""

    config: Config
    tokenizer: Any
    vocab: str
    read: Read
    student: nn.Module
    teachers: list[nn.Module]


def _open(config: Config, say: Callable) -> Opened:
    """Models and data, after what can be checked without them."""
    models = config.models
    tokenizer, vocab, sizes = open_tokenizer(models)
    if config.data.max_length is None:
        config = config._replace(data=_with_length(models, config.data, say))
    for text in check_models(models, config.data, config.training):
        say(text)
    # Of a packed row nobody could tell where a response that is written anew would stand.
    packing = config.data.packing and not config.loss.on_policy
    read = _read(config, tokenizer, sizes, packing)
    if config.loss.on_policy and _is_packed(read):
        raise InputError(
            "--on_policy needs one document a row, and position_ids or seq_lengths pack several"
        )
    student, teachers = open_student(models), open_teachers(models)
    if _is_packed(read) and not all(map(keeps_documents_apart, (student, *teachers))):
        read = _read(config, tokenizer, sizes, False)
        if _is_packed(read):
            raise InputError(
                "rows hold several documents (position_ids, seq_lengths), and a model lets them"
                " see each other: give each its own row"
            )
        say("packing is off: a model lets packed documents see each other")
    for text in (*read.report, *describe(student, teachers)):
        say(text)
    return Opened(config, tokenizer, vocab, read, student, teachers)


def _is_packed(read: Read) -> bool:
    parts = (read.train, read.held_out)
    return any(x is not None and "position_ids" in x.column_names for x in parts)


def _make_trainer(
    opened: Opened, folder: Folder, about: dict[str, Any], callbacks: list[TrainerCallback]
) -> FolderTrainer:
    config, tokenizer, vocab, read, student, teachers = opened
    models = config.models
    try:
        trainer = FolderTrainer(
            model=student,
            args=config.training,
            teacher_model=teachers or None,
            teacher_weights=models.teacher_weight or None,
            teacher_mode=models.teacher_mode,
            objective=make_objective(config.loss, vocab, student, teachers),
            logits=models.logits,
            train_dataset=read.train,
            eval_dataset=read.held_out,
            data_collator=collator(tokenizer, models.task, config.data.mlm_probability),
            processing_class=tokenizer,
            callbacks=callbacks,
            folder=folder,
            about=about,
            rewrite=_on_policy(config, student, tokenizer),
        )
    except (ValueError, ImportError, OSError) as error:  # settings, packages, the hub
        raise error if isinstance(error, InputError) else InputError(one_line(error)) from error
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _check(config: Config) -> None:
    """What can be seen to be wrong without opening a file."""
    models, data, loss, _, args, _ = config
    check_settings(models, loss)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != args.world_size:  # each would write as if it were alone
        raise InputError(
            f"{started} processes were started, and do not know of each other: without GPUs,"
            " --use_cpu connects them"
        )
    if not args.output_dir or args.output_dir == "trainer_output":
        raise InputError("--output is missing")
    place = Path(args.output_dir).resolve()
    for name in filter(None, (models.student, *models.teacher)):
        path = Path(name).expanduser().resolve()
        inside = path.parent == place and CHECKPOINT.fullmatch(path.name)
        if path.exists() and (path == place or inside):
            raise InputError(f"--output {args.output_dir} holds {name}: name another folder")
    if not data.data:
        raise InputError("--data is missing")
    if not (models.student or models.student_from_teacher):
        raise InputError("--student is missing")
    _check_numbers(config)
    if args.label_smoothing_factor:
        raise InputError("label_smoothing_factor has no part in a distillation: leave it at 0")
    if loss.on_policy and data.teacher_prompt_template is not None:
        raise InputError("on_policy and teacher_prompt_template do not go together")
    try:
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()  # looks for its package
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(f"--report_to: {one_line(error)}") from error


def _check_numbers(config: Config) -> None:
    data, run, args = config.data, config.run, config.training
    for name in ("max_length", "max_teacher_length"):
        if getattr(data, name) is not None and getattr(data, name) < 2:
            raise InputError(f"{name} must be at least 2, got {getattr(data, name)}")
    if not 0 <= data.eval_fraction < 1:
        raise InputError(f"eval_fraction must be in [0, 1), got {data.eval_fraction}")
    for name in (
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    ):  # fmt: skip
        if getattr(args, name) < 1:
            raise InputError(f"{name} must be positive, got {getattr(args, name)}")
    for part, name in (
        *((args, name) for name in NOT_NEGATIVE),
        (run, "save_minutes"),
        (run, "early_stopping_patience"),
    ):
        value = getattr(part, name) or 0
        if not (value >= 0 and math.isfinite(value)):
            raise InputError(f"{name} must not be negative, got {value}")
    for name in ("seed", "data_seed"):
        if not 0 <= (getattr(args, name) or 0) < 2**32:
            raise InputError(f"{name} must be in [0, 2^32), got {getattr(args, name)}")
    if args.max_steps == 0 or (args.max_steps < 0 and not 0 < args.num_train_epochs < math.inf):
        raise InputError(
            f"nothing to train: max_steps is {args.max_steps}, epochs is {args.num_train_epochs}"
        )
    if args.save_total_limit is not None and args.save_total_limit < 1:
        raise InputError(f"save_total_limit must be at least 1, got {args.save_total_limit}")
    if not 0 < data.mlm_probability < 1:
        raise InputError(f"mlm_probability must be in (0, 1), got {data.mlm_probability}")


def _with_length(models: ModelSettings, data: DataSettings, say: Callable) -> DataSettings:
    """`max_length`, where nobody has named it."""
    own = data.teacher_prompt_template is not None and data.max_teacher_length is not None
    length = longest(models, student_only=own)
    if length < LENGTH:
        say(f"sequences are cut to {length:,} tokens: the models have no more positions")
    return dataclasses.replace(data, max_length=length)


def _read(config: Config, tokenizer: Any, sizes: Any, pack: bool) -> Read:
    """The data; the other processes read what the first one has cached."""
    data = dataclasses.replace(config.data, packing=pack)
    with config.training.main_process_first(desc="reading the data"):
        return open_data(
            data,
            tokenizer,
            seed=config.training.seed,
            vocab_size=min(sizes),
            pack=pack,
            task=config.models.task,
        )


def _folder(config: Config) -> tuple[Folder, Path | None]:
    """Where the run writes, and the checkpoint that it goes on from, if it does."""
    run, output = config.run, Path(config.training.output_dir)
    name = config.training.resume_from_checkpoint
    newest = name is None or name in ("last", "true", "True")
    found = None if newest else Path(name).expanduser()
    if found is None:
        folder = Folder(output, run.overwrite, run.resume or name is not None)
        found = folder.newest() if folder.goes_on else None
        if found is None and name is not None:
            raise InputError(f"{output} has no complete checkpoint to go on from")
        if found is None:
            return folder, None
    elif not found.is_dir():
        raise InputError(f"--resume_from_checkpoint {name}: no such folder")
    elif not is_complete(found):
        raise InputError(f"{name} is no complete checkpoint of fastkd")
    else:
        # From elsewhere it is a new run, which needs a folder of its own.
        inside = found.resolve().parent == output.resolve()
        folder = Folder(output, run.overwrite, inside or run.resume)
        if folder.goes_on and read_checkpoint(found)["run"] != folder.run:
            raise InputError(
                f"{found} is of another run than {output} holds: name another --output"
            )
    if not any(found.glob("rng_state*")):
        raise InputError(
            f"{found} holds the model alone (--save_only_model), without the optimizer's state: a"
            " new run may start from it: --student"
        )
    return folder, found


def _about(config: Config, rows: Dataset) -> dict[str, Any]:
    """What a run that goes on must agree with."""
    chosen = {k: x for k, x in config.ours.items() if k not in MAY_CHANGE}
    for name in ("student", "teacher", "data"):
        named = chosen[name]
        several = isinstance(named, list)
        chosen[name] = [_whole(x) for x in named] if several else named and _whole(named)
    every = config.as_dict()
    chosen |= {k: every.get(k) for k in (*DECIDES, *EXTENT)}
    return {
        "settings": chosen | {"processes": config.training.world_size},
        "data": _fingerprint(rows),
    }


def _whole(name: str) -> str:
    """A path as it is from everywhere; other names as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _fingerprint(rows: Dataset) -> str:
    """Of what is trained on, in its order."""
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(1000):
        for name in sorted(set(batch.column_names) - {"use_cache"}):
            column = batch.column(name).combine_chunks()
            digest.update(f"{name} {len(column)} ".encode())
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _check_same(checkpoint: Path, about: dict[str, Any], say: Any) -> None:
    """Refuse to go on with another loss, data or optimizer; say what else has changed."""
    before, now = read_checkpoint(checkpoint), about["settings"]
    was = before["settings"]
    changed = [k for k in now if now[k] != was.get(k)]
    refused = [f"{k} was {was.get(k)}, is {now[k]}" for k in changed if k not in EXTENT]
    if refused:
        raise InputError(
            f"{checkpoint} cannot go on with other settings: {'; '.join(refused)}. A new run may"
            " start from its weights: --student"
        )
    if before["data"] != about["data"]:
        raise InputError(
            f"{checkpoint} cannot go on: the data, or what the tokenizer makes of them, have"
            " changed since"
        )
    for name in changed:
        say(f"{name} was {was.get(name)}, is {now[name]}: the schedule is that of now")
    say(f"going on from {checkpoint}")


def _set_evaluation(config: Config, read: Read, checkpoint: Path | None) -> None:
    args = config.training
    if read.held_out is None:
        for wanted, what in (
            (args.load_best_model_at_end, "load_best_model_at_end"),
            (config.run.early_stopping_patience, "early_stopping_patience"),
            (args.save_strategy == "best", "save_strategy best"),
        ):
            if wanted:
                raise InputError(f"{what} needs held-out data: --eval_data, or --eval_fraction")
        args.eval_strategy, args.eval_on_start = "no", False
    if checkpoint is not None:
        args.eval_on_start = False
    if config.run.early_stopping_patience:
        if args.eval_strategy == "no":
            raise InputError("early_stopping_patience needs evaluations: --eval_steps")
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    measured = ["loss", "perplexity", *(["kl", "top1_agreement"] if config.models.teacher else [])]
    if metric not in measured:
        raise InputError(f"metric_for_best_model is {metric}; known: {', '.join(measured)}")
    args.metric_for_best_model = metric
    if "greater_is_better" not in config.given:
        args.greater_is_better = metric not in LOWER_IS_BETTER


def _on_policy(config: Config, student: Any, tokenizer: Any) -> OnPolicy | None:
    if not config.loss.on_policy:
        return None
    return OnPolicy(
        student,
        config.loss.on_policy,
        max_new_tokens=config.loss.on_policy_max_new_tokens,
        temperature=config.loss.on_policy_temperature,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _seconds(result: Any) -> float:
    return result.metrics.get("train_runtime", 0.0)


def _perplexities(trainer: DistillationTrainer, teachers: list[Any]) -> Iterator[float]:
    """Of each teacher, on this process's part of the held-out data."""
    for teacher in teachers:
        batches = map(trainer._prepare_inputs, trainer.get_eval_dataloader())
        batches = (teachers_part(batch) or batch for batch in batches)
        with trainer.accelerator.autocast():
            yield evaluate(LM(teacher), batches).get("perplexity", math.nan)


def _finish(trainer: FolderTrainer, folder: Folder, result: Any, say: Any) -> Run:
    """The last scores, the curves and the model."""
    state, scores = trainer.state, {}
    if trainer.eval_dataset is not None:
        of_now = [r for r in state.log_history if r["step"] == state.global_step]
        done = [row for row in of_now if "eval_loss" in row]
        best = trainer.args.load_best_model_at_end  # not what was evaluated last
        scores = done[-1] if done and not best else trainer.evaluate()
    history = points(state.log_history)
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.args.should_save:

        def make(path: Path) -> None:
            model.config.use_cache = True  # which Trainer had set to False, for the training
            model.save_pretrained(path, state_dict=weights)
            trainer.processing_class.save_pretrained(path)
            (path / "README.md").unlink(missing_ok=True)  # peft's, without a word on this model

        folder.fill(make)
        draw(history, folder.own("curves.png"))
        folder.finish()
    trainer.accelerator.wait_for_everyone()
    adapter = (folder.path / "adapter_config.json").exists()
    masked = type(model).__name__.endswith("ForMaskedLM")
    loader = "peft.AutoPeft" if adapter else "transformers.Auto"
    say(f"The model is in {folder.path}. To load it:")
    task = "MaskedLM" if masked and not adapter else "CausalLM"
    say(f'    {loader}ModelFor{task}.from_pretrained("{folder.path}")')
    return Run(folder.path, scores, history, _seconds(result))


def _silent(*args: Any) -> None:
    pass
