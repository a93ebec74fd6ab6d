"""Pull and push inference: the same gates and logits as a forward pass, from the steps that are read and no others."""

import copy
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file

from hf_skiprnn import (
    SkipRNNConfig,
    SkipRNNForFrameClassification,
    SkipRNNForSequenceClassification,
    SkipRNNModel,
)
from hf_skiprnn.model.cells_skip_rnn import LARGEST_COUNT, NEVER, gate_opens, steps_to_skip
from hf_skiprnn.model.pull_skip_rnn import EndOfSequence, Position

STEPS = 40
VARIANTS = [
    {},
    {"num_hidden_layers": 3},
    {"cell_type": "gru", "num_hidden_layers": 2},
    {"cell_type": "gru", "gru_reset": "after"},
    {"gate": "always"},
    {"gate": "strided", "stride": 3},
    {"vocab_size": 9},
]


def build(kind: type = SkipRNNForSequenceClassification, **overrides):
    """A model in evaluation mode that skips about two steps of three, and whose gates are busy."""
    settings = {"hidden_size": 7, "input_size": 2, "num_labels": 3, "update_bias": -1.5} | overrides
    model = kind(SkipRNNConfig(**settings)).eval()
    if settings.get("gate", "learned") == "learned":
        with torch.no_grad():
            model.base_model.update_gate.weight.mul_(3)
    return model


def draw(model, *shape: int) -> torch.Tensor:
    vocab = model.config.vocab_size
    return torch.randint(0, vocab, shape) if vocab else torch.randn(*shape, model.config.input_size)


def forward(model, x: torch.Tensor, **options):
    with torch.no_grad():
        return model(**{model.main_input_name: x}, output_update_gates=True, **options)


def answering(x: torch.Tensor, log: list[Position] | None = None) -> Callable[[list[Position]], torch.Tensor]:
    def fetch(positions: list[Position]) -> torch.Tensor:
        if log is not None:
            log.extend(positions)
        return torch.stack([x[row, step] for row, step in positions])

    return fetch


def assert_same_output(got, want) -> None:
    assert torch.equal(got.update_gates, want.update_gates)
    assert got.keys() == want.keys()
    for name, value in want.items():
        parts = zip(got[name], value, strict=True) if name == "state" else [(got[name], value)]
        for mine, theirs in parts:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# How long a gate stays closed


@given(increment=st.floats(2**-25, 1, width=32), since=st.integers(0, 1000))
def test_the_interval_is_the_first_step_at_which_the_gate_opens(increment: float, since: int) -> None:
    skip = steps_to_skip(increment, since)
    count = torch.tensor([since + skip, since + skip + 1])
    before, at = gate_opens(count, torch.full((2,), increment)).tolist()
    assert at or since + skip + 1 >= LARGEST_COUNT
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


# Pull


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
    frozen.flags.writeable = False  # such as a memmap opened for reading
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


# Push


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_a_stream_gives_what_the_forward_pass_gives(overrides: dict) -> None:
    model = build(**overrides)
    x = draw(model, 1, STEPS)
    want = forward(model, x)
    stream = model.stream()
    read = [stream.push(x[0, step], step) for step in range(STEPS)]
    assert read == want.update_gates[0].bool().tolist()
    torch.testing.assert_close(stream.logits, want.logits[0], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(stream.state, want.state, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_logits_at_any_time_are_those_of_the_steps_so_far() -> None:
    model = build(SkipRNNForFrameClassification)
    x = draw(model, 1, STEPS)
    stream, seen = model.stream(), []
    for step in x[0]:
        stream.push(step)
        seen.append(stream.logits)
    torch.testing.assert_close(torch.stack(seen), forward(model, x).logits[0], rtol=1e-5, atol=1e-6)


def test_a_producer_that_sleeps_reads_only_what_is_needed() -> None:
    model = build()
    x = draw(model, 1, STEPS)
    want = forward(model, x)
    stream, taken = model.stream(), []
    while stream.step < STEPS:
        taken.append(stream.step)
        assert stream.push(x[0, stream.step])
        stream.skip(min(stream.steps_to_skip, STEPS - stream.step))
    assert taken == want.update_gates[0].nonzero().flatten().tolist()
    torch.testing.assert_close(stream.logits, want.logits[0], rtol=1e-5, atol=1e-6)


def test_a_skipped_step_is_not_looked_at() -> None:
    stream = build(gate="strided", stride=3).stream()
    assert [stream.push(torch.ones(2)), stream.push(None), stream.push("anything")] == [True, False, False]
    with pytest.raises(ValueError, match="Step 3 must be an array of numbers"):
        stream.push(None)


@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), r"got \((1, )?3"),
        (torch.zeros(2, dtype=torch.int64), "must be floating point; got torch.int64"),
        (torch.tensor([0.0, torch.nan]), "holds nan in row 0, column 1"),
        (np.array([np.inf, 0.0]), "holds inf in row 0, column 0"),
    ],
)
def test_a_wrong_step_is_refused_and_the_stream_goes_on(batch_size: int | None, x: object, message: str) -> None:
    model = build()
    stream = model.stream(batch_size)
    stream.push(torch.ones(2))
    stream.skip(int(stream.steps_to_skip))
    before = stream.state_dict()
    with pytest.raises(ValueError, match=message):
        stream.push(x)
    assert all(torch.equal(part, before[name]) for name, part in stream.state_dict().items())
    assert stream.push(torch.ones(2))


