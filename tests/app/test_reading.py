"""Check what stands behind the app's tabs: finding and loading checkpoints, drawings, readings, what they show."""

import base64
import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import test_documents
import torch
from checkpoints import FOLDERS, LARGEST, TO_TRAIN, Checkpoint, Kind, dial, found, load, missing
from drawings import LONGEST, SIDE, drawn, ink, value_of
from examples import REVIEW, SERIES, canvases
from hub_server.process import HubClient
from paths import CARDS, ROOT
from PIL import Image
from reading import describe, model_inputs, needs, read, show, table
from small_checkpoints import small_checkpoint

import hf_skiprnn_cli
from hf_skiprnn import SkipRNNConfig
from hf_skiprnn.hub.upload import publish

FIND_DIGIT, FSDD = str(CARDS / "skip-lstm-find-digit"), str(CARDS / "skip-lstm-fsdd-dial")


@pytest.fixture
def sound(tmp_path: Path) -> str:
    """A second of a rising tone."""
    times = np.arange(16000) / 16000
    soundfile.write(tmp_path / "tone.wav", 0.3 * np.sin(2 * np.pi * (300 + 400 * times) * times), 16000)
    return str(tmp_path / "tone.wav")


def updates_in(html: str) -> int:
    shown = re.search(r"<b>(\d+) of \d+</b>", html)
    assert shown, html
    return int(shown[1])


def test_checkpoints_are_found_by_kind_and_those_with_a_dial_come_first(tmp_path: Path) -> None:
    for kind in ("text", "audio", "series", "frames"):
        small_checkpoint(tmp_path / kind, kind)
    small_checkpoint(tmp_path / "without-weights").joinpath("model.safetensors").unlink()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("{")
    kinds: tuple[Kind, ...] = ("image", "text", "sound", "series")
    names = {kind: [Path(name).name for name in found(kind, [tmp_path])] for kind in kinds}
    assert names == {"image": [], "text": ["text"], "sound": ["audio"], "series": ["series"]}
    shipped = [Path(name).name for name in found("image", [CARDS])]
    assert shipped[0] == "skip-lstm-find-digit"
    assert {"skip-lstm-digits", "skip-lstm-mnist"} < set(shipped)
    assert CARDS in FOLDERS


@pytest.mark.parametrize("kind", TO_TRAIN)
def test_what_to_run_for_a_missing_checkpoint_is_a_command_of_this_package(kind: Kind) -> None:
    command = TO_TRAIN[kind]
    assert command in missing(kind)
    assert not test_documents.unknown_options(command)
    recipe = re.search(r"--config (\S+)", command)
    task = re.search(r"--task (\S+)", command)
    assert (recipe[1] if recipe else f"{task and task[1]}-skip-lstm") in hf_skiprnn_cli.recipes()


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "text", "text")
    evil = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nraise SystemExit('it ran')\n"
    (folder / "modeling_evil.py").write_text(evil)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {"AutoConfig": "modeling_evil.C", "AutoTokenizer": ["modeling_evil.T", None]}
        (folder / name).write_text(json.dumps(content))
    assert load(str(folder)).kind == "text"
    assert "<mark>" in show(["text"], str(folder), 0.0, "a good film")[0].replace("&lt;", "<").replace("&gt;", ">")
    assert not list(tmp_path.rglob("ran"))


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "series", "series")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no weights \(model.safetensors\). To train such a model: hf-skiprnn"):
        load(str(folder))


def test_checkpoints_that_the_app_cannot_show_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = small_checkpoint(tmp_path / "frames", "frames")
    with pytest.raises(ValueError, match=r"not a Skip RNN for sequence classification.*SkipRNNForFrameClassification"):
        load(str(frames))
    with pytest.raises(ValueError, match="There is no folder 'no/such', and the Hub gave no such checkpoint"):
        load("no/such")
    with pytest.raises(ValueError, match="Type a folder or a Hub id"):
        load(" ")
    huge = tmp_path / "huge"
    SkipRNNConfig(hidden_size=60_000, architectures=["SkipRNNForSequenceClassification"]).save_pretrained(huge)
    with pytest.raises(ValueError, match=f"the app loads up to {LARGEST:,}"):
        load(str(huge))
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "config.json").write_text(json.dumps({"model_type": "skip_rnn", "hidden_size": -1}))
    with pytest.raises(ValueError, match="wrong does not load"):
        load(str(wrong))
    truncated = small_checkpoint(tmp_path / "truncated")
    content = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated does not load"):
        load(str(truncated))
    monkeypatch.setenv("SPACE_ID", "you/see-it-read")
    with pytest.raises(ValueError, match="but no other folders"):
        load(str(tmp_path / "frames"))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # httpx2's new name, see test_hub.py
