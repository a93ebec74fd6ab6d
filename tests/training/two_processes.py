"""A process of test_two_processes.py; accelerate starts two with scripts/accelerate/multi_gpu.yaml."""

import json
import sys
from pathlib import Path

import torch
from small_trainers import new_trainer, rows
from test_two_processes import RUNS, SHARDED, Notes


def run(folder: Path, name: str, trainer_kwargs=None, **kwargs) -> None:
    def count_rows(prediction):
        return {"rows": len(prediction.label_ids)}

    trainer = new_trainer(
        folder,
        trainer_kwargs={"compute_metrics": count_rows, **(trainer_kwargs or {})},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=4,  # eleven rows: 4 + 4, then 3 + 5 repetitions
        ddp_find_unused_parameters=False,
        **kwargs,
    )
    notes = Notes().watch(trainer)
    trainer.train()
    metrics = trainer.evaluate()
    model = trainer.accelerator.unwrap_model(trainer.model)
    result = {
        "world_size": trainer.args.world_size,
        "rows": metrics["eval_rows"],
        "metrics": metrics,
        "logs": trainer.state.log_history,
        "weights": [parameter.tolist() for parameter in model.parameters()],
        "budget_weight": model.config.budget_weight,
        "gradients": notes.gradients,
        "read": notes.rows,
    }
    (folder / f"{name}-{trainer.args.process_index}.json").write_text(json.dumps(result))


def evaluate_streams(folder: Path) -> None:
    """Evaluate on a stream of eleven rows: dispatched by the first process, and read by each, which is refused."""
    answers = []
    for dispatch in (None, False):
        stream = {"eval_dataset": rows(11, seed=1).to_iterable_dataset()}
        accelerator = {"accelerator_config": {"dispatch_batches": dispatch}}
        trainer = new_trainer(folder, trainer_kwargs=stream, per_device_eval_batch_size=4, **accelerator)
        try:
            answers.append(trainer.evaluate())
        except ValueError as error:
            answers.append(str(error))
    (folder / f"streams-{trainer.args.process_index}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, arguments in (RUNS | SHARDED).items():
        run(Path(sys.argv[1]), name, **arguments())
    evaluate_streams(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
