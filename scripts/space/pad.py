"""A drawing pad for Gradio: a plain canvas, whose value is a picture of black ink as a data URL.

gr.Sketchpad draws with WebGL, which takes seconds for a stroke where there is no GPU.
"""

import gradio as gr
from drawings import SIDE

PEN = 24  # width of a stroke

TEMPLATE = f'<canvas width="{SIDE}" height="{SIDE}"></canvas><br><button type="button">Clear</button>'
STYLE = """
canvas {border: 1px solid #b0b7bf; background: #fff; touch-action: none; cursor: crosshair}
button {border: 1px solid #b0b7bf; padding: 0.1rem 0.8rem}
"""
SCRIPT = f"""
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
Object.assign(pen, {{lineWidth: {PEN}, lineCap: "round", lineJoin: "round"}});
let drawing = false, sent = null;
const place = (event) => [event.offsetX, event.offsetY];
const send = (value) => {{ sent = value; props.value = value; }};  // setting it is the event "change"
const clear = () => pen.clearRect(0, 0, canvas.width, canvas.height);
canvas.addEventListener("pointerdown", (event) => {{
    drawing = true;
    canvas.setPointerCapture(event.pointerId);
    pen.beginPath();
    pen.moveTo(...place(event));
    pen.lineTo(...place(event));
    pen.stroke();
}});
canvas.addEventListener("pointermove", (event) => {{
    if (!drawing) return;
    pen.lineTo(...place(event));
    pen.stroke();
}});
canvas.addEventListener("pointerup", () => {{
    drawing = false;
    send(canvas.toDataURL("image/png"));
}});
element.querySelector("button").addEventListener("click", () => {{ clear(); send(""); }});
watch("value", () => {{
    if (!props.value || props.value === sent) return;
    const image = new Image();
    image.onload = () => {{ clear(); pen.drawImage(image, 0, 0, canvas.width, canvas.height); }};
    image.src = props.value;
}});
"""


def pad() -> gr.HTML:
    """Return a pad to draw on; its value is a data URL, or "" for an empty pad."""
    return gr.HTML("", html_template=TEMPLATE, css_template=STYLE, js_on_load=SCRIPT)