def test_steps_out_of_order_are_refused() -> None:
    stream = build(gate="strided", stride=3).stream()
    x = torch.ones(2)
    stream.push(x, 0)
    with pytest.raises(ValueError, match="step 0 came again or late; the next one is 1"):
        stream.push(x, 0)
    with pytest.raises(ValueError, match=r"step 2 was pushed, but the next one is 1: 1 are missing; call skip\(1\)"):
        stream.push(x, 2)
    with pytest.raises(ValueError, match="4 are missing; and the model wants to read step 3"):
        stream.push(x, 5)
    with pytest.raises(ValueError, match=r"skip\(3\) would pass over step 3, which the model reads. Skip at most 2"):
        stream.skip(3)
    with pytest.raises(ValueError, match="0 or more; got -1"):
        stream.skip(-1)
    stream.skip(2)
    assert stream.push(x, 3)


def test_tokens_are_pushed_as_numbers() -> None:
    model = build(vocab_size=9)
    ids = draw(model, 1, STEPS)
    stream = model.stream()
    assert [stream.push(token) for token in ids[0].tolist()] == forward(model, ids).update_gates[0].bool().tolist()
    for wrong, message in ((9, r"in \[0, vocab_size = 9\); got \[9\]"), (0.5, "must be token ids, integers")):
        with pytest.raises(ValueError, match=message):
            model.stream().push(wrong)


def test_a_step_may_be_an_array_a_list_or_a_number() -> None:
    wide, narrow = build(), build(input_size=1)
    x, y = draw(wide, 1, STEPS), draw(narrow, 1, STEPS)
    for model, series, kinds in (
        (wide, x, (lambda t: t.numpy(), lambda t: t.tolist(), lambda t: t.double(), lambda t: t.unsqueeze(0))),
        (narrow, y, (lambda t: t.item(), lambda t: t[0], lambda t: t.numpy().astype(np.float64))),
    ):
        want = forward(model, series).update_gates[0].bool().tolist()
        for kind in kinds:
            stream = model.stream()
            assert [stream.push(kind(step)) for step in series[0]] == want


def test_bare_models_have_no_logits() -> None:
    with pytest.raises(AttributeError, match="no classifier"):
        _ = build(SkipRNNModel).stream().logits


