"""Hugging Face's Trainer with our loss, in an output folder that can be trusted: checkpoints that
are complete, weights that are finite, a log that goes on where its run does, Ctrl-C that saves."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import ProgressCallback, TrainerCallback

from fastkd.integrations.transformers import DistillationTrainer
from fastkd.training.errors import InputError
from fastkd.training.measure import peak_memory
from fastkd.training.outputs import Folder

NAMES = {"learning_rate": "lr"}  # in our log
SUMMARY = "train_runtime"  # Trainer's last line: totals, no point of the curve
COLUMNS = ("loss", "kd", "ce", "top1_agreement", "lr")  # of a line on the screen
ONE_SIGNAL = 2  # seconds in which several are one
AGREE_EVERY = 10  # steps after which processes ask each other whether to stop or save


class FolderTrainer(DistillationTrainer):
    """A `DistillationTrainer` whose checkpoints are a `Folder`'s.

    Args:
        folder: where they are written.
        about: what a run that goes on must agree with; saved in every checkpoint.
    """

    def __init__(self, *args, folder: Folder, about: dict[str, Any], **kwargs):
        super().__init__(*args, **kwargs)
        self.folder, self.about = folder, about
        # The folder drops checkpoints; Trainer would drop what only looks like one.
        self.most, self.args.save_total_limit = self.args.save_total_limit, None
        self._writes_to: str | None = None
        self._tokens, self._since = 0, time.perf_counter()  # since the last line of the log
        self._not_finite_since = torch.tensor(math.inf, device=self.args.device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._tokens += inputs["input_ids"].numel() * self.accelerator.num_processes
        loss = super().training_step(model, inputs, num_items_in_batch)
        now = torch.where(loss.isfinite(), math.inf, float(self.state.global_step + 1))
        self._not_finite_since = torch.minimum(self._not_finite_since, now)
        return loss

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # Trainer would take one step more
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial):
        return self._writes_to or super()._get_output_dir(trial)

    def _issue_warnings_after_load(self, load_result):
        """Of tied weights one is in the file, which transformers warns of."""
        every = dict(self.model.named_parameters(remove_duplicate=False))
        kept = {id(p) for name, p in every.items() if name not in load_result.missing_keys}
        missing = [x for x in load_result.missing_keys if id(every.get(x)) not in kept]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                self.check_finite()
            now = time.perf_counter()
            logs["tokens_per_second"] = round(self._tokens / max(now - self._since, 1e-9), 1)
            logs["peak_memory_mb"] = round(peak_memory(self.args.device))
            self._tokens, self._since = 0, now
        super().log(logs, *args, **kwargs)

    def _determine_best_metric(self, metrics, trial):
        found = super()._determine_best_metric(metrics, trial)
        # The best one is there to be loaded, whatever step it is of.
        self.control.should_save |= found and self.args.load_best_model_at_end
        return found

    def _save_checkpoint(self, model, trial):
        self.check_finite()
        state, before = self.state, self.state.best_model_checkpoint
        made = self.folder.partial / f"checkpoint-{state.global_step}"
        self._writes_to = str(self.folder.partial)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writes_to = None
        best = self.folder.path / f"checkpoint-{state.best_global_step}"
        found = best.is_dir() or best.name == made.name
        state.best_model_checkpoint = str(best) if found else before
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            state.save_to_json(str(made / "trainer_state.json"))  # it named the folder beside
            # Trainer's own settings, as a pickle that nothing reads.
            (made / "training_args.bin").unlink(True)
            self.folder.keep(state.global_step, self.about, self.most, state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raise `FloatingPointError` where loss or weights are not finite any more; on all
        processes alike."""
        since = self._not_finite_since
        if math.isinf(since) and not all(
            p.isfinite().all() for p in self.model.parameters() if p.requires_grad
        ):
            since = torch.full_like(since, self.state.global_step)
        if dist.is_initialized():
            dist.all_reduce(since, dist.ReduceOp.MIN)
        if math.isinf(since):
            return
        kept = self.folder.newest()
        last = f"the last finite checkpoint is {kept}" if kept else "no checkpoint was saved before"
        raise FloatingPointError(
            f"loss or weights are no longer finite since step {int(since)}: {last}; try a lower"
            " --learning_rate, or bf16 in place of fp16"
        )


