"""`fastkd distill` on processes that accelerate takes for GPUs, as it shards on nothing else; run
by test_run.py under `accelerate launch`. Says whether the weights were sharded."""

import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from fastkd.training import run
from fastkd.training.config import parse


class Trainer(run.FolderTrainer):
    def check_finite(self):
        sides = [self.model, self.teacher.model]
        # The head's group stays whole between a forward pass and the next backward pass.
        sharded = [all(isinstance(p, DTensor) for p in x.model.layers.parameters()) for x in sides]
        print(f"sharded: {sharded}", flush=True)
        super().check_finite()


config = parse(sys.argv[1:])
AcceleratorState._reset_state(reset_partial_state=False)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
run.FolderTrainer = Trainer
run.distill(config)
