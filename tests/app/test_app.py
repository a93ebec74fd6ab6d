"""Check the app without a browser: its tabs, what they say without a checkpoint, and its answers over HTTP."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import missing
from drawings import value_of
from examples import canvases
from paths import CARDS

pytest.importorskip("gradio", reason="gradio is not installed: make app")
import app


@pytest.fixture(autouse=True)
def event_loops_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the event loops that gradio makes for every app and forgets; else Python warns when it deletes them."""
    made: list[asyncio.AbstractEventLoop] = []
    new = asyncio.new_event_loop
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: made.append(new()) or made[-1])
    yield
    for loop in made:
        loop.close()
    asyncio.set_event_loop(None)


def components(built: Any, kind: str) -> list[dict[str, Any]]:
    return [component["props"] for component in built.get_config_file()["components"] if component["type"] == kind]


def test_there_is_a_tab_for_each_kind_of_input() -> None:
    built = app.build(sounds="")
    labels = [props["label"] for props in components(built, "tabitem")]
    assert labels == ["Draw a digit", "Write a review", "Say a digit", "Any checkpoint"]
    told = " ".join(str(props.get("value")) for props in components(built, "markdown"))
    assert "--sounds mteb/free-spoken-digit-dataset" in told


def test_a_tab_without_a_checkpoint_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "found", lambda kind: [])
    told = [props.get("value") for props in components(app.build(sounds=""), "markdown")]
    assert {missing(kind) for kind in app.TITLES} <= set(told)


def test_the_slider_follows_the_checkpoint(tmp_path: Path) -> None:
    calibrated, shifted = (app.slider_for(str(CARDS / f"skip-lstm-{name}")) for name in ("find-digit", "digits"))
    assert (calibrated.minimum, calibrated.maximum, calibrated.interactive) == (0.4, 68.9, True)
    assert (shifted.minimum, shifted.maximum, shifted.value) == (-3, 3, 0)
    assert not app.slider_for(str(tmp_path)).interactive


def test_the_pad_is_filled_with_another_canvas_each_time() -> None:
    value, number = app.another_canvas(0)
    assert value == value_of(canvases()[0])
    assert app.another_canvas(number)[0] != value


def test_wrong_recordings_are_refused_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main([f"--sounds={tmp_path}"])
    assert "holds no recordings as the task fsdd reads them" in capsys.readouterr().err
