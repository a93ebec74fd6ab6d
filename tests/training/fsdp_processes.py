"""A process of test_two_processes.py: two of them shard weights, gradients and optimizer states (FSDP).

accelerate starts it with scripts/accelerate/fsdp.yaml. It allows FSDP only on accelerators, although torch can shard
over gloo too. So after it has chosen the CPU, it is made to believe that the CPU is an accelerator.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from small_trainers import new_trainer
from test_two_processes import FSDP, Notes, gathered

from hf_skiprnn.training.trainer import SkipRNNTrainer

create_accelerator = SkipRNNTrainer.create_accelerator_and_postprocess


def create_one_that_shards(self: SkipRNNTrainer) -> None:
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    create_accelerator(self)


def trainer(folder: Path, **kwargs) -> SkipRNNTrainer:
    return new_trainer(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=4,  # eleven rows: 4 + 4, then 3 + 5 repetitions
        **kwargs,
    )


def run(folder: Path, name: str, **kwargs) -> None:
    sharding = trainer(folder / name, **kwargs)
    notes = Notes().watch(sharding)
    sharding.train()
    sharding.save_model(str(folder / name / "model"))
    result = {
        "type": sharding.accelerator.distributed_type.name,
        "world_size": sharding.args.world_size,
        "shards": [parameter.to_local().numel() for parameter in sharding.model.parameters()],
        "metrics": sharding.evaluate(),
        "logs": sharding.state.log_history,
        "gradients": notes.gradients,
        "weights": [gathered(parameter.data).tolist() for parameter in sharding.model.parameters()],
        "budget_weight": sharding.model.config.budget_weight,
    }
    (folder / f"{name}-{sharding.args.process_index}.json").write_text(json.dumps(result))


def stop_and_go_on(folder: Path) -> None:
    """Write the final weights of an uninterrupted and of a resumed run, as "whole" and "resumed"."""
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    ends = []
    for steps, resume in ((6, False), (4, False), (6, True)):
        sharding = trainer(folder / ("whole" if not ends else "resumed"), max_steps=steps, **saving)
        sharding.train(resume_from_checkpoint=resume or None)
        ends.append([gathered(parameter.data).tolist() for parameter in sharding.model.parameters()])
    (folder / f"ends-{sharding.args.process_index}.json").write_text(json.dumps({"whole": ends[0], "resumed": ends[2]}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    SkipRNNTrainer.create_accelerator_and_postprocess = create_one_that_shards
    for name, arguments in FSDP.items():
        run(Path(sys.argv[1]), name, **arguments())
    stop_and_go_on(Path(sys.argv[1]))
    torch.distributed.barrier()
    sys.stdout.flush()
    # Exit without destroying the process groups: there PyTorch 2.13 sometimes aborts ("terminate called without an
    # active exception"), about once in twenty runs on two busy cores, after everything is trained and written.
    os._exit(0)
