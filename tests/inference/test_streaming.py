"""Push inference: streams give the gates and logits of a forward pass, also after saving, copying and joining."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from skipping_models import STEPS, VARIANTS, answering, build, draw, forward

from hf_skiprnn import SkipRNNForFrameClassification, SkipRNNForSequenceClassification, SkipRNNModel
from hf_skiprnn.model.cells_skip_rnn import NEVER


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
        (
            torch.tensor([0.0, 1e300], dtype=torch.float64),
            r"holds 1e\+300 in row 0, column 1, .* not finite in torch.f",
        ),
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


@pytest.mark.parametrize("asked", ["gate_shift", "update_rate"])
def test_streams_keep_their_operating_points_when_others_join_and_leave(asked: str) -> None:
    model = build()
    model.config.gate_calibration = [[0.05, -4.0], [0.9, 4.0]]
    x, points = draw(model, 5, STEPS), [0.1, 0.3, 0.5, 0.7, 0.85]
    want = forward(model, x, **{asked: points})
    streams = model.stream(3, **{asked: points[:3]})
    seen: list[list[bool]] = [[] for _ in points]
    who = [0, 1, 2]
    for now in range(STEPS + 9):
        if now == 4:
            with pytest.raises(ValueError, match="Each stream has a gate shift of its own: give gate_shift="):
                streams.join()
            streams.join(1, **{asked: points[3]})
        if now == 9:
            streams.join(1, **{asked: [points[4]]})
        who += [3] * (now == 4) + [4] * (now == 9)
        places = [place for place, row in enumerate(who) if len(seen[row]) == STEPS or (row == 1 and now == 6)]
        for place in places:
            if len(seen[who[place]]) == STEPS:
                torch.testing.assert_close(streams.logits[place], want.logits[who[place]], rtol=1e-5, atol=1e-6)
        streams.leave(places)
        who = [row for place, row in enumerate(who) if place not in places]
        read = streams.push(torch.stack([x[row, len(seen[row])] for row in who])) if who else []
        for row, flag in zip(who, read, strict=True):
            seen[row].append(bool(flag))
    gates = want.update_gates.bool().tolist()
    assert seen == [gates[row][: len(seen[row])] for row in range(5)]
    assert [len(steps) for steps in seen] == [STEPS, 6, STEPS, STEPS, STEPS]


def test_one_shift_also_holds_for_streams_that_join_or_are_loaded() -> None:
    model = build()
    x = draw(model, 3, STEPS)
    want = forward(model, x, gate_shift=-0.7).update_gates.bool()
    assert not torch.equal(want, forward(model, x).update_gates.bool())
    for streams in (model.stream(2, gate_shift=-0.7), model.stream(0, gate_shift=-0.7)):
        streams.join(3 - len(streams))
        saved = streams.state_dict()
        assert torch.equal(torch.stack([streams.push(x[:, t]) for t in range(STEPS)], 1), want)
        one = model.stream(1, gate_shift=-0.7)
        one.load_state_dict(saved)
        assert torch.equal(torch.stack([one.push(x[:, t]) for t in range(STEPS)], 1), want)
    two = model.stream(2, gate_shift=[0.0, -0.7])
    with pytest.raises(ValueError, match="There are 3 saved streams, but gate shifts of 2"):
        two.load_state_dict(saved)
    plain = model.stream(1)  # the model's own shift; the one that joins has another
    plain.join(2, gate_shift=-0.7)
    gates = torch.stack([plain.push(x[:, t]) for t in range(STEPS)], 1)
    assert torch.equal(gates, torch.cat((forward(model, x[:1]).update_gates.bool(), want[1:])))


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


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("overrides", [*VARIANTS, {"gate": "random", "skip_probability": 0.6}], ids=str)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_copies_of_a_stream_go_on_alike(batch_size: int | None, overrides: dict, again) -> None:
    """A copy's tensors do not share memory with the weights, as those of the original do."""
    model = build(**overrides)
    x = draw(model, STEPS) if batch_size is None else draw(model, STEPS, batch_size)
    first = model.stream(batch_size, generator=torch.Generator().manual_seed(1))
    for step in x[:18]:
        first.push(step)
    second = again(first)
    if again is copy.copy and "gate" in overrides:
        second._reader = copy.deepcopy(first._reader)  # otherwise both use the same generator
    for step in x[18:]:
        assert torch.equal(torch.as_tensor(first.push(step)), torch.as_tensor(second.push(step)))
        assert torch.equal(first.logits, second.logits)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step", torch.zeros(3, dtype=torch.long), r"needs step \[\d\] int64; got \(3,\)"),
        ("step", 0.5, r"needs step \[\d\] int64; got .* torch.float32"),
        ("step", -1, "step must be 0 or more; got .*-1"),
        ("step", NEVER - 1, "step must be below"),
        ("steps_to_skip", -3, "steps_to_skip must be 0 or more; got .*-3"),
        ("steps_to_skip", 1.5, "needs steps_to_skip .* int64; got .* torch.float32"),
        ("steps_to_skip", 10**15, r"must follow from its state: row \d skips 2 steps; got 1000000000000000"),
        ("steps_to_skip", NEVER, "must follow from its state"),
        ("steps_to_skip", 1, "must follow from its state"),
        ("steps_since_update", 1.0, "must follow from its state: row . skips 1 steps; got 2"),
        ("steps_since_update", -1.0, "state.steps_since_update must be a whole number, 0 or more; got -1"),
        ("steps_since_update", 0.5, "state.steps_since_update must be a whole number"),
        ("steps_since_update", torch.inf, "state.steps_since_update must be a whole number"),
        ("increment", torch.nan, r"state.increment must be in \[0, 1\]; got nan"),
        ("increment", -0.1, r"state.increment must be in \[0, 1\]; got -0.1"),
        ("h", torch.nan, "state.h must be finite; got nan"),
        ("c", torch.inf, "state.c must be finite; got inf"),
    ],
)
def test_damaged_saved_streams_are_refused(batch_size: int, name: str, value, message: str) -> None:
    model = build()
    with torch.no_grad():
        model.base_model.update_gate.weight.zero_()
        model.base_model.update_gate.bias.fill_(-1.5)  # D = 0.18: two steps are skipped
    stream = model.stream(None if batch_size == 1 else batch_size)
    stream.push(draw(model, *([] if batch_size == 1 else [batch_size])))
    saved = stream.state_dict()
    assert saved["steps_to_skip"].tolist() == [2] * batch_size
    wrong = value
    if not isinstance(value, torch.Tensor):
        wrong = saved[name].to(torch.long if isinstance(value, int) else torch.float32).clone()
        wrong.view(-1)[-1] = value
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict(saved | {name: wrong})
    assert all(torch.equal(part, saved[name]) for name, part in stream.state_dict().items())