class Interrupt(TrainerCallback):
    """Ctrl-C, and checkpoints by the clock. The first Ctrl-C ends the step and saves, the second
    ends the program."""

    def __init__(self, save_minutes: float):
        self.interval, self.saved = 60 * save_minutes or math.inf, time.monotonic()
        self.interrupted = False

    def __enter__(self):
        try:
            self.before = signal.signal(signal.SIGINT, self._on_signal)
        except ValueError:  # not in the main thread
            self.before = None
        return self

    def __exit__(self, *error):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _on_signal(self, number, frame):
        if self.interrupted:
            # torchrun hands on the signal that the terminal sent to all: that is no second one.
            if time.monotonic() - self.at > ONE_SIGNAL:
                raise KeyboardInterrupt
            return
        self.interrupted, self.at = True, time.monotonic()
        print("\nCtrl-C: saving after this step; once more to stop at once", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        stop, save = self.interrupted, time.monotonic() - self.saved >= self.interval
        if args.world_size > 1:
            # All processes save and stop together, or wait for each other for ever.
            if state.global_step % AGREE_EVERY:
                return
            asked = torch.tensor([stop, save], dtype=torch.float32, device=args.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            stop, save = asked.bool().tolist()
        self.interrupted = self.interrupted or stop
        if stop or save:
            control.should_save = True
        control.should_training_stop |= stop

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.monotonic()


class Log(TrainerCallback):
    """`log.jsonl`, one line a point of the curve; on the main process. It is made anew of what the
    checkpoint knows, so that a torn one stops nothing.

    Args:
        folder: is begun when the training does; until then all is as it was.
        save: writes the run's settings.
    """

    def __init__(self, folder: Folder, save: Callable[[Path], None]):
        self.folder, self.save = folder, save

    def on_step_end(self, args, state, control, **kwargs):
        # A line averages over the steps since the one before: a resumed run begins a new one at its
        # checkpoint, and so must one that is not interrupted. An evaluation may lead to one.
        best = control.should_evaluate and args.load_best_model_at_end
        control.should_log |= control.should_save or best

    on_epoch_end = on_step_end

    def on_train_begin(self, args, state, control, **kwargs):
        best = self.folder.path / f"checkpoint-{state.best_global_step}"
        if state.best_model_checkpoint is None and best.is_dir():  # the folder was moved
            state.best_model_checkpoint = str(best)
        if state.global_step > state.max_steps:
            raise InputError(
                f"the checkpoint is of step {state.global_step}, and {state.max_steps} are all"
                " that the settings ask for"
            )
        if state.is_world_process_zero:
            self.folder.begin(state.global_step)
            self.save(self.folder.own("fastkd.yaml"))
            self.folder.text("log.jsonl", "".join(map(line, points(state.log_history))))

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.log_history:
            found = points(state.log_history[-1:])
            with self.folder.own("log.jsonl").open("a", encoding="utf-8") as file:
                file.write("".join(map(line, found)))


def points(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trainer's log as the points of a curve: {"step": …, "loss": …} and {"step": …,
    "eval_loss": …}."""
    return [
        {"step": row["step"]} | {NAMES.get(k, k): x for k, x in row.items() if k != "step"}
        for row in history
        if SUMMARY not in row
    ]


def line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


class Lines(TrainerCallback):
    """The log as lines that fit a screen, without a bar."""

    training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = state.is_world_process_zero

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training and logs and SUMMARY not in logs:
            print(screen_line(state.global_step, logs), flush=True)

    def close(self) -> None:
        """Nothing is open; as `Progress.close`."""


class Progress(ProgressCallback):
    """Trainer's bar, and the lines above it."""

    def close(self) -> None:
        """Of a training that ended before its last step: what is printed next has its own line."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and SUMMARY not in logs:
            self.training_bar.write(screen_line(state.global_step, logs))


def screen_line(step: int, logs: dict[str, float]) -> str:
    """A point of the curve, for a screen."""
    row, place = {NAMES.get(k, k): x for k, x in logs.items()}, ""
    if "loss" in row:
        shown = {k: row[k] for k in COLUMNS if k in row}
    else:
        place = "held out  "
        shown = {
            k.removeprefix("eval_"): x
            for k, x in row.items()
            if k.startswith("eval_") and k.split("_")[-1] not in ("runtime", "second")
        }
    text = "  ".join(f"{SCREEN.get(k, k)} {x:.4g}" for k, x in shown.items())
    return f"step {step}  {place}{text}"


SCREEN = {"top1_agreement": "agreement", "perplexity": "ppl"}
