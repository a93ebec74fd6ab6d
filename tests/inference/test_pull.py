"""Pull inference: the same gates and logits as a forward pass, but only the steps that are read are fetched."""

from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from skipping_models import STEPS, VARIANTS, answering, assert_same_output, build, draw, forward

from hf_skiprnn import SkipRNNForFrameClassification, SkipRNNForSequenceClassification, SkipRNNModel
from hf_skiprnn.model.cells_skip_rnn import LARGEST_COUNT, NEVER, gate_opens, steps_to_skip
from hf_skiprnn.model.pull_skip_rnn import EndOfSequence, Position


@given(increment=st.floats(2**-25, 1, width=32), steps_since_update=st.integers(0, 1000))
def test_the_interval_is_the_first_step_at_which_the_gate_opens(increment: float, steps_since_update: int) -> None:
    skip = steps_to_skip(increment, steps_since_update)
    count = torch.tensor([steps_since_update + skip, steps_since_update + skip + 1])
    before, at = gate_opens(count, torch.full((2,), increment)).tolist()
    assert at or steps_since_update + skip + 1 >= LARGEST_COUNT
    assert not before or skip == 0


@pytest.mark.parametrize("steps", [2, 3, 7, 8, 500, 4097])
def test_ties_and_their_neighbours_agree_with_the_gate(steps: int) -> None:
    tie = torch.tensor(0.5 / steps)
    for increment in (tie.nextafter(torch.tensor(0.0)), tie, tie.nextafter(torch.tensor(1.0))):
        opens = gate_opens(torch.arange(1, 2 * steps), increment)
        assert steps_to_skip(increment.item(), 0) == int(opens.nonzero()[0])


def test_an_increment_without_effect_never_opens_and_a_nan_opens_at_once() -> None:
    assert steps_to_skip(0.0, 0) == NEVER
    assert steps_to_skip(1e-9, 0) == NEVER
    assert steps_to_skip(float("nan"), 3) == 0


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "kind", [SkipRNNForSequenceClassification, SkipRNNForFrameClassification, SkipRNNModel], ids=lambda k: k.__name__
)
def test_pull_gives_what_the_forward_pass_gives(kind: type, overrides: dict) -> None:
    model = build(kind, **overrides)
    x, lengths = draw(model, 4, STEPS), [STEPS, 0, 17, 1]
    mask = torch.arange(STEPS) < torch.tensor(lengths).unsqueeze(1)
    log: list[Position] = []
    out = model.pull(answering(x, log), lengths)
    want = forward(model, x, attention_mask=mask)
    assert_same_output(out, want)
    assert sorted(log) == [tuple(pair) for pair in want.update_gates.nonzero().tolist()]  # nothing else was fetched


def test_each_round_asks_for_the_next_read_of_every_row() -> None:
    model = build()
    x, rounds = draw(model, 3, STEPS), []
    out = model.pull(lambda positions: rounds.append(positions) or answering(x)(positions), [STEPS] * 3)
    reads = [gates.nonzero().flatten().tolist() for gates in out.update_gates]
    for index, positions in enumerate(rounds):
        assert positions == [(row, steps[index]) for row, steps in enumerate(reads) if index < len(steps)]
    assert 1 < len(rounds) == max(map(len, reads)) < STEPS


@pytest.mark.parametrize("overrides", [{}, {"gate": "strided"}, {"gate": "always"}], ids=str)
def test_pull_of_unknown_length_ends_where_fetch_says(overrides: dict) -> None:
    model = build(**overrides)
    x, lengths = draw(model, 3, STEPS), [STEPS, 5, 0]

    def fetch(positions: list[Position]) -> torch.Tensor:
        if ended := {row: lengths[row] for row, step in positions if step >= lengths[row]}:
            raise EndOfSequence(ended)
        return answering(x)(positions)

    mask = torch.arange(STEPS) < torch.tensor(lengths).unsqueeze(1)
    assert_same_output(model.pull(fetch, batch_size=3), forward(model, x, attention_mask=mask))


def test_a_single_row_needs_no_list() -> None:
    model = build()
    x = draw(model, 1, STEPS)
    assert_same_output(model.pull(lambda positions: x[0, [step for _, step in positions]], STEPS), forward(model, x))


@pytest.mark.parametrize("length", [np.int64(STEPS), torch.tensor(STEPS)], ids=["numpy", "torch"])
def test_a_length_may_be_any_librarys_number(length: object) -> None:
    model = build()
    x = draw(model, 2, STEPS)
    assert_same_output(model.pull(answering(x), length, batch_size=2), forward(model, x))


def test_another_head_in_the_classifiers_place_is_asked() -> None:
    model = build()
    model.classifier = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    x = draw(model, 1, STEPS)
    want = forward(model, x)
    assert_same_output(model.pull(answering(x), STEPS), want)
    stream = model.stream()
    for step in x[0]:
        stream.push(step)
    torch.testing.assert_close(stream.logits, want.logits[0])
    assert not stream.logits.requires_grad


def test_random_gates_are_those_of_a_forward_pass() -> None:
    model = build(gate="random", skip_probability=0.6)
    x = draw(model, 2, STEPS)
    out = model.pull(answering(x), [STEPS] * 2, generator=torch.Generator().manual_seed(4))
    assert_same_output(out, forward(model, x, generator=torch.Generator().manual_seed(4)))
    with pytest.raises(ValueError, match="give their length"):
        model.pull(answering(x), batch_size=2)


