"""Export: torch.export programs and ONNX graphs agree with the model, and their loop runs over updates only."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from skipping_models import build, draw
from sklearn.datasets import load_digits
from transformers import AutoModelForSequenceClassification

from hf_skiprnn import SkipRNNForFrameClassification
from hf_skiprnn.inference.export import OneUpdate, UpdateLoop, compare, quantize, save_onnx, session
from hf_skiprnn.model.cells_skip_rnn import NEVER

pytestmark = [
    # torch's exporter uses a deprecated function.
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
    # onnxruntime's quantizer uses a deprecated kind of argument.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxruntime"),
]
onnx = pytest.importorskip("onnx", reason="needs the export extra: pip install 'hf_skiprnn[export]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra: pip install 'hf_skiprnn[export]'")
pytest.importorskip("onnxscript", reason="needs the export extra: pip install 'hf_skiprnn[export]'")

VARIANTS = {
    "lstm of tokens, two layers": {"vocab_size": 9, "num_hidden_layers": 2},
    "gru, labels at every step": {"kind": SkipRNNForFrameClassification, "cell_type": "gru", "num_hidden_layers": 2},
    "gru, reset after, strided": {"cell_type": "gru", "gru_reset": "after", "gate": "strided", "stride": 3},
}


class Exports(NamedTuple):
    """A graph, its torch.export program, and the path of its ONNX file."""

    graph: UpdateLoop
    program: torch.nn.Module
    path: Path


def ragged(batch: int, steps: int) -> torch.Tensor:
    mask = (torch.rand(batch, steps) < 0.7).long()
    mask[0] = 1
    mask[-1] = 0
    return mask


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exports]:
    """Return a function that exports the variant with a name; each is exported once, because that takes seconds."""
    made: dict[str, Exports] = {}

    def export(name: str) -> Exports:
        if name not in made:
            torch.manual_seed(0)
            graph = UpdateLoop(build(**VARIANTS[name]))
            path = tmp_path_factory.mktemp("exports") / "model.onnx"
            made[name] = Exports(graph, save_onnx(graph, path).module(), path)
        return made[name]

    return export


@pytest.mark.parametrize("name", VARIANTS)
def test_the_torch_program_does_what_the_model_does(exports: Callable, name: str) -> None:
    graph, runs, _ = exports(name)
    model = graph.model
    for batch, steps in ((1, 1), (4, 31)):  # traced with 2 rows of 3 steps
        x, mask = draw(model, batch, steps), ragged(batch, steps)
        with torch.no_grad():
            logits, updates, gates = runs(x, mask)
            want = model(**{model.main_input_name: x}, attention_mask=mask, output_update_gates=True)
        assert torch.equal(gates, want.update_gates)
        assert torch.equal(updates, want.num_updates)
        torch.testing.assert_close(logits, want.logits)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_onnx_graph_does_what_the_model_does(exports: Callable, name: str) -> None:
    graph, _, path = exports(name)
    for batch, steps in ((1, 1), (1, 50), (6, 31)):
        agreement = compare(graph, path, draw(graph.model, batch, steps), ragged(batch, steps))
        assert agreement.rows_with_other_gates == 0
        assert agreement.logits_difference < 1e-5


def count_in_loop(path: Path, operator: str) -> int:
    """Count the nodes with this operator in the body of the only loop."""
    (loop,) = [node for node in onnx.load(path).graph.node if node.op_type == "Loop"]
    return sum(node.op_type == operator for node in loop.attribute[0].g.node)


def test_the_loop_runs_once_an_update(tmp_path: Path, exports: Callable) -> None:
    """The profile of onnxruntime tells how often the loop's body ran."""
    graph, _, path = exports("gru, reset after, strided")
    assert count_in_loop(path, "Tanh") == 1
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.log_severity_level = True, 3
    options.profile_file_prefix = str(tmp_path / "profile")
    runs = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x, mask = draw(graph.model, 3, 60), torch.ones(3, 60, dtype=torch.long)
    updates = runs.run(None, {"input_values": x.numpy(), "attention_mask": mask.numpy()})[1]
    events = json.loads(Path(runs.end_profiling()).read_text())
    ran = sum(event.get("args", {}).get("op_name") == "Tanh" and "kernel_time" in event["name"] for event in events)
    assert 1 < max(updates) < 40
    assert ran == max(updates)  # not 60, the number of steps


