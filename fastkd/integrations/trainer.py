"""Distillation in Hugging Face's Trainer, and in any of its subclasses."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fastkd.integrations.teachers import Frozen, teacher_of
from fastkd.loss import KDLoss
from fastkd.recipes.lm import LM, TEACHERS_PREFIX, looks_ahead, shifts_labels
from fastkd.recipes.objectives import IGNORED, Distil, Plus
from fastkd.recipes.recipe import Batch, Learnt, Objective, Outputs, Teacher
from fastkd.recipes.rollouts import OnPolicy
from fastkd.recipes.teachers import Mixture, Prompted

SETTINGS = frozenset(inspect.signature(KDLoss).parameters)
OBJECTIVE = "objective.safetensors"  # in a checkpoint: what an objective has learnt
REWRITE = "rewrite.json"  # and the state of what rewrites batches
MANY = 1e30  # items: what is divided by them is nothing


class DistillationMixin:
    """Makes any subclass of `transformers.Trainer` distil.

        class SFTDistillationTrainer(DistillationMixin, trl.SFTTrainer): ...

    The data, their collator, the optimizer, checkpoints and all else are the trainer's below; the
    loss is an objective's (fastkd.recipes) of what student and teacher say of each batch. A step's
    loss and gradient are those of its whole batch at once, however it is cut into micro-batches and
    processes.

    Args:
        *args: of the trainer below.
        **kwargs: of the trainer below; and `KDLoss`'s keywords (`divergence`, `temperature`,
            `alpha`, `compensate`, `vocab`, `workspace_bytes`, …), for `Distil`. Those that may be
            schedules are functions of the progress in [0, 1]. `teacher_mode`: the mode of
            `Ensemble` for several teachers.
        teacher_model: who is learnt from: a model; a name or a path, of a PEFT adapter too, which
            is merged into its base; a list of these, which are mixed; or a `Teacher` of
            fastkd.recipes, any function of a batch. Models are frozen, kept in evaluation mode,
            and brought to the device, unless they are on an accelerator of their own already; under
            FSDP2 and ZeRO-3 they are sharded as the student is. None: alpha must be 0.
        teacher_model_init_kwargs: `from_pretrained`'s, for names and paths.
        teacher_weights: of several teachers; default: equal.
        objective: what is learnt, in place of the keywords above.
        logits: "auto" or "whole", of `LM`, for both sides.
        rewrite: called with the list of a step's micro-batches before their tokens are counted;
            returns the ones to train on. Or override `prepare_batches`.

    Raises:
        TypeError, ValueError: settings that do not fit together, in one line.

    Logged beside `loss`: the objective's measures (`kd`, `ce`, …), averages over all tokens since
    the last line. Evaluation gives `loss`, `perplexity`, `kl` (forward, at temperature 1) and
    `top1_agreement` over all tokens that count; `compute_metrics` sees the student's whole logits.
    """

    loss_is_scaled_for_ga = True  # by the items of the step: the trainer must not divide again

    def __init__(
        self,
        *args: Any,
        teacher_model: Any = None,
        teacher_model_init_kwargs: dict[str, Any] | None = None,
        teacher_weights: list[float] | None = None,
        objective: Objective | None = None,
        logits: str = "auto",
        rewrite: Callable[[list[Batch]], list[Batch]] | None = None,
        **kwargs: Any,
    ):
        settings = {name: kwargs.pop(name) for name in SETTINGS & set(kwargs)}
        mode = kwargs.pop("teacher_mode", "probabilities")
        if objective is not None and settings:
            raise ValueError(f"{', '.join(sorted(settings))} cannot be set beside an objective")
        if teacher_model is None and objective is None and settings.get("alpha", 1.0) != 0:
            raise ValueError("teacher_model is needed, unless alpha is 0 (the labels alone)")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would replace the loss: give an objective instead")
        super().__init__(*args, **kwargs)
        self._check()
        if self.model_init is not None and isinstance(rewrite, OnPolicy):
            raise ValueError(
                "OnPolicy writes with the model that it was given, and model_init makes the student"
                " anew: override prepare_batches instead"
            )
        self.label_names = self.label_names or ["labels"]  # of models that name none
        self.model_accepts_loss_kwargs = True  # of trainers without `loss_is_scaled_for_ga`
        self.logits, self.rewrite = logits, rewrite
        shift = settings.pop("shift", shifts_labels(self.model))
        self.objective = Distil(shift, **settings) if objective is None else objective
        self._prepare_objective()
        self._measuring = _measuring(self.objective, shift)
        if self._measuring.shift:
            self._refuse_looking_ahead()
        self.teacher: Teacher | None = teacher_of(
            teacher_model, self.model, self.accelerator,
            logits=logits, init_kwargs=teacher_model_init_kwargs, weights=teacher_weights,
            mode=mode,
        )  # fmt: skip
        models = isinstance(self.teacher, Frozen | Mixture)
        self._prompted = Prompted(self.teacher, self._measuring.shift) if models else None
        self._measures: dict[str, Tensor] = {}  # since the last line of the log
        self._measured_from = 0
        self._evaluated: dict[str, Tensor] = {}

    def _check(self) -> None:
        args = self.args
        kind = getattr(args, "loss_type", "nll")  # TRL's
        if kind != "nll":
            raise ValueError(f"loss_type={kind!r} is not part of the loss: leave it at 'nll'")
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} is not part of the loss: the"
                " teacher is what smooths labels; leave it at 0"
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"one process has {args.n_gpu} GPUs (DataParallel): start one process for each, by"
                " torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES"
            )
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (parallel.cp_size > 1 or getattr(parallel, "sp_size", 1) > 1):
            raise ValueError("sequences cut over processes (cp_size, sp_size) are not supported")

    def _refuse_looking_ahead(self) -> None:
        """A causal head on a model that looks both ways has every label in view."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        partly = plugin is not None and plugin.zero_stage == 3
        # The first process may have all the weights, or each a part that needs the others'.
        sharded = any(type(p).__name__ == "DTensor" for p in self.model.parameters())
        if partly or not (sharded or self.accelerator.is_local_main_process):
            return
        if looks_ahead(self.model):
            raise ValueError(
                f"{type(self.model).__name__} predicts the next token, but looks at it: later"
                " tokens change earlier logits (is_decoder=False?)"
            )

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Parameters without a part in the loss (a vision tower under text) would stop DDP; the
        trainer allows for them, but not with gradient checkpointing, of which only the reentrant
        form fails on it."""
        reentrant = (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        if self.args.ddp_find_unused_parameters is None and not reentrant:
            self.args.ddp_find_unused_parameters = True
        return super()._build_accelerator_args(**kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any):
        """An evaluation before the training has marked the model as prepared: it would not be
        wrapped any more, and each process would train a model of its own."""
        self._measures = {}  # of a run before this one, or of one that was broken off
        model = self.model
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("no parameter of the student requires a gradient: was it a teacher?")
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.model_wrapped is model and not sharded:
            for name in ("_is_accelerate_prepared", "_original_forward"):
                found = vars(model).pop(name, None)
            if found is not None:
                model.forward = found
        return super()._prepare_for_training(*args, **kwargs)

    # The batches of a step, and how much of them counts.

    def prepare_batches(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of a step as they are trained on: a place for batches that the student
        writes itself. Called on each process with its own."""
        return batches if self.rewrite is None else self.rewrite(batches)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._learns:
            self.objective.zero_grad()
        batches = list(islice(epoch_iterator, num_batches))
        if batches and batches[-1].get("labels") is not None:
            batches[-1], _ = self._without_repeats(batches[-1])
        count = len(batches)
        batches = list(self.prepare_batches(batches))
        if len(batches) != count:  # by which the trainer knows when the step is over
            raise ValueError(f"of a step's {count} micro-batches, rewriting left {len(batches)}")
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples, device):
        """(k,) what the averages of the step are over: of all processes, where they are averages
        over all tokens, else of this one."""
        if not batch_samples:
            return None
        for batch in batch_samples:
            if batch.get("labels") is None:
                others = ", ".join(name for name in batch if name != "labels")
                raise ValueError(
                    f"a batch has no labels, only {others}: use a data collator that"
                    " makes them, as DataCollatorForLanguageModeling(tokenizer, mlm=False)"
                )
        counts = sum(self.objective.counts(batch) for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices:
            counts = self.accelerator.reduce(counts, "sum") / self.get_tp_size()
        return counts

    # The loss.

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scale = 1
        if num_items_in_batch is None:
            num_items_in_batch = self.objective.counts(inputs)
        elif self.args.average_tokens_across_devices:  # gradients are averaged over processes
            scale = self.accelerator.num_processes // self.get_tp_size()
        student, teacher = self._listen(model, inputs, "whole" if return_outputs else self.logits)
        outputs = {"logits": student.logits}
        if return_outputs and torch.is_grad_enabled():  # which the gradient may overwrite
            outputs = {"logits": student.logits.detach().clone()}
        with self.accelerator.autocast():
            learnt = self.objective(student, teacher, inputs, num_items_in_batch, self.progress)
        if model.training and torch.is_grad_enabled():
            self._note(learnt, scale)
        loss = scale * learnt.loss
        return (loss, outputs) if return_outputs else loss

    @property
    def progress(self) -> float:
        """The part of the training that is done, in [0, 1]."""
        return min(1.0, self.state.global_step / max(self.state.max_steps, 1))

    def _listen(self, model: nn.Module, batch: Batch, logits: str) -> tuple[Outputs, Any]:
        """What student and teacher say of a batch."""
        hidden_states = self.objective.hidden_states
        teacher, says = self.teacher, None
        if self._prompted is not None and f"{TEACHERS_PREFIX}input_ids" in batch:
            teacher = self._prompted
        with self.accelerator.autocast():
            if teacher is not None:
                with torch.no_grad():
                    says = teacher(batch, hidden_states)
            return LM(model, logits)(batch, hidden_states), says

    # What an objective learns itself.

    @property
    def _learns(self) -> bool:
        return isinstance(self.objective, nn.Module)

    def _prepare_objective(self) -> None:
        if not self._learns:
            return
        self.objective.to(self.args.device)
        if any(True for _ in self.objective.parameters()):
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    f"{type(self.objective).__name__} has parameters of its own: they are trained"
                    " on one process or under DDP, not under FSDP or DeepSpeed"
                )
        for x in (*self.objective.parameters(), *self.objective.buffers()):
            if self.accelerator.num_processes > 1:
                torch.distributed.broadcast(x.data, 0)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._learns:
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            own = [p for p in self.objective.parameters() if p.requires_grad and id(p) not in known]
            if own and self.lr_scheduler is not None:
                raise ValueError(
                    f"{type(self.objective).__name__} has parameters of its own, which the given"
                    " optimizer and scheduler do not know: make them with these too"
                )
            if own:
                optimizer.add_param_group({"params": own, "weight_decay": self.args.weight_decay})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self._learns and self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for p in self.objective.parameters():  # not in the model, which DDP averages
                if p.requires_grad:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    p.grad.copy_(self.accelerator.reduce(p.grad, "mean"))
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        if self._learns and self.objective.state_dict():
            from safetensors.torch import save_model

            save_model(self.objective, str(Path(output_dir) / OBJECTIVE))
        if hasattr(self.rewrite, "state_dict"):
            text = json.dumps(self.rewrite.state_dict())
            (Path(output_dir) / REWRITE).write_text(text, encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._learns and self.objective.state_dict():
            from safetensors.torch import load_model

            load_model(self.objective, str(_state_in(checkpoint, OBJECTIVE, self.objective)))
        if checkpoint is not None and hasattr(self.rewrite, "load_state_dict"):
            text = _state_in(checkpoint, REWRITE, self.rewrite).read_text(encoding="utf-8")
            self.rewrite.load_state_dict(json.loads(text))
        super()._load_optimizer_and_scheduler(checkpoint)

    # What the log shows.

    def _note(self, learnt: Learnt, scale: int) -> None:
        if not self._measures:
            self._measured_from = self.state.global_step
        for name, x in learnt.measures.items():
            self._measures[name] = self._measures.get(name, 0) + scale * x.detach().float()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._measures:
            steps = max(1, self.state.global_step - self._measured_from)
            names = sorted(self._measures)
            sums = torch.stack([self._measures[name] for name in names])
            averages = self.accelerator.reduce(sums, "mean") / steps
            logs.update(zip(names, averages.tolist(), strict=True))
            self._measures = {}
        super().log(logs, *args, **kwargs)

    # Evaluation.

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **kwargs):
        inputs = self._prepare_inputs(inputs)
        generates = getattr(self.args, "predict_with_generate", False) and not prediction_loss_only
        names = self.label_names
        labels = None
        if names and all(inputs.get(name) is not None for name in names):
            labels = tuple(inputs[name].detach() for name in names)
            labels = labels[0] if len(labels) == 1 else labels
        loss, logits = None, None
        with torch.no_grad():
            if inputs.get("labels") is not None:
                whole = not (prediction_loss_only or generates)
                loss, logits = self._judge(model, inputs, whole)
            elif not (prediction_loss_only or generates):
                with self.accelerator.autocast():
                    logits = LM(model, "whole")(inputs).logits
        if generates:
            own = {k: x for k, x in inputs.items() if not k.startswith(TEACHERS_PREFIX)}
            _, logits, labels = super().prediction_step(model, own, False, ignore_keys, **kwargs)
        if prediction_loss_only:
            return loss, None, None
        return loss, logits, labels

    def _judge(self, model: nn.Module, batch: Batch, whole: bool) -> tuple[Tensor, Tensor | None]:
        """The loss of a batch, and its whole logits; notes the sums of the evaluation."""
        batch, counted = self._without_repeats(batch)
        student, teacher = self._listen(model, batch, "whole" if whole else self.logits)
        counts = self.objective.counts(counted)
        one = torch.ones(1, device=counts.device)
        with self.accelerator.autocast():
            # Each of the loss's k terms alone, undivided: a sum over the batch.
            items = torch.full((len(counts),) * 2, MANY, device=counts.device).fill_diagonal_(1)
            terms = [self.objective(student, teacher, counted, n, self.progress) for n in items]
            measures = self._measuring(student, teacher, counted, one, 0.0).measures
        terms = torch.stack([term.loss for term in terms])
        sums = {"loss": terms, "counts": counts, "tokens": self._measuring.counts(counted)}
        for name in ("ce", "kd", "top1_agreement"):
            if name in measures:
                sums[name] = measures[name]
        for name, x in sums.items():
            # Of many batches; MPS has no float64.
            x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
            self._evaluated[name] = self._evaluated.get(name, 0) + x
        loss = (terms / counts.clamp(min=1)).sum()
        return loss, student.logits if whole else None

    def _without_repeats(self, batch: Batch) -> tuple[Batch, Batch]:
        """A batch without the labels of the rows that fill up the processes' last batches: for the
        models; and for the objective, which may count what the attention mask shows."""
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return batch, batch
        labels = batch["labels"]
        rows = torch.arange(len(labels), device=labels.device).view(-1, 1)
        positions = batch.get("position_ids")
        if len(labels) == 1 and positions is not None:  # flattened: a document is a row
            rows = (positions == 0).cumsum(-1) - 1
        rows = rows + (rows.max() + 1) * self.accelerator.process_index
        repeated = rows >= state.remainder
        batch = dict(batch)
        for name in ("labels", f"{TEACHERS_PREFIX}labels"):
            if name in batch:
                batch[name] = batch[name].masked_fill(repeated, IGNORED)
        mask = batch.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(batch.get("input_ids", labels))
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return batch, batch
        return batch, {**batch, "attention_mask": mask.masked_fill(repeated, 0)}

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        self._evaluated = {}
        output = super().evaluation_loop(*args, **kwargs)
        prefix = inspect.signature(super().evaluation_loop).bind(*args, **kwargs).arguments
        prefix = prefix.get("metric_key_prefix", "eval")
        found = {f"{prefix}_{name}": x for name, x in self._averages().items()}
        own = {k: x for k, x in output.metrics.items() if k != f"{prefix}_loss"}
        output.metrics.update(found | own)  # `compute_metrics` may have names of ours
        return output

    def _averages(self) -> dict[str, float]:
        """Of all batches of an evaluation, on all processes."""
        sums = {name: self.accelerator.reduce(x, "sum") for name, x in self._evaluated.items()}
        self._evaluated = {}
        if not sums or not sums["counts"].any():
            return {}
        tokens = sums["tokens"].item()
        averages = {"loss": (sums["loss"] / sums["counts"].clamp(min=1)).sum().item()}
        if "ce" in sums and tokens:
            ce = sums["ce"].item() / tokens
            averages["perplexity"] = math.exp(ce) if ce < 700 else math.inf
        for name, key in (("kl", "kd"), ("top1_agreement", "top1_agreement")):
            if key in sums and tokens:
                averages[name] = sums[key].item() / tokens
        return averages

    # The columns of a teacher that reads something else.

    def _remove_unused_columns(self, dataset, description=None):
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            named = {x for x in dataset.column_names if x.startswith(TEACHERS_PREFIX)}
            self._signature_columns += sorted(named - set(self._signature_columns))
        return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, *args: Any, **kwargs: Any):
        collator = super()._get_collator_with_removed_columns(*args, **kwargs)
        if hasattr(collator, "signature_columns"):
            collator.signature_columns = _Columns(collator.signature_columns)
        return collator


