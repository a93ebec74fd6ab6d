"""Draw which steps a model read, and metrics against the number of steps read.

The figures use Matplotlib's objects, not pyplot, so they need no display and change no global state. The functions that
draw steps read take `predicted` and `labels`: the names of the predicted and the true class of each row.
"""

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

READ = "#d62728"  # a step that was read
UNREAD = "#b0b7bf"  # a step that was skipped
UNREAD_WORD = "#7d868f"  # darker: thin letters must be legible
INK = "#30363d"  # text and axes
# Each kind of model has the same colour in all figures. Its second curve in one figure has another marker.
COLOURS = {"learned": READ, "plain": INK, "strided": "#1f77b4", "random": "#e69f00"}
MARKERS = "osD^v"


def kind_of(name: str) -> str:
    """Return the kind of a model, a key of COLOURS, from its name: "Skip LSTM", "LSTM", "LSTM, strided"..."""
    lower = name.lower()
    if "random" in lower or "p_skip" in lower:
        return "random"
    if "stride" in lower or "one step in" in lower:
        return "strided"
    return "learned" if lower.startswith("skip") or "gate" in lower else "plain"


def pixels_read(images: np.ndarray, gates: np.ndarray, predicted: Sequence[str], labels: Sequence[str]) -> Figure:
    """Draw every image in gray and the pixels that were read in red.

    images: [N, H, W] in [0, 1]; gates: [N, H*W] bool, in row order.
    """
    _check("pixels_read", gates, (len(images), images.shape[1] * images.shape[2]))
    columns = min(len(images), 6)
    rows = -(-len(images) // columns)
    figure = _figure(1.75 * columns, 2.2 * rows + 0.35)
    for index, (image, read) in enumerate(zip(images, gates.reshape(images.shape), strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(_tinted(image, read), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(_verdict(predicted[index], labels[index]), fontsize=9, color=INK, pad=3, parse_math=False)
        axes.text(0.5, -0.03, _count(read), transform=axes.transAxes, ha="center", va="top", fontsize=8, color=INK)
    figure.suptitle("Pixels read in red, skipped pixels in gray", fontsize=10, color=INK)
    return figure


def waves_read(
    waves: np.ndarray, gates: np.ndarray, sampling_period: float, predicted: Sequence[str], labels: Sequence[str]
) -> Figure:
    """Draw every wave as a line and the samples that were read as red points.

    waves: [N, T]; gates: [N, T] bool; sampling_period: in ms.
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
    """Draw every sequence of the adding task as stems: steps read in red, the two marked values ringed.

    inputs: [N, T, 2], value and marker; gates: [N, T] bool; predicted and targets: [N].
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


def channels_read(
    sequences: Sequence[np.ndarray], gates: Sequence[np.ndarray], predicted: Sequence[str], labels: Sequence[str]
) -> Figure:
    """Draw every series as lines, one above the other, with the steps that were read in red.

    More than FEW_CHANNELS channels, such as the bands of a spectrum, are drawn as one line: their mean.

    sequences: [T, I] each, of any lengths; gates: [T] bool each.
    """
    few = [steps if steps.shape[1] <= FEW_CHANNELS else steps.mean(1, keepdims=True) for steps in sequences]
    heights = [max(1.35, 0.3 + 0.45 * lines.shape[1]) for lines in few]
    figure = _figure(8.0, sum(heights) + 0.7)
    grid = figure.add_gridspec(len(few), 1, height_ratios=heights)
    for index, (lines, read) in enumerate(zip(few, gates, strict=True)):
        _check("channels_read", read, lines.shape[:1])
        verdict = f"{_verdict(predicted[index], labels[index])}; {_count(read)}"
        axes = _style_strip(figure.add_subplot(grid[index]), verdict)
        for place, channel in enumerate(lines.T):
            values = channel if lines.shape[1] == 1 else _lane(channel, lines.shape[1] - 1 - place)
            axes.plot(values, color=UNREAD, linewidth=0.9)
            axes.plot(np.flatnonzero(read), values[read], "o", color=READ, markersize=2.8)
        if lines.shape[1] > 1:
            axes.set_yticks(np.arange(lines.shape[1])[::-1] + 0.4, [str(place) for place in range(lines.shape[1])])
        axes.set_ylabel(_what_is_drawn(sequences[index].shape[1]), fontsize=7, color=INK)
    figure.axes[-1].set_xlabel("step", fontsize=9, color=INK)
    figure.suptitle("Steps read in red, skipped steps in gray", fontsize=10, color=INK)
    return figure


FEW_CHANNELS = 8  # at most so many lines in one plot


def _lane(channel: np.ndarray, lane: int) -> np.ndarray:
    """Return a channel scaled to the height of a lane; a constant one stands in its middle."""
    low, high = channel.min(), channel.max()
    return lane + (0.8 * (channel - low) / (high - low) if high > low else np.full(len(channel), 0.4))


def _what_is_drawn(channels: int) -> str:
    return "value" if channels == 1 else "channel" if channels <= FEW_CHANNELS else f"mean of\n{channels} channels"


LINE = 110  # characters in a line of text; they fill the width of the figure


def words_read(
    texts: Sequence[Sequence[str]], gates: Sequence[np.ndarray], predicted: Sequence[str], labels: Sequence[str]
) -> Figure:
    """Draw every text, words that were read in red and the others in light gray.

    texts: the words of each text; gates: [words] bool each.
    """
    pages = [_lines(words) for words in texts]
    height = sum(len(lines) + 2 for lines in pages)
    figure = _figure(7.6, 0.17 * height + 0.6)
    axes = figure.add_subplot()
    axes.set(xlim=(0, LINE), ylim=(height, 0))
    axes.set_axis_off()
    row = 0
    for index, (lines, read) in enumerate(zip(pages, gates, strict=True)):
        _check("words_read", read, (len(texts[index]),))
        axes.text(
            0,
            row,
            f"{_verdict(predicted[index], labels[index])}; {_count(read)}",
            fontsize=8,
            color=INK,
            va="top",
            parse_math=False,
        )
        for line in lines:
            row += 1
            for place, column in line:
                color = READ if read[place] else UNREAD_WORD
                _word(axes, column, row, texts[index][place], color)
        row += 2
    figure.suptitle("Words read in red, skipped words in gray", fontsize=10, color=INK)
    return figure


def words_read_page(
    texts: Sequence[Sequence[str]], gates: Sequence[np.ndarray], predicted: Sequence[str], labels: Sequence[str]
) -> str:
    """Return what words_read draws as an HTML page. Words that were read stand in <mark>."""
    parts = []
    for words, read, guess, label in zip(texts, gates, predicted, labels, strict=True):
        _check("words_read_page", read, (len(words),))
        marked = [f"<mark>{escape(w)}</mark>" if r else escape(w) for w, r in zip(words, read, strict=True)]
        parts.append(f"<h2>{escape(_verdict(guess, label))}; {_count(read)}</h2>\n<p>{' '.join(marked)}</p>")
    style = (
        "body{max-width:48rem;margin:2rem auto;font:1rem/1.6 sans-serif;color:#b0b7bf}"
        "h1,h2{font-size:1rem;color:#30363d}mark{background:none;color:#d62728;font-weight:600}"
    )
    title = "Words read, marked; the others were skipped"
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{style}</style>\n'
        f"<h1>{title}</h1>\n" + "\n".join(parts) + "\n</html>\n"
    )


NAME_WIDTH = 34  # characters; longer names are wrapped


class Comparison(NamedTuple):
    """A row of a table: our values, one for each seed, and the paper's mean and standard deviation, if it has them."""

    name: str
    metric: Sequence[float]
    updates: Sequence[float]
    paper_metric: tuple[float | None, float | None]
    paper_updates: tuple[float | None, float | None]


def ours_beside_the_papers(rows: Sequence[Comparison], metric: str, steps: str) -> Figure:
    """Draw two plots side by side, the metric and the steps read, with means and standard deviations of each row.

    metric and steps: labels of the two axes.
    """
    figure = _figure(9.0, 1.1 + 0.36 * len(rows))
    places = np.arange(len(rows))[::-1]
    names = [row.name for row in rows]
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, label in ((left, metric), (right, steps)):
        axes.set_xlabel(label, fontsize=9, color=INK)
        axes.tick_params(labelsize=8, colors=INK)
        axes.grid(visible=True, axis="x", color=UNREAD, linewidth=0.4, alpha=0.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    if metric == "mse":
        left.set_xscale("log")
        left.xaxis.set_minor_formatter(NullFormatter())
    for row, place in zip(rows, places, strict=True):
        colour = COLOURS[kind_of(row.name)]
        for axes, ours, paper in ((left, row.metric, row.paper_metric), (right, row.updates, row.paper_updates)):
            deviation = np.std(ours, ddof=1) if len(ours) > 1 else None
            axes.scatter(ours, [place] * len(ours), s=8, color=colour, alpha=0.5, linewidths=0)
            axes.errorbar(np.mean(ours), place, xerr=deviation, fmt="o", ms=5, color=colour, capsize=2, label="ours")
            if paper[0] is not None:
                style = {"fmt": "D", "ms": 4, "mfc": "none", "color": INK, "capsize": 2}
                axes.errorbar(paper[0], place - 0.25, xerr=paper[1], label="paper", **style)
    left.set_yticks(places, [textwrap.fill(name, NAME_WIDTH) for name in names], fontsize=8)
    handles, labels = right.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    return figure


Runs = Sequence[tuple[float, float]]  # (updates, metric) of runs that differ only in their seed


def accuracy_against_updates(
    points: Mapping[str, Sequence[Runs]], metric: str, steps: str, lower_is_better: bool = False
) -> Figure:
    """Draw the metric against updates, one curve for each model; a line joins the points on the Pareto front.

    A point is a mean over seeds; bars show the standard deviations, and small dots the runs.

    points: model name -> its points, each with one or several runs. The name decides the colour.
    metric and steps: labels of the axes. lower_is_better: the metric is an error; its axis is logarithmic.
    """
    figure = _figure(6.0, 4.2)
    axes = figure.add_subplot()
    if lower_is_better:
        axes.set_yscale("log")
    kinds: list[str] = []
    for name, curve in points.items():
        kind = kind_of(name)
        style: dict[str, Any] = {"color": COLOURS[kind], "marker": MARKERS[kinds.count(kind) % len(MARKERS)]}
        kinds.append(kind)
        means = [mean_of(runs) for runs in curve]
        front = pareto_front(means, lower_is_better)
        axes.step(*zip(*front, strict=True), where="post", linewidth=1.2, alpha=0.6, color=style["color"])
        for place, ((x, y), runs) in enumerate(zip(means, curve, strict=True)):
            label = name if place == 0 else None
            spread = np.std(runs, axis=0, ddof=1) if len(runs) > 1 else (None, None)
            bars: dict[str, Any] = {"elinewidth": 0.9, "capsize": 2, "linestyle": "none", "ms": 5, "zorder": 3}
            axes.errorbar(x, y, xerr=spread[0], yerr=spread[1], label=label, **bars, **style)
            if len(runs) > 1:
                each = np.asarray(runs)
                axes.scatter(each[:, 0], each[:, 1], s=7, alpha=0.4, linewidths=0, **style)
    axes.set_xlabel(steps, fontsize=9, color=INK)
    axes.set_ylabel(metric, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(visible=True, color=UNREAD, linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2 if len(points) == 4 else 3, fontsize=8, frameon=False)
    return figure


def draw_operating_points(points: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the accuracy of one model against its updates, at several shifts of its gate, to a file.

    Nothing is drawn where the metrics hold no accuracy.
    """
    metric = "accuracy"
    if metric in points[0]:
        curve = [[(point["updates"], point[metric])] for point in points]
        accuracy_against_updates({"one checkpoint, shifted gate": curve}, metric, "updates per row").savefig(path)


def mean_of(runs: Runs) -> tuple[float, float]:
    """Return the mean updates and the mean metric of runs."""
    updates, metrics = zip(*runs, strict=True)
    return fmean(updates), fmean(metrics)


def pareto_front(runs: Runs, lower_is_better: bool = False) -> list[tuple[float, float]]:
    """Return the Pareto front of (updates, metric), sorted by updates: nothing with fewer updates is as good."""
    front: list[tuple[float, float]] = []
    sign = -1 if lower_is_better else 1
    for updates, metric in sorted(runs, key=lambda run: (run[0], -sign * run[1])):
        if not front or sign * metric > sign * front[-1][1]:
            front.append((updates, metric))
    return front


def _lines(words: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Break words into lines; a line is a list of (index of the word, column where it starts)."""
    lines: list[list[tuple[int, int]]] = [[]]
    column = 0
    for place, word in enumerate(words):
        if column and column + len(word) > LINE:
            lines.append([])
            column = 0
        lines[-1].append((place, column))
        column += len(word) + 1
    return lines


def _word(axes: Axes, column: int, row: int, word: str, color: str) -> None:
    """Write a word at a column and row of characters; escape the dollar sign, which starts a formula in Matplotlib."""
    weight = "bold" if color == READ else "normal"
    shown = "".join(letter if letter.isprintable() else " " for letter in word)
    text = axes.text(column, row, shown, fontsize=7.8, color=color, weight=weight, family="monospace", va="top")
    text.set_parse_math(False)


def _check(name: str, gates: np.ndarray, shape: tuple[int, ...]) -> None:
    if gates.shape != shape:
        raise ValueError(f"{name} needs one gate per step, {shape}; got {gates.shape}.")


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches; it can be saved without a display."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _strip(figure: Figure, count: int, index: int, title: str) -> Axes:
    """Add one of `count` plots that stand below each other and share the time axis."""
    axes = _style_strip(figure.add_subplot(count, 1, index + 1), title)
    axes.tick_params(labelbottom=index == count - 1)
    return axes


def _style_strip(axes: Axes, title: str) -> Axes:
    """Give a wide, low plot its title and thin axes."""
    axes.set_title(title, fontsize=9, color=INK, loc="left", pad=3, parse_math=False)
    axes.tick_params(labelsize=7, colors=INK)
    axes.margins(x=0.01)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def _tinted(image: np.ndarray, read: np.ndarray) -> np.ndarray:
    """Return the image [H, W] as RGB [H, W, 3] in [0, 1]: dark on light, with the pixels that were read tinted red."""
    gray = np.repeat((0.97 - 0.85 * image)[..., None], 3, axis=2)
    red = np.array([0.84, 0.15, 0.16])
    return np.where(read[..., None], 0.45 * gray + 0.55 * red, gray)


def _verdict(predicted: str, label: str) -> str:
    return f"{label}: right" if predicted == label else f"{label}: read as {predicted}"


def _count(read: np.ndarray) -> str:
    return f"{int(read.sum())} of {read.size} read"