def test_a_checkpoint_of_the_hub_opens_without_its_code(hub: HubClient, tmp_path: Path) -> None:
    publish(small_checkpoint(tmp_path / "series", "series"), "alice/for-the-app")
    before = len(hub.requests())
    text, kind = describe("alice/for-the-app")
    assert kind == "series"
    assert "a series of numbers, 1 at each step" in text
    asked = [path for _, _, path, _ in hub.requests()[before:] if "alice/for-the-app/resolve" in path]
    assert any(path.endswith("model.safetensors") for path in asked)
    assert not [path for path in asked if path.endswith(".py")]


def test_a_drawing_becomes_an_image_like_those_of_training() -> None:
    strokes = np.zeros((SIDE, SIDE), np.float32)
    strokes[20:180, 200:240] = 1  # a one, in the upper right
    small = drawn(strokes, (16, 16))
    rows, columns = np.nonzero(small)
    assert np.ptp(rows) + 1 == 8  # as high as the digits of the task
    assert (rows.mean(), columns.mean()) == pytest.approx((4.5, 10.5), abs=1)
    rows, columns = np.nonzero(drawn(strokes, (28, 28)))
    assert np.ptp(rows) + 1 == 20
    assert (rows.mean(), columns.mean()) == pytest.approx((13.5, 13.5), abs=1)  # centred
    assert drawn(strokes, (32, 32)).sum() == pytest.approx(strokes.mean() * 32**2, rel=0.02)  # other sizes: only scaled
    with pytest.raises(ValueError, match="Draw something first"):
        drawn(np.zeros_like(strokes), (16, 16))


def test_the_value_of_a_pad_is_checked() -> None:
    drawing = (np.arange(16 * 16).reshape(16, 16) % 2).astype(np.float32)
    seen = ink(value_of(drawing))
    assert seen is not None
    np.testing.assert_array_equal(seen[10::20, 10::20], drawing)
    assert ink("") is None
    assert ink(None) is None
    content = io.BytesIO()
    Image.new("RGBA", (9, 9)).save(content, "PNG")
    start = "data:image/png;base64,"
    for value in ("file:///etc/passwd", f"{start}#", f"{start}AAAA", start + "A" * LONGEST):
        with pytest.raises(ValueError, match=r"could not be read|sends a PNG"):
            ink(value)
    with pytest.raises(ValueError, match="its size is"):
        ink(start + base64.b64encode(content.getvalue()).decode())


def test_the_slider_starts_where_the_checkpoint_was_trained_to_read() -> None:
    config = load(FIND_DIGIT).config
    knob = dial(config)
    assert knob.argument == "update_rate"
    assert (knob.low, knob.high) == pytest.approx((0.4, 68.9))
    at = knob.arguments([knob.start])["update_rate"]
    pixels = torch.from_numpy(np.stack(canvases()[:50]))[:, None]
    model = load(FIND_DIGIT).model
    with torch.no_grad():
        asked, trained = model(pixel_values=pixels, update_rate=at[0]), model(pixel_values=pixels)
    assert asked.num_updates.mean() == pytest.approx(trained.num_updates.mean().item(), rel=0.02)
    assert dial(load(str(CARDS / "skip-lstm-digits")).config).argument == "gate_shift"
    assert dial(SkipRNNConfig(gate="strided")).label == "No dial: the gate is 'strided', not learned"


def test_a_reading_is_what_the_model_reads() -> None:
    checkpoint = load(FIND_DIGIT)
    inputs = model_inputs(checkpoint, value_of(canvases()[0]))
    with torch.no_grad():
        out = checkpoint.model(**inputs, update_rate=0.2, output_update_gates=True)
    reading = read(checkpoint, inputs, 20.0)
    np.testing.assert_array_equal(reading.gates, out.update_gates[0].numpy() > 0)
    assert reading.chosen.updates == out.num_updates.item()
    assert reading.chosen.answer == checkpoint.config.id2label[int(out.logits.argmax())]
    assert reading.chosen.score == pytest.approx(out.logits.softmax(-1).max().item())
    counts = [point.updates for point in reading.others]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    assert table(dial(checkpoint.config), reading).count("\n| ") == len(counts) + 1


def test_most_test_canvases_are_read_rightly_through_the_pad() -> None:
    """The way through the pad does not change the canvases: about as many answers are right as in the card."""
    from hf_skiprnn.tasks import TASKS

    checkpoint, labels = load(FIND_DIGIT), TASKS["find_digit"](places=1).load(seed=0).test["label"][:]
    inputs = [model_inputs(checkpoint, value_of(image))["pixel_values"] for image in canvases()[::20]]
    with torch.no_grad():
        answers = checkpoint.model(pixel_values=torch.cat(inputs)).logits.argmax(dim=1).tolist()
    assert np.mean(np.equal(answers, labels[::20])) > 0.85


