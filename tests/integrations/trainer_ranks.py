"""Two processes' trainers against float64 on the whole batch; run by test_trainer.py under
torchrun. Prints one line for each case."""

import math
import os
import tempfile

import peft
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from trainer_truth import (
    Projected,
    arguments_of,
    batch_of,
    norm,
    projected_truth,
    rows,
    tiny,
    trainer_of,
    truth,
)
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Gemma3Config, Trainer

from fastkd.recipes import LM, Hidden

FSDP2 = dict(fsdp=True, fsdp_config=dict(version=2))
HALF = dict(per_device_train_batch_size=8)


def make(folder, *, arguments=None, **settings):
    AcceleratorState._reset_state(reset_partial_state=False)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    # Accelerate shards on GPUs alone: it is told that these processes have one.
    sort = DistributedType.MULTI_GPU if "fsdp" in (arguments or {}) else DistributedType.MULTI_CPU
    args = arguments_of(folder, **arguments or {})
    assert args.device.type == "cpu" and args.world_size == 2
    PartialState._shared_state["distributed_type"] = sort
    return trainer_of(folder, args=args, **settings)


def trained(folder, **settings):
    trainer = make(folder, **settings)
    trainer.train()
    return trainer, trainer.state.log_history[0]


def close(found, expected, names):
    for name in names:
        assert math.isclose(found[name], expected[name], rel_tol=1e-5), (
            name,
            found[name],
            expected[name],
        )


def steps(folder, sharding):
    """The step of one big batch; under FSDP2 the teacher is sharded too."""
    student = tiny(0)
    expected = truth(student, tiny(1), rows())
    expected["grad_norm"] = norm(student).item()
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        cut = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        trainer, line = trained(folder, arguments=cut | sharding)
        close(line, expected, ("loss", "kd", "ce", "top1_agreement", "grad_norm"))
        for model in (trainer.model, trainer.teacher.model):
            assert isinstance(next(model.parameters()), DTensor) == bool(sharding)


def sharded_by_transformers(folder, sharding):
    """A student that was sharded as it was opened, and a teacher that was not."""
    if not hasattr(Trainer, "_sync_replicated_trainable_parameters"):
        return  # transformers before 5.24 leaves that to accelerate
    from transformers.distributed import DistributedConfig

    student = tiny(0)
    expected = truth(student, tiny(1), rows())
    expected["grad_norm"] = norm(student).item()
    path = [folder]
    dist.broadcast_object_list(path)
    if dist.get_rank() == 0:
        tiny(0).save_pretrained(folder)
    dist.barrier()
    student = AutoModelForCausalLM.from_pretrained(
        *path, distributed_config=DistributedConfig(fsdp_size=2)
    )
    assert isinstance(next(student.parameters()), DTensor)
    cut = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    _, line = trained(folder, arguments=cut, model=student)
    close(line, expected, ("loss", "kd", "ce", "top1_agreement", "grad_norm"))


def own_means(folder, sharding):
    """Each process's own mean, averaged: what the trainer's setting says."""
    own = dict(average_tokens_across_devices=False)
    _, line = trained(folder, arguments=HALF | own | sharding)
    student = tiny(0)
    halves = [truth(student, tiny(1), half) for half in (rows()[:8], rows()[8:])]
    for p in student.parameters():
        p.grad /= 2
    expected = {name: (halves[0][name] + halves[1][name]) / 2 for name in ("loss", "kd", "ce")}
    close(line, expected | {"grad_norm": norm(student).item()}, ("loss", "kd", "ce", "grad_norm"))


def without_target(folder, sharding):
    """One process has none at all."""
    data = rows()
    for row in data[8:]:
        row["labels"][:] = -100
    _, line = trained(folder, arguments=HALF | sharding, train_dataset=data)
    student = tiny(0)
    expected = truth(student, tiny(1), data)
    expected["grad_norm"] = norm(student).item()
    close(line, expected, ("loss", "kd", "ce", "grad_norm"))


def evaluation(folder, sharding):
    """Over tokens; rows that fill up the last batches count once. Before and after training."""
    names = [f"eval_{name}" for name in ("loss", "kl", "perplexity", "top1_agreement")]
    start = dict(eval_on_start=bool(sharding))  # alone, the trainer evaluates no sharded model
    for count in (5, 7):
        data = rows()[3 : 3 + count]
        trainer = make(folder, arguments=HALF | start | sharding, eval_dataset=data)
        before = {} if sharding else trainer.evaluate()
        trainer.train()
        expected = {f"eval_{k}": x for k, x in truth(tiny(0), tiny(1), data).items()}
        close(before or trainer.state.log_history[0], expected, names)
        weights = [trainer.accelerator.get_state_dict(trainer.model_wrapped)]
        dist.broadcast_object_list(weights)
        student = tiny(0)
        student.load_state_dict(weights[0])
        expected = {f"eval_{k}": x for k, x in truth(student, tiny(1), data).items()}
        close(trainer.evaluate(), expected, names)


