"""Run the parts of the package that use a GPU, except the Triton engine, on CUDA with small shapes.

    python -m scripts.gpu.cuda_path --results FILE        # --device cpu: the same checks without a GPU

The other tests run on a CPU only. Each check prints one line; the exit status is 1 if any check fails. FILE holds the
outcomes and is rewritten after every check. The checks of training need accelerate; without it they are "not run".
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.kernels import choose_engine
from scripts.benchmarks.rows import ROOT

ROWS, STEPS, INPUTS, LABELS = 6, 40, 3, 4
# Largest differences from the dense scan in float32 on the same device: in float32, and in bfloat16.
CLOSE, CLOSE_IN_BF16 = 1e-4, 5e-2


def new_model(device: str, cell: str = "lstm") -> Any:
    """Return a small classifier with a learned gate that skips about half of the steps."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "cell_type": cell,
        "input_size": INPUTS,
        "hidden_size": 20,
        "num_hidden_layers": 2,
        "num_labels": LABELS,
    }
    model: Any = SkipRNNForSequenceClassification(SkipRNNConfig(update_bias=-0.5, **sizes))
    return model.to(device)


def rows(count: int = ROWS) -> list[dict[str, Tensor]]:
    """Return rows of different real lengths; the first input tells the label."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        x = torch.randn(STEPS, INPUTS, generator=draw)
        label = torch.tensor(index % LABELS)
        x[:, 0] += 2 * label
        found.append(
            {"input_values": x, "attention_mask": torch.arange(STEPS) < STEPS - 3 * (index % 4), "labels": label}
        )
    return found


def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows to a batch."""
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


def batch_on(device: str) -> dict[str, Tensor]:
    """Return a batch on the device."""
    return {name: part.to(device) for name, part in collate(rows()).items()}


def step(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return logits, loss, updates and every parameter's gradient of one training step."""
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    grads = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), "updates": out.num_updates.detach()} | grads


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], limit: float) -> None:
    """Raise an AssertionError where a tensor differs by more than `limit` of its largest value, at least 1."""
    assert got.keys() == want.keys()
    for name, right in want.items():
        off = float((got[name].float() - right.float()).abs().max() / right.float().abs().max().clamp(min=1))
        assert off <= limit, f"{name} differs by {off:.1e}; {limit:.0e} is allowed"


def automatic_engine(device: str) -> None:
    """Check that the backend "auto" selects `events` on a GPU."""
    engine = choose_engine("auto", torch.zeros(1, 1, 1, device=device), 1)
    assert engine.name == ("cpu" if device == "cpu" else "events"), engine.name


def events_equal_dense(device: str) -> None:
    """Check that values, gates and gradients of `events` equal those of the dense scan."""
    for cell in ("lstm", "gru"):
        model, batch = new_model(device, cell), batch_on(device)
        results = []
        for backend in ("dense", "events"):
            model.set_scan_backend(backend)
            results.append(step(model, batch))
        assert_close(results[1], results[0], CLOSE)


def autocast(device: str) -> None:
    """Check that a training step in bfloat16 autocast has the same loss as in float32, and finite gradients."""
    model, batch = new_model(device), batch_on(device)
    model.set_scan_backend("events")
    want = step(model, batch)["loss"]
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        got = step(model, batch)
    assert_close({"loss": got["loss"]}, {"loss": want}, CLOSE_IN_BF16)
    assert all(bool(part.isfinite().all()) for part in got.values())


def compiled(device: str) -> None:
    """Check that a compiled training step has the same loss as an eager one; `events` runs outside the graph."""
    for backend in ("dense", "events"):
        model = new_model(device)
        batch = {name: part[:, :6] if part.dim() > 1 else part for name, part in batch_on(device).items()}
        model.set_scan_backend(backend)
        want = step(model, batch)
        whole = torch.compile(model, backend="aot_eager" if device == "cpu" else "inductor")
        got = whole(**batch)
        assert_close({"loss": got.loss.detach()}, {"loss": want["loss"]}, CLOSE)
        got.loss.backward()


def cuda_graph(device: str) -> None:
    """Check that inference with the dense scan can be captured in a CUDA graph."""
    model, x = new_model(device).eval(), torch.randn(ROWS, STEPS, INPUTS).to(device)
    layer = model.base_model
    layer.set_scan_backend("dense")
    with torch.no_grad():
        want = layer(input_values=x).last_hidden_state
        if device == "cpu":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(input_values=x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = layer(input_values=x).last_hidden_state
        graph.replay()
        torch.cuda.synchronize()
    assert_close({"state": got}, {"state": want}, CLOSE)


def trainer(device: str) -> None:
    """Check that the Trainer lowers the loss (in bfloat16 on a GPU), saves a checkpoint, and resumes from it."""
    from transformers import TrainingArguments

    from hf_skiprnn.training import SkipRNNTrainer

    with tempfile.TemporaryDirectory() as folder:
        losses = []
        for steps in (20, 30):
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                save_steps=20,
                per_device_train_batch_size=8,
                learning_rate=1e-2,
                logging_steps=5,
                bf16=device != "cpu",
                use_cpu=device == "cpu",
                report_to="none",
                disable_tqdm=True,
            )
            data = {"train_dataset": rows(64), "eval_dataset": rows(11), "data_collator": collate}
            work = SkipRNNTrainer(new_model(device), arguments, **data)
            work.train(resume_from_checkpoint=steps > 20)
            losses.append(work.evaluate()["eval_loss"])
            logs = [log["loss"] for log in work.state.log_history if "loss" in log]
        assert logs[-1] < logs[0], logs
        assert losses[1] < 2 * losses[0], losses


def accelerate_launch(device: str) -> None:
    """Check that the Trainer runs under `accelerate launch` with multi_gpu.yaml and one process."""
    config = ROOT / "scripts" / "accelerate" / ("cpu.yaml" if device == "cpu" else "multi_gpu.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "1"]
    command = [*launch, "--module", "scripts.gpu.cuda_path", "--device", device, "--only", "trainer"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


CHECKS: dict[str, Callable[[str], None]] = {
    "automatic_engine": automatic_engine,
    "events_equal_dense": events_equal_dense,
    "autocast": autocast,
    "trainer": trainer,
    "cuda_graph": cuda_graph,
    "accelerate_launch": accelerate_launch,
    "compiled": compiled,
}
NEED_ACCELERATE = ("trainer", "accelerate_launch")


def run_check(name: str, device: str) -> str:
    """Run a check, print its line and traceback, and return "ok", "not run: ..." or "FAILED: ..."."""
    start = time.perf_counter()
    outcome, wrong = "ok", ""
    if name in NEED_ACCELERATE and find_spec("accelerate") is None:
        outcome = "not run: accelerate is not installed"
    else:
        try:
            CHECKS[name](device)
        except Exception as error:  # noqa: BLE001 - the other checks must still run
            outcome = f"FAILED: {type(error).__name__}: {str(error)[:300]}"
            wrong = f"\n{traceback.format_exc()}"
    print(f"{name}: {outcome} ({time.perf_counter() - start:.1f} s){wrong}", flush=True)
    return outcome


def main() -> None:
    """Run the checks; exit with status 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--results", type=Path, help="JSON file of the outcomes")
    options = parser.parse_args()
    outcomes = dict.fromkeys(options.only, "not finished")
    for name in options.only:
        outcomes[name] = run_check(name, options.device)
        if options.results is not None:
            part = options.results.with_suffix(".part")
            part.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
            part.replace(options.results)
    sys.exit(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