# Many streams


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_streams_advance_together(overrides: dict) -> None:
    model = build(**overrides)
    x = draw(model, 5, STEPS)
    want = forward(model, x)
    streams = model.stream(batch_size=5)
    gates = torch.stack([streams.push(x[:, step], [step] * 5) for step in range(STEPS)], 1)
    assert torch.equal(gates, want.update_gates.bool())
    torch.testing.assert_close(streams.logits, want.logits, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(streams.state, want.state, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_streams_join_and_leave() -> None:
    model = build()
    x = draw(model, 4, STEPS)
    want = forward(model, x)
    streams, who, starts = model.stream(batch_size=2), [0, 1], {0: 0, 1: 0}
    seen: dict[int, list[bool]] = {row: [] for row in range(4)}
    for now in range(2 * STEPS):
        if now == 7:
            assert list(streams.join(2)) == [2, 3]
            who, starts = [*who, 2, 3], starts | {2: 7, 3: 7}
        ended = [place for place, row in enumerate(who) if now - starts[row] == STEPS]
        for place in ended:
            torch.testing.assert_close(streams.logits[place], want.logits[who[place]], rtol=1e-5, atol=1e-6)
        streams.leave(ended)
        who = [row for place, row in enumerate(who) if place not in ended]
        assert len(streams) == len(who)
        read = streams.push(torch.stack([x[row, now - starts[row]] for row in who])) if who else []
        for row, flag in zip(who, read, strict=True):
            seen[row].append(bool(flag))
    assert [seen[row] for row in range(4)] == want.update_gates.bool().tolist()
    with pytest.raises(IndexError, match=r"rows must be in \[0, 0\); got \[1\]"):
        streams.leave([1])


def test_many_streams_skip_and_sleep_together() -> None:
    streams = build(gate="strided", stride=3).stream(batch_size=2)
    x = torch.ones(2, 2)
    streams.push(x)
    assert streams.steps_to_skip.tolist() == [2, 2]
    streams.skip(1)
    assert streams.steps_to_skip.tolist() == [1, 1]
    streams.join()
    with pytest.raises(ValueError, match=r"Row 2: skip\(1\) would pass over step 0"):
        streams.skip(1)
    with pytest.raises(ValueError, match="a row for each of 3 streams; got"):
        streams.push(x)
    with pytest.raises(ValueError, match="Row 1: step 5 was pushed, but the next one is 2"):
        streams.push(torch.ones(3, 2), [2, 5, 0])
    assert streams.push(torch.full((3, 2), torch.nan).index_fill(0, torch.tensor([2]), 1.0)).tolist() == [0, 0, 1]


# Saved and restored


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("overrides", [{}, {"cell_type": "gru"}, {"gate": "strided", "stride": 4}], ids=str)
def test_a_saved_stream_goes_on_exactly(tmp_path: Path, batch_size: int | None, overrides: dict) -> None:
    model = build(**overrides)
    x = draw(model, batch_size or 1, STEPS)
    x = x[0] if batch_size is None else x.transpose(0, 1)
    first = model.stream(batch_size)
    for step in x[:18]:
        first.push(step)
    save_file(first.state_dict(), tmp_path / "stream.safetensors")
    second = copy.deepcopy(model).stream(batch_size)
    second.load_state_dict(load_file(tmp_path / "stream.safetensors"))
    for step in x[18:]:
        assert torch.equal(torch.as_tensor(first.push(step)), torch.as_tensor(second.push(step)))
    assert all(torch.equal(part, second.state_dict()[name]) for name, part in first.state_dict().items())


def test_a_stream_takes_over_from_a_forward_pass_and_hands_back() -> None:
    model = build()
    x = draw(model, 1, 3 * STEPS)
    whole, first = forward(model, x), forward(model, x[:, :STEPS])
    stream = model.stream(state=first.state)
    for step in x[0, STEPS : 2 * STEPS]:
        stream.push(step)
    last = forward(model, x[:, 2 * STEPS :], state=stream.state)
    assert torch.equal(last.update_gates, whole.update_gates[:, 2 * STEPS :])
    torch.testing.assert_close(last.logits, whole.logits, rtol=1e-5, atol=1e-6)


def test_wrong_saved_streams_are_refused() -> None:
    model = build()
    saved = model.stream(batch_size=2).state_dict()
    with pytest.raises(ValueError, match="A Stream is one sequence; 2 were saved"):
        model.stream().load_state_dict(saved)
    with pytest.raises(ValueError, match="A saved stream must hold"):
        build(cell_type="gru").stream(2).load_state_dict(saved)
    with pytest.raises(ValueError, match="state must have shapes"):
        build(hidden_size=8).stream(2).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"needs step \[2\]; got \(3,\)"):
        model.stream(2).load_state_dict(saved | {"step": torch.zeros(3, dtype=torch.long)})
    with pytest.raises(ValueError, match="batch_size must not be negative"):
        model.stream(-1)


# One checkpoint, several budgets


def test_a_gate_shift_moves_the_updates_and_leaves_the_weights(tmp_path: Path) -> None:
    model = build()
    x, before = draw(model, 8, STEPS), copy.deepcopy(model.state_dict())
    rates = []
    for shift in (-40.0, -2.0, -1.0, 0.0, 1.0, 40.0):
        model.set_gate_shift(shift)
        out = forward(model, x)
        rates.append(out.num_updates.mean().item())
        assert torch.equal(out.update_gates, model.pull(answering(x), [STEPS] * 8).update_gates)
        moved = copy.deepcopy(model)
        moved.set_gate_shift(0)
        with torch.no_grad():
            moved.base_model.update_gate.bias.add_(shift)
        assert torch.equal(out.update_gates, forward(moved, x).update_gates)
    assert rates == sorted(rates)
    assert rates[0] == 1  # the first step is always read
    assert rates[-1] == STEPS
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = SkipRNNForSequenceClassification.from_pretrained(tmp_path)
    model.set_gate_shift(0)
    assert torch.equal(forward(loaded, x).update_gates, forward(model, x).update_gates)


def test_a_gate_shift_needs_a_learned_gate_and_a_number() -> None:
    with pytest.raises(ValueError, match="needs gate='learned'"):
        build(gate="strided").set_gate_shift(1)
    with pytest.raises(ValueError, match="finite number; got nan"):
        build().set_gate_shift(float("nan"))