def test_ties_are_decided_as_in_the_model(exports: Callable) -> None:
    """Use D with k * D at 0.5 or next to it, where a rounded quotient would give a wrong step."""
    graph, runs, _ = exports("gru, labels at every step")
    own, copied = graph.base.update_gate, runs.base.update_gate
    kept = {name: part.detach().clone() for name, part in own.state_dict().items()}
    x, mask = draw(graph.model, 1, 200), torch.ones(1, 200, dtype=torch.long)
    seen = set()
    with torch.no_grad():
        for steps in (3, 7, 49):
            for shift in range(-2, 3):
                for gate in (own, copied):
                    gate.weight.zero_()
                    gate.bias.fill_(math.log(0.5 / steps / (1 - 0.5 / steps)) * (1 + shift * 2**-23))
                gates = runs(x, mask)[2]
                assert torch.equal(gates, graph.model(input_values=x, output_update_gates=True).update_gates)
                seen.add(int(gates.sum()))
        for gate in (own, copied):
            gate.load_state_dict(kept)
    assert len(seen) > 3  # neighbours of a tie do differ


def test_digits_agree_in_onnxruntime_and_nearly_so_in_int8(tmp_path: Path) -> None:
    """Use handwritten digits and a model that was trained on them for a few steps."""
    images = torch.tensor(load_digits().images, dtype=torch.float32).reshape(-1, 64, 1) / 16
    labels = torch.tensor(load_digits().target)
    model = build(input_size=1, hidden_size=48, num_labels=10, budget_weight=1e-3, update_bias=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for start in range(0, 640, 64):
        loss = model(input_values=images[start : start + 64], labels=labels[start : start + 64]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    graph = UpdateLoop(model)
    save_onnx(graph, tmp_path / "digits.onnx")
    test = images[1000:1200]
    agreement = compare(graph, tmp_path / "digits.onnx", test, torch.ones(200, 64, dtype=torch.long))
    assert agreement.rows_with_other_gates == 0
    assert agreement.logits_difference < 1e-4
    assert agreement.updates < 64
    quantize(tmp_path / "digits.onnx", tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").stat().st_size < (tmp_path / "digits.onnx").stat().st_size - 3 * 48 * 4 * 48 * 0.9
    assert count_in_loop(tmp_path / "int8.onnx", "MatMul") == 1  # the gate is not quantized
    assert count_in_loop(tmp_path / "int8.onnx", "MatMulInteger") == 2
    rounded = compare(graph, tmp_path / "int8.onnx", test, torch.ones(200, 64, dtype=torch.long))
    assert 0 < rounded.logits_difference < 0.2
    assert rounded.rows_with_other_gates < 200


@pytest.mark.parametrize("name", ["lstm of tokens, two layers", "gru, labels at every step"])
def test_one_update_streams_like_the_model(tmp_path: Path, name: str) -> None:
    model = build(**VARIANTS[name])
    program = save_onnx(OneUpdate(model), tmp_path / "step.onnx").module()
    runs = session(tmp_path / "step.onnx")
    x = draw(model, 1, 50)
    shape = (model.config.num_hidden_layers, 1, model.config.hidden_size)
    names = ["h"] if model.config.cell_type == "gru" else ["h", "c"]
    states = {name: np.full(shape, np.nan, np.float32) for name in names}  # ignored for fresh rows
    stream, wait, fresh = model.stream(), 0, True
    for step in range(50):
        read = wait == 0
        assert stream.push(x[0, step]) == read
        if read:
            feed = {model.main_input_name: x[:, step].numpy(), "fresh": np.array([fresh]), **states}
            logits, skip, *new = runs.run(None, feed)
            states, wait, fresh = dict(zip(names, new, strict=True)), int(skip[0]), False
            assert wait == stream.steps_to_skip
            np.testing.assert_allclose(logits[0], stream.logits, rtol=1e-4, atol=1e-5)
        else:
            wait -= 1
    with torch.no_grad():
        program.base.update_gate.bias.fill_(-60)
        never = program(*[torch.as_tensor(part) for part in feed.values()], *[None] * (len(names) == 1))
    assert never[1].tolist() == [NEVER]


@pytest.mark.parametrize("name", ["lstm of tokens, two layers", "gru, labels at every step"])
def test_with_an_input_for_the_shift_each_row_has_its_own(tmp_path: Path, name: str) -> None:
    model = build(**VARIANTS[name])
    graph = UpdateLoop(model, shift_input=True)
    save_onnx(graph, tmp_path / "model.onnx")
    x, mask, shift = draw(model, 6, 31), ragged(6, 31), torch.linspace(-2, 2, 6)
    feed = {model.main_input_name: x, "attention_mask": mask, "gate_shift": shift}
    logits, updates, _ = session(tmp_path / "model.onnx").run(None, {key: value.numpy() for key, value in feed.items()})
    with torch.no_grad():
        want = model(**feed)
    assert not torch.equal(want.num_updates, model(**{**feed, "gate_shift": None}).num_updates)
    assert updates.tolist() == want.num_updates.tolist()
    np.testing.assert_allclose(logits, want.logits, rtol=1e-4, atol=1e-5)
    agreement = compare(graph, tmp_path / "model.onnx", x, mask)
    assert (agreement.rows_with_other_gates, agreement.logits_difference < 1e-5) == (0, True)


def test_one_update_takes_a_shift_for_each_row() -> None:
    model = build(cell_type="gru")
    x, state = draw(model, 3, 1)[:, 0], torch.zeros(1, 3, model.config.hidden_size)
    with torch.no_grad():
        for shift in (-3.0, 0.5):
            wait = OneUpdate(model, shift_input=True)(x, torch.ones(3).bool(), state, None, torch.full((3,), shift))[1]
            model.set_gate_shift(shift)
            assert wait.tolist() == OneUpdate(model)(x, torch.ones(3).bool(), state)[1].tolist()
            model.set_gate_shift(0.0)


def test_what_cannot_be_exported_is_refused() -> None:
    with pytest.raises(ValueError, match="SkipRNNForFrameClassification; got SkipRNNModel, which has no classifier"):
        UpdateLoop(build().base_model)
    with pytest.raises(ValueError, match="cannot repeat"):
        UpdateLoop(build(gate="random"))
    with pytest.raises(ValueError, match=r"takes float32 weights.*got torch.bfloat16"):
        OneUpdate(build().bfloat16())
    with pytest.raises(ValueError, match="Only a learned gate has a shift; this model has gate='strided'"):
        UpdateLoop(build(gate="strided"), shift_input=True)


@pytest.fixture(scope="module")
def script():
    from hf_skiprnn.commands import export as module

    return module


def test_the_script_writes_and_checks(tmp_path: Path, script) -> None:
    build().save_pretrained(tmp_path / "checkpoint")
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(5, 33, 2)).astype(np.float32))
    paths = [str(tmp_path / "checkpoint"), str(tmp_path / "model.onnx")]
    real = script.main([*paths, "--inputs", str(tmp_path / "rows.npy"), "--gate_shift", "-1.5"])
    assert (real["rows"], real["rows_with_other_gates"]) == (5, 0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint")
    model.set_gate_shift(-1.5)
    model.save_pretrained(tmp_path / "shifted")
    feed = {"input_values": np.load(tmp_path / "rows.npy"), "attention_mask": np.ones((5, 33), np.int64)}
    updates = []
    for checkpoint, options in (
        ("checkpoint", ["--gate_shift", "-1.5"]),
        ("shifted", []),
        ("shifted", ["--gate_shift", "0"]),
    ):
        script.main([str(tmp_path / checkpoint), paths[1], *options])
        updates.append(session(paths[1]).run(["num_updates"], feed)[0].tolist())
    assert updates[0] == updates[1]  # the default is the checkpoint's own shift
    assert sum(updates[2]) > sum(updates[1])
    script.main([*paths, "--one_update", "--int8", "--gate_shift_input"])
    assert any(node.op_type == "MatMulInteger" for node in onnx.load(paths[1]).graph.node)
    names = ["input_values", "fresh", "h", "c", "gate_shift"]
    assert [part.name for part in session(paths[1]).get_inputs()] == names


def test_the_script_refuses_a_wrong_graph(
    tmp_path: Path, script, exports: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)  # other weights: the exported model was made with seed 0
    name = "gru, labels at every step"
    build(**VARIANTS[name]).save_pretrained(tmp_path / "checkpoint")
    monkeypatch.setattr(script, "save_onnx", lambda graph, path: shutil.copy(exports(name).path, path))
    with pytest.raises(SystemExit, match="does not do what the model does"):
        script.main([str(tmp_path / "checkpoint"), str(tmp_path / "model.onnx")])


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_a_program_of_the_whole_model_is_saved_and_loaded(backend: str, tmp_path: Path) -> None:
    model = build()
    model.set_scan_backend(backend)
    x = torch.randn(2, 6, model.config.input_size)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
        got, want = torch.export.load(tmp_path / "model.pt2").module()(x), model(x)
    assert type(got.state) is type(want.state)
    for mine, theirs in ((got.logits, want.logits), *zip(got.state, want.state, strict=True)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx_export_of_the_model_itself_names_the_way(tmp_path: Path) -> None:
    model = build()
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"Use scripts/export\.py, or .*save_onnx"):
        torch.onnx.export(model, (torch.randn(2, 6, model.config.input_size),), tmp_path / "model.onnx", verbose=False)
