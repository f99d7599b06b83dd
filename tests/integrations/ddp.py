"""Two processes' gradients under data parallelism against one process on the whole batch; run by
test_transformers.py under torchrun. Prints one line for each case."""

from functools import partial

import peft
import torch
import torch.distributed as dist
from tiny_lms import batch, gradients, loss, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from fastkd import LMHead
from fastkd.integrations.transformers import sources

DDP_SETTINGS = {
    "plain": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}


def step(student, teacher, inputs, num_items, factor):
    pair = sources(student, teacher, inputs)
    (factor * loss(*pair, inputs["labels"], num_items=num_items)).backward()
    return pair


def body_frozen(model):
    model.model.requires_grad_(False)
    return model


def with_spare(model):
    model.register_parameter("spare", torch.nn.Parameter(torch.ones(3)))
    return model


def checkpointed(model):
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def adapted(model):
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    return peft.get_peft_model(model, config)


def check(name, wrap, kind, tied=False, change=lambda model: model):
    rank, world = dist.get_rank(), dist.get_world_size()
    whole, teacher = batch(rows=2 * world), tiny(1)
    num_items = (whole["labels"][:, 1:] != -100).sum()
    mine = {k: x[2 * rank : 2 * rank + 2] for k, x in whole.items()}
    alone, shared = (change(tiny(0, tie_word_embeddings=tied)) for _ in range(2))
    step(alone, teacher, whole, num_items, 1)
    wrapper = wrap(shared)
    for _ in range(2):  # the reducer rebuilds its buckets after the first
        wrapper.zero_grad()
        student, _ = step(wrapper, teacher, mine, num_items, world)
        assert type(student) is kind, type(student)
        expected, found = gradients(alone), gradients(shared)
        found = {k: x.full_tensor() if hasattr(x, "full_tensor") else x for k, x in found.items()}
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        norm = torch.stack([x.norm() for x in found.values()]).norm()
        norms = [torch.zeros(()) for _ in range(world)]
        dist.all_gather(norms, norm)
        assert all(x == norms[0] for x in norms), norms
    if rank == 0:
        print("ok", name, flush=True)


def sharded(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


def main():
    dist.init_process_group("gloo")
    for name, settings in DDP_SETTINGS.items():
        wrap = partial(DDP, **settings)
        check(name, wrap, LMHead)
        check(f"{name}, tied", wrap, LMHead, tied=True)
        check(f"{name}, body frozen", wrap, LMHead, change=body_frozen)
        check(f"{name}, checkpointed", wrap, LMHead, change=checkpointed)
        check(f"{name}, adapted", wrap, LMHead, change=adapted)
    check("unused", partial(DDP, find_unused_parameters=True), LMHead, change=with_spare)
    check("fully_shard", sharded, torch.Tensor)
    dist.barrier()  # without it, one run in six ended in an abort: the other process was gone
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