def flattened(folder, sharding):
    """Documents behind one another, in one row of each batch."""
    data = [dict(input_ids=r["input_ids"].tolist(), labels=r["labels"].tolist()) for r in rows()]
    collator = DataCollatorWithFlattening()
    arguments = dict(per_device_eval_batch_size=3) | HALF
    settings = dict(train_dataset=data, eval_dataset=data[:5], data_collator=collator)
    trainer = make(folder, arguments=arguments | sharding, **settings)
    expected = {f"eval_{k}": x for k, x in truth(tiny(0), tiny(1), rows()[:5]).items()}
    close(trainer.evaluate(), expected, ("eval_loss", "eval_kl"))
    trainer.train()
    close(trainer.state.log_history[-2], truth(tiny(0), tiny(1), rows()), ("loss", "kd"))


def objective_that_learns(folder, sharding):
    """Its gradients are averaged over processes, summed over micro-batches."""
    learnt, objective, student = projected_truth(rows())
    cut = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1)
    trainer, line = trained(folder, arguments=cut | sharding, objective=Projected())
    expected = {k: x.item() for k, x in learnt.measures.items()}
    expected |= {"loss": learnt.loss.item(), "grad_norm": norm(student).item()}
    close(line, expected, ("loss", "kd", "hidden", "grad_norm"))
    found = trainer.objective.projection
    for p, before in zip(found.parameters(), objective.projection.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), before.detach() - 0.1 * before.grad)


def refused_objective(folder, sharding):
    try:
        make(folder, arguments=sharding, objective=Projected())
    except ValueError as error:
        assert "not under FSDP" in str(error)
    else:
        raise AssertionError("an objective's parameters under FSDP")


def hidden_states_alone(folder, sharding):
    """The head has no part in the loss; all tokens of the rows that count once do."""
    objective, data = Hidden("mse"), rows()[:5]
    arguments = dict(max_steps=3, learning_rate=0.0) | HALF | sharding
    settings = dict(arguments=arguments, objective=objective, eval_dataset=data)
    trainer, line = trained(folder, **settings)
    for some, found in ((rows(), line["loss"]), (data, trainer.evaluate()["eval_loss"])):
        states = [LM(tiny(i))(batch_of(some), True).hidden_states for i in (0, 1)]
        pairs = zip(*(x[1:] for x in states), strict=True)
        expected = sum((s - t).square().mean() for s, t in pairs) / 2
        close({"loss": found}, {"loss": expected.item()}, ["loss"])


def another_prompt(folder, sharding):
    """Of the teacher: rows that fill up the last batches count once on both sides."""
    data = [r | {f"teacher_{k}": x for k, x in r.items()} for r in rows()]
    for row in data:
        row["labels"][0] = row["teacher_labels"][0] = -100
    trainer = make(folder, arguments=HALF | sharding, train_dataset=data, eval_dataset=data[:5])
    expected = {f"eval_{k}": x for k, x in truth(tiny(0), tiny(1), data[:5]).items()}
    close(trainer.evaluate(), expected, ("eval_loss", "eval_kl"))
    trainer.train()
    close(trainer.state.log_history[-2], truth(tiny(0), tiny(1), data), ("loss", "kd"))


def unused_parameters(folder, sharding):
    """A vision tower under text has no part in the loss, with gradient checkpointing too."""
    text = dict(
        vocab_size=67, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    if sharding:
        own = dict(transformer_layer_cls_to_wrap=["Gemma3DecoderLayer"])
        sharding = FSDP2 | dict(fsdp_config=FSDP2["fsdp_config"] | own)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    for checkpointing in (False, True):
        torch.manual_seed(0)
        student = AutoModelForCausalLM.from_config(config)
        arguments = dict(max_steps=3, gradient_checkpointing=checkpointing) | sharding
        trainer, _ = trained(folder, arguments=arguments, model=student)
        assert len(trainer.state.log_history) == 4


def adapter(folder, sharding):
    torch.manual_seed(5)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    student, twin = (peft.get_peft_model(tiny(0), config) for _ in range(2))
    twin.load_state_dict(student.state_dict())
    _, line = trained(folder, arguments=HALF | sharding, model=student)
    expected = truth(twin, tiny(1), rows())
    expected["grad_norm"] = norm(twin).item()
    close(line, expected, ("loss", "kd", "ce", "grad_norm"))


def main():
    cases = [
        (steps, {}), (steps, FSDP2), (sharded_by_transformers, {}),
        (own_means, {}), (own_means, FSDP2), (without_target, {}), (without_target, FSDP2),
        (evaluation, {}), (evaluation, FSDP2), (flattened, {}), (another_prompt, {}),
        (objective_that_learns, {}), (refused_objective, FSDP2), (hidden_states_alone, {}),
        (unused_parameters, {}), (unused_parameters, FSDP2), (adapter, {}), (adapter, FSDP2),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for case, sharding in cases:
            case(folder, sharding)
            if dist.get_rank() == 0:
                print("ok", case.__name__, *sharding, flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
