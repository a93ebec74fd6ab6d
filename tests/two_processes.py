"""One of two processes of test_two_processes_equal_one, started by torch.distributed.run."""

import json
import sys
from pathlib import Path

import torch
from test_training import RUNS, new_trainer


def run(folder: Path, name: str, trainer_kwargs=None, **kwargs) -> None:
    def count_rows(prediction):
        return {"rows": len(prediction.label_ids)}

    trainer = new_trainer(
        folder,
        trainer_kwargs={"compute_metrics": count_rows, **(trainer_kwargs or {})},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=4,  # eleven rows: 4 + 4, then 3 and five repetitions
        ddp_find_unused_parameters=False,
        **kwargs,
    )
    trainer.train()
    metrics = trainer.evaluate()
    result = {
        "world_size": trainer.args.world_size,
        "rows": metrics["eval_rows"],
        "metrics": metrics,
        "logs": trainer.state.log_history,
        "weights": [parameter.tolist() for parameter in trainer.accelerator.unwrap_model(trainer.model).parameters()],
    }
    if trainer.is_world_process_zero():
        (folder / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, kwargs in RUNS.items():
        run(Path(sys.argv[1]), name, **kwargs)
    torch.distributed.destroy_process_group()
