"""See it read: draw, type, record or paste something, and watch which steps a Skip RNN reads.

    make app                             # in a clone; or: pip install ".[train,figures,audio,app]", then
    python scripts/space/app.py

The folder is laid out as a Hugging Face Space; its README.md says how to publish it.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import examples
import gradio as gr
from checkpoints import CLONE, PLURALS, Dial, Kind, dial, found, load, missing
from drawings import value_of
from pad import pad
from reading import LONGEST_TEXT, describe, show

CSS = """
.reading {width: 23rem; max-width: 100%; image-rendering: pixelated}
.sound .reading, .series .reading {width: 100%; image-rendering: auto}
.words {width: 100%; height: 22rem; border: 1px solid #b0b7bf; background: #fff}
.verdict {font-size: 1.1rem}
.problem {color: #b3261e}
"""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none is fetched
TITLES: dict[Kind, str] = {"image": "Draw a digit", "text": "Write a review", "sound": "Say a digit"}
HINTS: dict[Kind, str] = {
    "image": "Draw a digit. Pixels turn red in the order in which they are read, row by row; the rest is skipped.",
    "text": "Type or paste a film review. The words that are read turn red.",
    "sound": "Record, upload or choose a spoken digit. The frames that are read are marked in red.",
}
INTRODUCTION = """# See it read
A Skip RNN decides after each step that it reads how many steps to skip. A skipped step costs nothing. The slider sets
the budget: move it, and see what fewer steps do to the answer."""


def slider_of(knob: Dial) -> Any:
    """Return the slider of a dial."""
    step = 0.1 if knob.argument == "update_rate" else 0.05
    return gr.Slider(
        knob.low, knob.high, value=knob.start, step=step, label=knob.label, interactive=knob.argument is not None
    )


def slider_for(name: str | None) -> Any:
    """Return the slider of a checkpoint; one that cannot be moved if it does not load."""
    try:
        return slider_of(dial(load(name or "").config))
    except ValueError:
        return slider_of(Dial(None, 0, 1, 0, "Budget"))


def input_of(kind: Kind) -> Any:
    """Return the component that takes inputs of a kind."""
    if kind == "image":
        return pad()
    if kind == "text":
        return gr.Textbox(label="Your text", lines=8, max_length=LONGEST_TEXT)
    if kind == "sound":
        return gr.Audio(label="Your sound", sources=["microphone", "upload"], type="filepath", format="wav")
    return gr.Textbox(label="Your numbers, one step after the other", lines=8)


def example_of(kind: Kind, component: Any, sounds: str) -> None:
    """Add a button, or a list of recordings, that fills the component."""
    if kind == "image":
        number = gr.State(0)
        button = gr.Button("Draw one for me")
        button.click(another_canvas, number, [component, number], show_progress="hidden", queue=False)
    elif kind == "sound":
        names = list(examples.recordings(sounds))
        if names:
            chosen = gr.Dropdown(names, value=None, label="Or choose a recording of the test split")
            chosen.input(lambda name: examples.recording(sounds, name), chosen, component)
        else:
            gr.Markdown("Recordings to choose from: start the app with `--sounds mteb/free-spoken-digit-dataset`.")
    else:
        text = examples.REVIEW if kind == "text" else examples.SERIES
        gr.Button("Write one for me").click(lambda: text, None, component)


def another_canvas(number: int) -> tuple[str, int]:
    """Return the value of a pad with the next of some test canvases, and the number after it."""
    canvases = examples.canvases()
    return value_of(canvases[97 * number % len(canvases)]), number + 1


def react(
    kinds: Sequence[Kind], name: Any, slider: Any, components: Sequence[Any], outputs: Sequence[Any], *more: Any
) -> None:
    """Read again whenever an input or the slider changes, or one of the events `more` happens."""
    events = [slider.change, *(component.change for component in components), *more]
    gr.on(
        events,
        lambda name, value, *raws: show(kinds, name, value, *raws),
        [name, slider, *components],
        list(outputs),
        show_progress="hidden",
        trigger_mode="always_last",
        queue=False,
    )


def outputs_of() -> tuple[gr.HTML, gr.Markdown]:
    """Return where a reading is shown: the answer with the picture, and the table of other budgets."""
    return gr.HTML(), gr.Markdown()


def tab_of(kind: Kind, sounds: str) -> None:
    """Fill the tab of one kind of input; without a checkpoint it says what to run."""
    gr.Markdown(HINTS[kind])
    names = found(kind)
    if not names:
        gr.Markdown(missing(kind))
        return
    with gr.Row():
        with gr.Column(scale=2):
            component = input_of(kind)
            example_of(kind, component, sounds)
        with gr.Column(scale=3):
            name = gr.Dropdown(names, value=names[0], label="Checkpoint")
            slider = slider_for(names[0])
            outputs = outputs_of()
    name.change(slider_for, name, slider, queue=False)
    react([kind], name, slider, [component], outputs, name.change)


def any_tab(sounds: str) -> None:
    """Fill the tab that opens any checkpoint, shows what it needs, and then takes such an input."""
    gr.Markdown("Open a folder, or a checkpoint of the Hub. It is read as data: no code that came with it is run.")
    kinds: list[Kind] = list(PLURALS)
    with gr.Row():
        name = gr.Textbox(label="Folder or Hub id", placeholder="you/my-skip-lstm", scale=4)
        button = gr.Button("Open", scale=1)
    told = gr.Markdown()
    columns, components = [], []
    with gr.Row(visible=False) as body:
        with gr.Column(scale=2):
            for kind in kinds:
                with gr.Column(visible=False) as column:
                    components.append(input_of(kind))
                    example_of(kind, components[-1], sounds)
                columns.append(column)
        with gr.Column(scale=3):
            slider = slider_for(None)
            outputs = outputs_of()
    opened = gr.State("")

    def opening(name: str) -> list[Any]:
        text, kind = describe(name)
        visible = [gr.update(visible=each == kind) for each in kinds]
        return [name, text, gr.update(visible=kind is not None), slider_for(name), "", "", *visible]

    shown = [opened, told, body, slider, *outputs, *columns]
    gr.on([button.click, name.submit], opening, name, shown, show_progress="hidden")
    react(kinds, opened, slider, components, outputs)


def build(sounds: str) -> gr.Blocks:
    """Return the app. sounds: where recordings come from, see examples.recordings; "" for none."""
    with gr.Blocks(title="See it read", analytics_enabled=False, fill_width=True) as app:
        gr.Markdown(INTRODUCTION)
        for kind, title in TITLES.items():
            with gr.Tab(title):
                tab_of(kind, sounds)
        with gr.Tab("Any checkpoint"):
            any_tab(sounds)
    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the app until it is interrupted."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--sounds",
        default=examples.data_beside(CLONE),
        help="recordings to choose from: a folder or Hub id in the layout of the task fsdd",
    )
    options = parser.parse_args(argv)
    try:
        examples.recordings(options.sounds)
    except (OSError, ValueError) as error:
        parser.error(f"--sounds {options.sounds} holds no recordings as the task fsdd reads them: {error}")
    examples.canvases()  # so that the first click on the button need not wait for them
    build(options.sounds).launch(server_port=options.port, theme=THEME, css=CSS, footer_links=[], ssr_mode=False)


if __name__ == "__main__":
    main()