def _measuring(objective: Objective, shift: bool) -> Distil:
    """What an evaluation measures on an objective's positions: forward KL at temperature 1."""
    own = _distil_in(objective)
    if own is None:
        return Distil(shift, vocab="shared")
    settings = {"vocab": own.settings.get("vocab", "shared")}
    for name in ("ignore_index", "workspace_bytes"):
        if name in own.settings:
            settings[name] = own.settings[name]
    return Distil(own.shift, **settings)


def _distil_in(objective: Objective) -> Distil | None:
    if isinstance(objective, Plus):
        return _distil_in(objective.objective) or _distil_in(objective.term)
    return objective if isinstance(objective, Distil) else None


def _state_in(checkpoint: str, name: str, owner: Any) -> Path:
    path = Path(checkpoint) / name
    if not path.is_file():
        raise ValueError(f"{checkpoint} has no {name}, the state of {type(owner).__name__}")
    return path


class _Columns(list):
    """Names of columns; any of a teacher's is among them."""

    def __contains__(self, name):
        return name.startswith(TEACHERS_PREFIX) or super().__contains__(name)


class DistillationTrainer(DistillationMixin, Trainer):
    """`transformers.Trainer` that distils: see `DistillationMixin`.

    trainer = DistillationTrainer(
        student, arguments, teacher_model=teacher, train_dataset=rows, data_collator=collator,
        divergence="jsd", temperature=2.0, alpha=0.7,
    )
    trainer.train()
    """