def test_foreign_saved_streams_are_refused() -> None:
    model = build()
    saved = model.stream(batch_size=2).state_dict()
    with pytest.raises(ValueError, match="A Stream is one sequence; 2 were saved"):
        model.stream().load_state_dict(saved)
    with pytest.raises(ValueError, match="A saved stream must hold"):
        build(cell_type="gru").stream(2).load_state_dict(saved)
    with pytest.raises(ValueError, match="state must have shapes"):
        build(hidden_size=8).stream(2).load_state_dict(saved)
    drawn = build(gate="random").stream()
    with pytest.raises(ValueError, match="row 0 skips 0 steps; got 3"):
        drawn.load_state_dict(drawn.state_dict() | {"steps_to_skip": torch.tensor([3])})


def test_a_nan_state_goes_on_only_where_nan_may_pass() -> None:
    state = forward(model := build(), torch.full((1, 3, 2), torch.nan)).state
    assert model.stream(state=state, check_inputs=False).push(torch.ones(2))
    for start in (model.stream, lambda **given: model.pull(answering(draw(model, 1, 3)), 3, **given)):
        with pytest.raises(ValueError, match=r"state.h must be finite; got nan. The state is damaged"):
            start(state=state)


@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_autocast_does_not_move_the_updates_of_a_stream(overrides: dict, batch_size: int | None) -> None:
    model = build(**overrides)
    x = draw(model, 1, STEPS)
    want = forward(model, x)
    stream = model.stream(batch_size)
    with torch.autocast("cpu", torch.bfloat16):
        read = [bool(stream.push(step if batch_size is None else step[None])) for step in x[0]]
    assert read == want.update_gates[0].bool().tolist()
    torch.testing.assert_close(stream.state.h, want.state.h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_stream_made_in_inference_mode_goes_on_outside_and_the_other_way(batch_size: int | None) -> None:
    model = build()
    x = draw(model, STEPS, *([] if batch_size is None else [2]))
    plain, stream = model.stream(batch_size), None
    with torch.inference_mode():
        stream = model.stream(batch_size)
        stream.push(x[0])
    stream.push(x[1])
    with torch.inference_mode():
        saved = stream.state_dict()
        stream.load_state_dict(saved)
        stream.push(x[2])
        if batch_size:
            stream.join(1)
            stream.leave([2])
    for step in x[3:]:
        stream.push(step)
    for step in x:
        plain.push(step)
    assert torch.equal(stream.logits, plain.logits)


def test_the_default_device_does_not_matter() -> None:
    model, x = build(), torch.randn(STEPS, 2, 2)
    plain, stream = model.stream(2), model.stream(2)
    for step in x:
        plain.push(step)
    with torch.device("meta"):
        stream.load_state_dict(model.stream(2).state_dict())
        stream.join(1)
        stream.leave([2])
        for step in x:
            stream.push(step)
    assert torch.equal(stream.logits, plain.logits)


@pytest.mark.parametrize("rows", [1, torch.tensor(1), [0.5], "ab"])
def test_streams_that_leave_are_named_by_a_list_of_whole_numbers(rows) -> None:
    streams = build().stream(2)
    with pytest.raises(ValueError, match=r"as a list|whole number"):
        streams.leave(rows)
    streams.leave(torch.tensor([0]))
    assert len(streams) == 1


@pytest.mark.parametrize("batch_size", [None, 2])
def test_fractions_of_steps_are_refused(batch_size: int | None) -> None:
    stream = build(gate="strided", stride=3).stream(batch_size)
    stream.push(torch.ones(*([2] if batch_size is None else [2, 2])))
    for steps in (0.5, 1.0, torch.tensor(1.0), "1"):
        with pytest.raises(ValueError, match="skip's number of steps must be a whole number; got"):
            stream.skip(steps)
    stream.skip(np.int64(1))
    assert torch.as_tensor(stream.steps_to_skip).tolist() in (1, [1, 1])
    with pytest.raises(ValueError, match=r"batch_size must be a whole number; got 2.0"):
        build().stream(2.0)
    with pytest.raises(ValueError, match="batch_size must not be negative"):
        build().stream(-1)


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
    model.set_gate_shift(-1)
    model.save_pretrained(tmp_path)
    loaded = SkipRNNForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(forward(loaded, x).update_gates, forward(model, x).update_gates)


@pytest.mark.parametrize("shift", ["a", [None], {}])
def test_a_shift_that_is_no_number_is_refused(shift) -> None:
    model = build()
    for call in (lambda: model.stream(gate_shift=shift), lambda: model(torch.randn(1, 3, 2), gate_shift=shift)):
        with pytest.raises(ValueError, match=r"gate_shift must be"):
            call()


def test_a_gate_shift_needs_a_learned_gate_and_a_number() -> None:
    with pytest.raises(ValueError, match="needs gate='learned'"):
        build(gate="strided").set_gate_shift(1)
    with pytest.raises(ValueError, match="finite number; got nan"):
        build().set_gate_shift(float("nan"))
