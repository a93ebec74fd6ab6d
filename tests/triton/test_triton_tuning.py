"""The tuner's bookkeeping, without a GPU: what is tried when, and what its files hold."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 and aarch64")

from hf_skiprnn.kernels.triton import tuning as triton_tuning
from hf_skiprnn.kernels.triton.tiling import Choice, choices, tiling

UNITS = 200


class Stage:
    """A device whose times are made up, and what was run on it."""

    def __init__(self) -> None:
        self.times: dict[Choice, float] = {}
        self.ran: list[Choice] = []
        self.problems = 0

    def milliseconds(self, run: Callable[[], object]) -> float:
        run()
        return self.times[self.ran[-1]]

    def prepare(self) -> Callable[[Choice], object]:
        self.problems += 1
        return self.ran.append

    def choose(self, units: int = UNITS, width: int = 1, part: str = "forward", cell: str = "lstm") -> Choice:
        return triton_tuning.choose(part, layer(units, width), cell, width, self.prepare)


def layer(units: int = UNITS, width: int = 1) -> list[Tensor]:
    return [torch.zeros(4 * units, width), torch.zeros(4 * units, units), torch.zeros(0), torch.zeros(0)]


def candidates() -> list[Choice]:
    return choices(UNITS, 4, 1, torch.float32)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    stage = Stage()
    stage.times = {choice: 5.0 - index for index, choice in enumerate(candidates())}
    monkeypatch.setattr(triton_tuning, "milliseconds", stage.milliseconds)
    monkeypatch.setattr(triton_tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("HF_SKIPRNN_AUTOTUNE", raising=False)
    return stage


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tuning, "_chosen", {})


def test_the_fastest_is_taken_and_kept(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(candidates()) > 2
    assert stage.choose() == candidates()[-1]
    assert stage.ran == candidates()
    assert stage.choose() == candidates()[-1]
    another_process(monkeypatch)
    assert stage.choose() == candidates()[-1]
    assert (len(stage.ran), stage.problems) == (len(candidates()), 1)


def test_what_is_tuned_apart(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, parts, precision, whether inputs are multiplied in the kernel, the device: but neither B nor T."""
    stage.choose()
    stage.choose(width=16)
    assert stage.problems == 1
    stage.times = {choice: 1.0 for units in (UNITS, 201) for choice in choices(units, 4, 1, torch.float32)}
    stage.choose(width=17)
    stage.choose(units=201)
    stage.choose(part="backward")
    assert stage.problems == 4
    monkeypatch.setattr(triton_tuning, "precision", lambda dtype: "tf32")
    stage.choose()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    stage.choose()
    monkeypatch.setattr(triton_tuning, "_engine", lambda: "other sources")
    stage.choose()
    assert stage.problems == 7


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"choice": 3}', '{"choice": {"warps": 4}, "key": []}', "null"])
def test_a_broken_file_is_tuned_again_and_mended(
    content: str, stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage.choose()
    (file,) = (tmp_path / "hf_skiprnn").iterdir()
    right = file.read_bytes()
    file.write_text(content)
    another_process(monkeypatch)
    assert stage.choose() == candidates()[-1]
    assert stage.problems == 2
    assert file.read_bytes() == right


def test_a_choice_that_is_none_any_more_is_not_taken(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage.choose()
    (file,) = (tmp_path / "hf_skiprnn").iterdir()
    held = json.loads(file.read_text())
    held["choice"]["warps"] = 32
    file.write_text(json.dumps(held))
    another_process(monkeypatch)
    assert stage.choose() == candidates()[-1]


def test_many_writers_leave_one_whole_file(stage: Stage, tmp_path: Path) -> None:
    key = ("a", "key")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: triton_tuning.write(key, candidates()[index % 3], stage.times), range(200)))
    assert triton_tuning.read(key, candidates()) in candidates()[:3]
    assert len(list((tmp_path / "hf_skiprnn").iterdir())) == 1


def test_a_folder_that_cannot_be_written_costs_only_the_file(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    assert stage.choose() == candidates()[-1]
    assert stage.choose() == candidates()[-1]
    assert stage.problems == 1


def test_choices_that_do_not_run_lose(stage: Stage, tmp_path: Path) -> None:
    stage.times[candidates()[-1]] = float("inf")
    assert stage.choose() == candidates()[-2]


def test_where_none_runs_the_caller_meets_the_error(stage: Stage, tmp_path: Path) -> None:
    stage.times = dict.fromkeys(candidates(), float("inf"))
    assert stage.choose() == candidates()[0]
    assert not (tmp_path / "hf_skiprnn").exists()


def test_nothing_is_tried_while_a_graph_is_captured(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert stage.choose() == candidates()[0]
    assert stage.problems == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert stage.choose() == candidates()[-1]  # what a graph took is not kept
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert stage.choose() == candidates()[-1]


def test_tuning_can_be_switched_off(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SKIPRNN_AUTOTUNE", "0")
    assert stage.choose() == candidates()[0]
    assert stage.problems == 0


def test_a_kernel_that_fails_takes_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    def fails() -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    assert triton_tuning.milliseconds(fails) == float("inf")


@pytest.mark.parametrize("width", [1, 3000])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_trial_is_like_the_callers_problem_and_no_part_of_it(cell: str, width: int) -> None:
    gates = 4 if cell == "lstm" else 3
    weights = [torch.ones(gates * 8, width), torch.ones(gates * 8, 8), torch.ones(gates * 8), torch.zeros(0)]
    inputs, like, gate, (h, c, *_) = triton_tuning.trial(weights, cell, width)
    assert inputs.shape[2] == min(width, 17)
    assert [w.shape for w in like[1:]] == [w.shape for w in weights[1:]]
    assert like[0].shape == (gates * 8, inputs.shape[2])
    assert h.shape == (1, len(inputs), 8)
    assert (c is None) == (cell == "gru")
    assert torch.sigmoid(gate[1]) > 0.5  # every step is an update
    assert all(w.eq(1).all() for w in weights if w.numel())


def test_choices_differ_and_the_cut_takes_them() -> None:
    for units in (5, 64, 128, 512):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            found = choices(units, 4, 1, dtype)
            assert len(set(found)) == len(found) > 1
            cuts = {tiling(64, units, 4, 1, dtype, 132, choice) for choice in found}
            assert len(cuts) == len(found)
