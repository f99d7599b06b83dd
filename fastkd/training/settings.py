"""All that `fastkd distill` can be told, beside what transformers' `TrainingArguments` hold.

Fields are flags, and keys of a `--config` file. Imports nothing heavy: `--help` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FORMATS = (
    "text | prompt + completion (or response) | messages (or conversations) |"
    " instruction (+ input) + output (or response) | query + response | question + answer |"
    " input_ids (+ labels)"
)

LENGTH = 1024  # tokens of a sequence, or of a prompt, where nothing is said


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _list(text: str) -> Any:
    return field(default_factory=list, metadata={"help": text})


@dataclass
class ModelSettings:
    """The models."""

    student: str | None = _flag(
        None, "Model to train: a folder or a hub name; an adapter's folder trains that adapter on."
    )
    teacher: list[str] = _list(
        "Model to learn from, with the student's tokenizer: a folder or a hub name, an adapter's"
        " folder too. Given several times, the teachers are mixed. None: alpha must be 0."
    )
    teacher_weight: list[float] = _list(
        "Weight of each teacher in the mixture, in their order; default: equal."
    )
    teacher_mode: Literal["probabilities", "logits"] = _flag(
        "probabilities", "What of several teachers is mixed."
    )
    task: Literal["causal-lm", "masked-lm"] = _flag(
        "causal-lm", "Sort of both models: they predict the next token, or masked ones (BERT)."
    )
    student_from_teacher: str | None = _flag(
        None,
        "Make the student of the teacher's layers, and train that: every=2 keeps every second one,"
        " layers=0,3,5 these.",
    )
    vocab: Literal["strict", "shared"] = _flag(
        "strict",
        "strict: one tokenizer for both; shared: one may have tokens added after the other's last.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag(
        "auto", "Type of the teacher's weights."
    )
    student_dtype: Literal["auto", "float32", "bfloat16"] = _flag(
        "float32", "Type of the student's weights."
    )
    attn_implementation: str | None = _flag(
        None, "transformers' name: sdpa, eager, flash_attention_2, …"
    )
    logits: Literal["auto", "whole"] = _flag(
        "auto",
        "auto: made from hidden states a chunk of tokens at a time, where the model's head allows"
        " and that takes less memory; whole: as one tensor.",
    )
    trust_remote_code: bool = _flag(False, "Run model code that comes with the models.")
    lora_r: int = _flag(0, "Train adapters of this rank only (needs peft); 0: all weights.")
    lora_alpha: float | None = _flag(None, "Scale of the adapters; default: twice their rank.")
    lora_targets: list[str] = _list("Layers with adapters, by name; default: all linear ones.")
    lora_dropout: float = _flag(0.0, "Dropout before the adapters.")
    load_in_4bit: bool = _flag(
        False, "The student's frozen weights in 4 bits under the adapters (needs bitsandbytes)."
    )


@dataclass
class DataSettings:
    """The data."""

    data: list[str] = _list(
        "JSONL, JSON, parquet, CSV or text file (also .gz), a folder of these, or a hub data set."
        " Given several times, they are mixed. Columns: " + FORMATS + "."
    )
    data_weight: list[float] = _list(
        "How often a row comes from each of several data, in their order (70 30); default: every"
        " row once."
    )
    data_split: str = _flag("train", "Split of a hub data set, or of a folder with several.")
    data_name: str | None = _flag(None, "Configuration of a hub data set.")
    eval_data: str | None = _flag(None, "Held-out data, in any of the formats of --data.")
    eval_fraction: float = _flag(
        0.02, "Part of the usable rows held out when there is no --eval_data; 0: no evaluation."
    )
    max_length: int | None = _flag(
        None,
        "Tokens per sequence; longer ones are cut. Default: 1024, or the models' positions if these"
        " are fewer.",
    )
    packing: bool = _flag(
        True,
        "One document a sequence. Else those of `text` data are packed into sequences of"
        " max_length, and do not see each other, where the models can keep them apart.",
    )
    student_prompt_template: str | None = _flag(
        None, "What the student reads as the prompt: '{input}' stands for the data's."
    )
    teacher_prompt_template: str | None = _flag(
        None, "The same for the teacher, which then sees another prompt before the same response."
    )
    max_teacher_length: int | None = _flag(
        None, "Tokens per sequence of a teacher with its own prompt; default: max_length."
    )
    mlm_probability: float = _flag(0.15, "Part of the tokens masked (--task masked-lm).")


@dataclass
class LossSettings:
    """What is learnt."""

    divergence: str = _flag(
        "forward_kl",
        "forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, jeffreys, tvd, hellinger,"
        " logit_mse, taid, renyi, alpha_beta, or a sum: 0.5*forward_kl+0.5*tvd.",
    )
    divergence_args: list[str] = _list(
        "The divergence's numbers, as in: --divergence_args teacher_weight=0.3, or"
        " t=0.1..0.9 for a line from 0.1 at the start to 0.9 at the end."
    )
    temperature: str = _flag(
        "1.0",
        "Divides both sides' logits in the divergence (not in the cross-entropy); 4..1: a line"
        " from 4 at the start to 1 at the end.",
    )
    alpha: str = _flag(
        "1.0",
        "loss = alpha * T^2 * divergence + (1 - alpha) * cross-entropy; 1..0.5: a line.",
    )
    hidden_loss: Literal["cosine", "mse", "rkd"] | None = _flag(
        None,
        "Beside it, a loss of the hidden states: cosine, mse (through a projection where the"
        " widths differ), rkd (distances and angles between sequences).",
    )
    hidden_weight: float = _flag(1.0, "Its weight.")
    on_policy: float = _flag(
        0.0, "Part of the batches whose responses the student writes itself (GKD's lambda)."
    )
    on_policy_max_new_tokens: int = _flag(128, "Longest response that the student writes.")
    on_policy_temperature: float = _flag(1.0, "Temperature at which it writes; 0: greedily.")
    finetune_epochs: float = _flag(
        0.0, "A second stage: so many passes on the labels alone, after the distillation."
    )


@dataclass
class RunSettings:
    """The run, and its folder."""

    overwrite: bool = _flag(
        False,
        "Write into an output folder that is not empty: what an earlier run of fastkd wrote there"
        " is removed, all else is left.",
    )
    resume: bool = _flag(
        False, "Go on from the newest complete checkpoint in the output folder, if there is one."
    )
    save_minutes: float = _flag(0.0, "Save a checkpoint every so many minutes as well; 0: no.")
    early_stopping_patience: int = _flag(
        0, "Stop after so many evaluations without a better one; 0: no."
    )


@dataclass
class GenerateSettings:
    """`fastkd generate`: a teacher answers prompts."""

    teacher: str | None = _flag(None, "Model that answers: a folder or a hub name.")
    data: list[str] = _list(
        "Prompts, in any of the formats of `fastkd distill --data`; answers there are left out."
    )
    output: str | None = _flag(
        None,
        "JSONL file of the answers, as `fastkd distill --data` reads it. One that an interrupted"
        " run of the same settings left is gone on with.",
    )
    overwrite: bool = _flag(False, "Replace such a file of other settings.")
    data_split: str = _flag("train", "Split of a hub data set, or of a folder with several.")
    data_name: str | None = _flag(None, "Configuration of a hub data set.")
    prompt_template: str | None = _flag(
        None, "What the teacher reads as the prompt: '{input}' stands for the data's."
    )
    limit: int | None = _flag(None, "Only the first so many prompts.")
    batch_size: int = _flag(8, "Prompts at a time.")
    max_prompt_length: int | None = _flag(
        None,
        "Longer prompts are left out, and counted. Default: 1024, or what the model's positions"
        " leave beside the answer.",
    )
    max_new_tokens: int = _flag(256, "Longest answer, in tokens.")
    temperature: float = _flag(1.0, "Of the sampling; 0: the likeliest token always.")
    top_p: float = _flag(1.0, "Sample of the likeliest tokens that hold this much.")
    top_k: int = _flag(0, "Sample of so many likeliest tokens; 0: of all.")
    seed: int = _flag(0, "Of the sampling: the same prompts get the same answers.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag(
        "auto", "Type of the teacher's weights."
    )
    attn_implementation: str | None = _flag(
        None, "transformers' name: sdpa, eager, flash_attention_2, …"
    )
    trust_remote_code: bool = _flag(False, "Run model code that comes with the model.")


GROUPS = (ModelSettings, DataSettings, LossSettings, RunSettings)

# Short names of settings of `TrainingArguments`.
SHORT = {
    "output": "output_dir",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "lr": "learning_rate",
    "warmup_ratio": "warmup_steps",
}
# Where our defaults are not those of `TrainingArguments`.
DEFAULTS = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1.0,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "eval_strategy": "steps",
    "eval_steps": 500,
    "eval_on_start": True,
    "save_steps": 500,
    "report_to": "none",
    "seed": 0,
}
# What `--help` says of `TrainingArguments`; all the others are taken as well.
TRAINING = {
    "output_dir": "Folder for the model, the log and the checkpoints (--output).",
    "max_steps": "Optimizer steps; default: what the epochs come to.",
    "num_train_epochs": "Passes over the data, unless max_steps is given (--epochs).",
    "per_device_train_batch_size": "Sequences per device and micro-batch (--batch_size).",
    "gradient_accumulation_steps": "Micro-batches per optimizer step, weighted by their tokens.",
    "learning_rate": "Peak learning rate (--lr).",
    "lr_scheduler_type": "linear, cosine, constant, … (--scheduler).",
    "warmup_steps": "Steps in which the learning rate rises; below 1: that part of all steps.",
    "optim": "adamw_torch, sgd, adafactor, … (--optimizer).",
    "weight_decay": "Weight decay of matrices; norms and biases have none.",
    "max_grad_norm": "Gradients are scaled down to this norm; 0: never.",
    "bf16": "Autocast of both models' forward passes; --fp16 on GPUs without bf16.",
    "gradient_checkpointing": "Recompute the student's activations: less memory, more time.",
    "seed": "Seeds the order of the data and dropout.",
    "logging_steps": "Steps between lines of the log; the first step has one too.",
    "eval_steps": "Steps between evaluations, beside one before the first step and one at the"
    " end; 0: only these.",
    "save_steps": "Steps between checkpoints; 0: none.",
    "save_total_limit": "Keep only this many checkpoints, the newest (and the best).",
    "load_best_model_at_end": "Keep the model of the best evaluation, not the last one.",
    "resume_from_checkpoint": "A checkpoint folder; `last`: as --resume, but one must be there.",
    "report_to": "tensorboard, wandb, …; several are separated by commas.",
}
