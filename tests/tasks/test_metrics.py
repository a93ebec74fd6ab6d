"""Compare metrics with numbers computed by hand or printed in the paper."""

from types import SimpleNamespace

import numpy as np
import pytest

from hf_skiprnn.evaluation.figures import COLOURS, accuracy_against_updates, kind_of, pareto_front
from hf_skiprnn.evaluation.files import write_whole
from hf_skiprnn.evaluation.metrics import (
    accuracy,
    balanced_accuracy,
    explained_variance,
    mean_squared_error,
    micro_f1,
    multiply_accumulates,
    operation_counts,
    update_statistics,
)


def config(cell_type="lstm", input_size=1, hidden_size=110, num_hidden_layers=1):
    return SimpleNamespace(
        cell_type=cell_type, input_size=input_size, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers
    )


def test_multiply_accumulates_are_the_papers():
    """Table 2: 784 steps of one pixel, 110 units."""
    assert f"{multiply_accumulates(config('lstm'), 784):.2e}" == "3.83e+07"
    assert f"{multiply_accumulates(config('gru'), 784):.2e}" == "2.87e+07"


def test_multiply_accumulates_count_every_layer_and_only_updates():
    by_hand = 4 * 8 * (3 + 8) + 2 * (4 * 8 * (8 + 8))  # layer 1 reads 3 inputs, layers 2 and 3 read 8
    assert multiply_accumulates(config("lstm", input_size=3, hidden_size=8, num_hidden_layers=3), 1) == by_hand
    assert multiply_accumulates(config("gru"), 19.5) == 19.5 * 3 * 110 * 111
    assert multiply_accumulates(config("gru"), 0) == 0


def test_operation_counts():
    stats = update_statistics([380.0, 388.0], [784, 784])
    assert operation_counts(config(), stats) == {"read": 384 * 4 * 110 * 111, "every_step": 784 * 4 * 110 * 111}
    assert operation_counts(config(), {"updates": 0.0, "update_rate": 0.0}) == {"read": 0.0, "every_step": 0.0}


def test_update_statistics_by_hand():
    stats = update_statistics(np.array([0.0, 2.0, 4.0, 6.0, 8.0, 10.0]), np.array([10, 10, 10, 10, 10, 30]))
    assert stats == {
        "updates": 5.0,
        "updates_std": pytest.approx(np.sqrt(70 / 6)),
        "updates_p20": 2.0,
        "updates_p50": 5.0,
        "updates_p80": 8.0,
        "update_rate": 30 / 80,
    }
    assert all(type(value) is float for value in stats.values())
    assert update_statistics(np.zeros(2), np.zeros(2))["update_rate"] == 0.0  # rows without a real step


def test_accuracy_and_squared_error_by_hand():
    assert accuracy([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]], [1, 1, 1]) == pytest.approx(2 / 3)
    assert mean_squared_error([[1.0], [2.0]], [1.0, 4.0]) == 2.0


def test_other_metrics_by_hand():
    logits = np.eye(3)[[0, 0, 0, 2]]  # class 2, which is in no label, is predicted once
    assert balanced_accuracy(logits, [0, 0, 1, 1]) == pytest.approx((1 + 0) / 2)
    assert micro_f1([[1.0, -1.0], [1.0, 1.0]], [[1, 0], [0, 1]]) == pytest.approx(2 * 2 / (3 + 2))
    assert micro_f1([[-1.0]], [[0]]) == 0.0
    targets = np.array([[0.0, 0.0], [2.0, 20.0]])  # variances 1 and 100; errors 1 and 25
    assert explained_variance(targets + np.array([1, 5]), targets) == pytest.approx(1 - 26 / 101)
    assert np.isnan(explained_variance([1.0], [1.0]))


def test_a_kind_of_model_has_one_colour():
    names = {"Skip LSTM": "learned", "LSTM": "plain", "LSTM, strided": "strided", "GRU, random skips": "random"}
    names |= {"Skip GRU, λ = 1e-4 (paper)": "learned", "LSTM, p_skip = 0.5": "random", "shifted gate": "learned"}
    names |= {"LSTM, one step in 4": "strided"}
    assert {name: kind_of(name) for name in names} == names
    figure = accuracy_against_updates({name: [[(1.0, 0.5)], [(2.0, 0.6)]] for name in names}, "accuracy", "updates")
    drawn = [line.get_color() for line in figure.axes[0].get_lines() if line.get_drawstyle() == "steps-post"]
    assert drawn == [COLOURS[kind] for kind in names.values()]


def test_a_point_is_a_mean_with_its_spread():
    runs = [(10.0, 0.8), (12.0, 0.9), (14.0, 0.7)]
    figure = accuracy_against_updates({"Skip LSTM": [runs, [(30.0, 0.95)]]}, "accuracy", "updates")
    bars = figure.axes[0].containers
    assert [bar.lines[0].get_xydata().round(6).tolist() for bar in bars] == [[[12.0, 0.8]], [[30.0, 0.95]]]
    assert [bar.has_yerr for bar in bars] == [True, False]
    across, up = (collection.get_segments()[0] for collection in bars[0].lines[2])
    assert across[:, 0].tolist() == pytest.approx([10.0, 14.0])  # the standard deviation of 10, 12, 14 is 2
    assert up[:, 1].tolist() == pytest.approx([0.7, 0.9])
    errors = [(5.0, 0.1), (9.0, 0.2), (8.0, 0.01)]
    assert pareto_front(errors, lower_is_better=True) == [(5.0, 0.1), (8.0, 0.01)]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "λ")
    assert path.read_text(encoding="utf-8") == "λ"
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half\ud800")
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text(encoding="utf-8") == "λ"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy(np.zeros((3, 2)), np.zeros(2)), r"logits \[N, C\] and labels \[N\]; got \(3, 2\) and \(2,\)"),
        (lambda: mean_squared_error(np.zeros(3), np.zeros(2)), r"one prediction per target; got \(3,\) and \(2,\)"),
        (lambda: update_statistics(np.zeros(3), np.zeros(2)), r"got \(3,\), \(2,\)"),
        (lambda: update_statistics([], []), r"got \(0,\), \(0,\)"),
    ],
)
def test_errors_say_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()