def test_a_digit_is_shown_as_an_animation_and_fewer_steps_are_read_at_a_lower_budget() -> None:
    value = value_of(canvases()[0])
    html, other = show(["image"], FIND_DIGIT, 50.0, value)
    shown = re.search(r'src="data:image/gif;base64,([^"]+)"', html)
    assert shown
    with Image.open(io.BytesIO(base64.b64decode(shown[1]))) as animation:
        assert animation.n_frames > 10  # steps after which the picture changed
    assert "| share asked for | steps read |" in other
    assert updates_in(show(["image"], FIND_DIGIT, 5.0, value)[0]) < updates_in(html)
    assert updates_in(show(["image"], FIND_DIGIT, 99.0, value)[0]) >= updates_in(html)  # the nearest that was measured


def test_words_are_marked_and_the_text_cannot_inject_markup(tmp_path: Path) -> None:
    folder = str(small_checkpoint(tmp_path / "text", "text"))
    html, _ = show(["text"], folder, 0.0, 'a good film <script>alert("x")</script>')
    assert "&lt;mark&gt;a&lt;/mark&gt;" in html  # inside srcdoc; the first word is always read
    assert 'sandbox=""' in html
    assert "<script" not in html
    assert show(["text"], folder, 0.0, "  ")[0] == '<p class="problem">Type or paste a text first.</p>'


def test_frames_of_a_sound_and_steps_of_a_series_are_shown(sound: str) -> None:
    series = str(CARDS / "skip-lstm-frequency")
    shown: tuple[tuple[Kind, str, Any, str, float, float], ...] = (
        ("sound", FSDD, sound, "share asked for", 50.0, 5.0),
        ("series", series, SERIES, "gate shift", 0.0, -3.0),
    )
    for kind, name, raw, column, at, lower in shown:
        html, other = show([kind], name, at, raw)
        assert "data:image/png;base64," in html
        assert f"| {column} | steps read |" in other
        assert updates_in(show([kind], name, lower, raw)[0]) < updates_in(html)


@pytest.mark.parametrize(
    ("name", "raw", "reason"),
    [
        (FIND_DIGIT, None, "Draw something first"),
        (FSDD, None, "Record, upload or choose a sound first"),
        (FSDD, __file__, "no sound file that soundfile can read"),
        (str(CARDS / "skip-lstm-adding"), "", "Paste numbers first, 2 for each step"),
        (str(CARDS / "skip-lstm-adding"), "1 2 3", "reads 2 numbers at each step; got 3"),
        (str(CARDS / "skip-lstm-frequency"), "1, two", "Paste numbers only"),
        (str(CARDS / "skip-lstm-frequency"), "1 nan", "holds nan at step 1"),
    ],
)
def test_wrong_inputs_are_explained(name: str, raw: str | None, reason: str) -> None:
    kind = load(name).kind
    html, other = show([kind], name, 0.0, raw)
    assert reason in html
    assert 'class="problem"' in html
    assert other == ""
    other_kind: Kind = "text"
    assert "open it in the last tab" in show([other_kind], name, 0.0, raw)[0]


def test_a_checkpoint_says_what_it_needs(tmp_path: Path) -> None:
    expected = {
        FIND_DIGIT: "a picture of 16 x 16 pixels",
        FSDD: "a sound; it is read at 8,000 samples per second",
        str(CARDS / "skip-lstm-adding"): "a series of numbers, 2 at each step",
        str(small_checkpoint(tmp_path / "text", "text")): "a text; it knows 7 words",
    }
    for name, text in expected.items():
        assert text in describe(name)[0]
    assert "any share from 0.4 to 68.9 %" in needs(load(FIND_DIGIT))
    assert describe(str(tmp_path))[1] is None


def test_regressions_and_several_labels_have_answers(tmp_path: Path) -> None:
    regression = load(str(small_checkpoint(tmp_path / "regression", "regression")))
    assert re.fullmatch(r"[+-]\d+\.\d{3}", answer_of(regression, "1 0 2 1"))
    several = small_checkpoint(tmp_path / "several", "series", problem_type="multi_label_classification")
    assert answer_of(load(str(several)), "1 2 3")


def answer_of(checkpoint: Checkpoint, raw: str) -> str:
    return read(checkpoint, model_inputs(checkpoint, raw), 0.0).chosen.answer


def test_the_example_review_is_english_prose() -> None:
    assert 50 < len(REVIEW.split()) < 200


def test_the_space_asks_for_the_versions_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)}
    lines = (ROOT / "scripts/space/requirements.txt").read_text().splitlines()
    asked = {line for line in lines if not line.startswith("#")}
    assert set(project["dependencies"]) < asked
    assert not asked - known
    (version,) = re.findall(r"^sdk_version: (\S+)", (ROOT / "scripts/space/README.md").read_text(), re.MULTILINE)
    assert f"gradio=={version}" in (ROOT / "constraints.txt").read_text().splitlines()
