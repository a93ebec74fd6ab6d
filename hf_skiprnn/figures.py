"""Pictures of which steps were read. Drawn through Matplotlib's objects: no display, no global state."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

READ = "#d62728"  # a step that was read
UNREAD = "#b0b7bf"  # a step that was skipped
INK = "#30363d"


def pixels_read(images: np.ndarray, gates: np.ndarray, predicted: Sequence[str], labels: Sequence[str]) -> Figure:
    """Every image in gray with its read pixels in red.

    images [N, H, W] in [0, 1]; gates [N, H*W] bool, in row order.
    """
    _check("pixels_read", gates, (len(images), images.shape[1] * images.shape[2]))
    columns = min(len(images), 6)
    rows = -(-len(images) // columns)
    figure = _figure(1.75 * columns, 2.2 * rows + 0.35)
    for index, (image, read) in enumerate(zip(images, gates.reshape(images.shape), strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(_tinted(image, read), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(_verdict(predicted[index], labels[index]), fontsize=9, color=INK, pad=3)
        axes.text(0.5, -0.03, _count(read), transform=axes.transAxes, ha="center", va="top", fontsize=8, color=INK)
    figure.suptitle("Pixels read in red, skipped pixels in gray", fontsize=10, color=INK)
    return figure


def waves_read(
    waves: np.ndarray, gates: np.ndarray, sampling_period: float, predicted: Sequence[str], labels: Sequence[str]
) -> Figure:
    """Every wave as a line with its read samples as red points.

    waves [N, T]; gates [N, T] bool; sampling_period in ms.
    """
    _check("waves_read", gates, waves.shape)
    figure = _figure(8.0, 1.35 * len(waves) + 0.7)
    times = np.arange(waves.shape[1]) * sampling_period
    for index, (wave, read) in enumerate(zip(waves, gates, strict=True)):
        axes = _strip(figure, len(waves), index, f"{_verdict(predicted[index], labels[index])}; {_count(read)}")
        axes.plot(times, wave, color=UNREAD, linewidth=1.0, marker=".", markersize=2.5)
        axes.plot(times[read], wave[read], "o", color=READ, markersize=4.0)
        axes.set(ylim=(-1.25, 1.25), yticks=(-1, 0, 1))
    figure.axes[-1].set_xlabel("time in ms", fontsize=9, color=INK)
    figure.suptitle("Samples read in red, skipped samples in gray", fontsize=10, color=INK)
    return figure


def marked_values_read(inputs: np.ndarray, gates: np.ndarray, predicted: np.ndarray, targets: np.ndarray) -> Figure:
    """Every sequence of the adding task as stems, read steps in red, the two marked values with a ring.

    inputs [N, T, 2]: value and marker; gates [N, T] bool; predicted and targets [N].
    """
    _check("marked_values_read", gates, inputs.shape[:2])
    figure = _figure(8.0, 1.35 * len(inputs) + 0.7)
    steps = np.arange(inputs.shape[1])
    for index, (row, read) in enumerate(zip(inputs, gates, strict=True)):
        values, marked = row[:, 0], row[:, 1] > 0
        title = f"predicted {predicted[index]:+.3f}, sum {targets[index]:+.3f}; {_count(read)}"
        axes = _strip(figure, len(inputs), index, title)
        colors = np.where(read, READ, UNREAD)
        axes.vlines(steps, 0, values, colors=colors.tolist(), linewidths=1.2)
        axes.scatter(steps, values, c=colors, s=14, zorder=3)
        axes.scatter(steps[marked], values[marked], s=90, facecolors="none", edgecolors=INK, linewidths=1.2, zorder=4)
        axes.axhline(0, color=UNREAD, linewidth=0.6)
        axes.set(ylim=(-0.68, 0.68), yticks=(-0.5, 0, 0.5))
    figure.axes[-1].set_xlabel("step", fontsize=9, color=INK)
    figure.suptitle("Steps read in red, skipped steps in gray, marked values ringed", fontsize=10, color=INK)
    return figure


def _check(name: str, gates: np.ndarray, shape: tuple[int, ...]) -> None:
    if gates.shape != shape:
        raise ValueError(f"{name} needs one gate per step, {shape}; got {gates.shape}.")


def _figure(width: float, height: float) -> Figure:
    """An empty figure, inches, that can be saved without a display."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _strip(figure: Figure, count: int, index: int, title: str) -> Axes:
    """One of `count` plots under each other that share the time axis."""
    axes = figure.add_subplot(count, 1, index + 1)
    axes.set_title(title, fontsize=9, color=INK, loc="left", pad=3)
    axes.tick_params(labelsize=7, colors=INK, labelbottom=index == count - 1)
    axes.margins(x=0.01)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def _tinted(image: np.ndarray, read: np.ndarray) -> np.ndarray:
    """Gray image on a light ground -> RGB, with the read pixels mixed into red: [H, W, 3] in [0, 1]."""
    gray = np.repeat((0.97 - 0.85 * image)[..., None], 3, axis=2)
    red = np.array([0.84, 0.15, 0.16])
    return np.where(read[..., None], 0.45 * gray + 0.55 * red, gray)


def _verdict(predicted: str, label: str) -> str:
    return f"{label}: right" if predicted == label else f"{label}: read as {predicted}"


def _count(read: np.ndarray) -> str:
    return f"{int(read.sum())} of {read.size} read"