def test_pull_continues_from_a_state_in_the_middle_of_skipped_steps() -> None:
    model = build()
    x = draw(model, 4, 2 * STEPS)
    whole = forward(model, x)
    first = model.pull(answering(x), [STEPS + 1] * 4)
    assert int(first.state.steps_since_update.max()) > 0
    second = model.pull(answering(x[:, STEPS + 1 :]), [STEPS - 1] * 4, state=first.state)
    assert torch.equal(torch.cat((first.update_gates, second.update_gates), 1), whole.update_gates)
    torch.testing.assert_close(second.logits, whole.logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    x = draw(model, 2, STEPS).to(dtype)
    want = forward(model, x)
    assert torch.equal(model.pull(answering(x), [STEPS] * 2).update_gates, want.update_gates)
    stream = model.stream()
    assert [stream.push(step) for step in x[0]] == want.update_gates[0].bool().tolist()


def test_what_a_fetch_may_answer() -> None:
    model = build()
    x = draw(model, 1, STEPS)
    want = model.pull(answering(x), STEPS).logits
    for convert in (lambda t: t.numpy(), lambda t: t.tolist(), list, lambda t: list(t.numpy())):
        torch.testing.assert_close(model.pull(lambda p, c=convert: c(answering(x)(p)), STEPS).logits, want)
    frozen = x[0].numpy().copy()
    frozen.flags.writeable = False  # like a memmap opened for reading
    torch.testing.assert_close(model.pull(lambda p: frozen[p[0][1] : p[0][1] + 1], STEPS).logits, want)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(2, 3), r"must be \[rows, input_size\] = \(2, 2\); got \(2, 3\)"),
        (torch.zeros(1, 2), r"= \(2, 2\); got \(1, 2\)"),
        (torch.zeros(2, 2, dtype=torch.uint8), "must be floating point; got torch.uint8"),
        (torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), "holds nan in row 1, column 0"),
        (torch.tensor([[0.0, torch.inf], [0.0, 0.0]]), "holds inf in row 0, column 1"),
        (None, "must be an array of numbers; got NoneType"),
        ("frames", "must be an array of numbers; got str"),
        ([[0.0, 1.0], [0.0]], "must be an array of numbers; got list"),
    ],
)
def test_wrong_answers_are_refused(answer: object, message: str) -> None:
    with pytest.raises(
        ValueError, match=rf"What fetch answered to \(row, position\) \[\(0, 0\), \(1, 0\)\].*{message}"
    ):
        build().pull(lambda positions: answer, [STEPS] * 2)


def test_wrong_lengths_and_ends_are_refused() -> None:
    model = build()
    x = draw(model, 2, STEPS)

    def ends(lengths: dict[int, int]) -> Callable:
        def fetch(positions: list[Position]) -> torch.Tensor:
            if positions[0][1] > 3:
                raise EndOfSequence(lengths)
            return answering(x)(positions)

        return fetch

    for lengths in ([], [-1], [3, -2]):
        with pytest.raises(ValueError, match="at least one row, and lengths of 0 or more"):
            model.pull(answering(x), lengths)
    for length in (2.5, [4, 2.5], torch.tensor(4.0)):
        with pytest.raises(ValueError, match="length must be a whole number; got"):
            model.pull(answering(x), length)
    with pytest.raises(ValueError, match=r"EndOfSequence's length of row 0 must be a whole number; got 4\.5"):
        model.pull(ends({0: 4.5}), STEPS)
    with pytest.raises(ValueError, match="length has 2 rows, but batch_size is 3"):
        model.pull(answering(x), [4, 5], batch_size=3)
    with pytest.raises(ValueError, match="ended row 0 after 1 steps; steps already passed there"):
        model.pull(ends({0: 1}), STEPS)
    with pytest.raises(ValueError, match="ended row 7 after 9 steps; steps already passed there: no such row"):
        model.pull(ends({7: 9}), STEPS)
    with pytest.raises(ValueError, match="nothing that was asked for lies behind an end"):
        model.pull(ends({0: STEPS}), STEPS)


def test_what_a_fetch_raises_arrives_with_a_note() -> None:
    def fetch(positions: list[Position]) -> torch.Tensor:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone") as raised:
        build().pull(fetch, STEPS)
    assert raised.value.__notes__ == ["raised by fetch, which was asked for (row, position) [(0, 0)]"]


def test_nan_passes_where_it_may_and_shows_in_the_logits() -> None:
    model = build()
    x = draw(model, 1, STEPS)
    x[0, 0] = torch.nan
    assert model.pull(answering(x), STEPS, check_inputs=False).logits.isnan().all()
    stream = model.stream(check_inputs=False)
    assert stream.push(x[0, 0])
    assert stream.steps_to_skip == 0


def test_pull_and_stream_build_no_graph_and_apply_no_dropout() -> None:
    model = build(classifier_dropout=0.9).train()
    x = draw(model, 1, STEPS).requires_grad_()
    out = model.pull(answering(x), STEPS)
    assert not any(part.requires_grad for part in (out.logits, out.state.h, out.budget_loss))
    torch.testing.assert_close(out.logits, forward(model.eval(), x).logits)
    stream = model.train().stream()
    stream.push(x[0, 0])
    assert not stream.logits.requires_grad
    torch.testing.assert_close(stream.logits, forward(model.eval(), x[:, :1]).logits[0])


def test_autocast_does_not_move_the_updates_of_pull() -> None:
    model = build(num_hidden_layers=2)
    x = draw(model, 3, STEPS)
    want = forward(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.pull(answering(x), [STEPS] * 3)
    assert torch.equal(got.update_gates, want.update_gates)
    torch.testing.assert_close(got.state.h, want.state.h, rtol=1e-5, atol=1e-6)
