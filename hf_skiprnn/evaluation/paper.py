"""The results in the tables of the paper (Campos et al., ICLR 2018), to compare ours with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PublishedRow:
    """A row of one of the paper's tables: means of four runs, and their standard deviation where the paper gives it.

    Attributes:
        metric: the task's name of the metric.
        value: value of the metric; None if the paper says only whether the task was solved.
        updates: steps read per sequence; for random skips, the expected number.
        options: the task options with which the row was measured.
    """

    table: int
    task: str
    cell_type: str
    gate: str
    updates: float
    metric: str = "accuracy"
    value: float | None = None
    value_std: float | None = None
    updates_std: float | None = None
    budget_weight: float | None = None
    skip_probability: float | None = None
    solved: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The model's name as the paper writes it."""
        cell = self.cell_type.upper()
        if self.gate == "learned":
            return f"Skip {cell}, λ = {self.budget_weight:g}"
        return cell if self.skip_probability is None else f"{cell}, p_skip = {self.skip_probability:g}"

    @property
    def name(self) -> str:
        """The row's name in scripts/paper/paper_rows.yaml, without the prefix of the table."""
        if self.gate == "learned":
            return f"skip-{self.cell_type}-{self.budget_weight:.0e}".replace("e-0", "e-").replace("-0e+00", "-0")
        if self.skip_probability is None:
            return self.cell_type
        return f"{self.cell_type}-random-{self.skip_probability:g}".replace(".", "-")


def published_rows(task: str, cell_type: str, options: Mapping[str, Any]) -> list[PublishedRow]:
    """Return the paper's rows for a task, its options and a cell; an empty list if there are none."""
    return [
        row
        for row in ROWS
        if (row.task, row.cell_type) == (task, cell_type)
        and all(options.get(name) == value for name, value in row.options.items())
    ]


def _adding() -> list[PublishedRow]:
    """Table 1. The paper gives percentages of 50 steps; they are converted to updates here."""
    same: dict[str, Any] = {"table": 1, "task": "adding", "metric": "mse", "options": {"length": 50}}
    learned = (
        ("lstm", 0.0, 81.1, 3.6),
        ("lstm", 1e-5, 53.9, 2.1),
        ("gru", 0.0, 97.9, 3.2),
        ("gru", 1e-5, 50.7, 2.6),
    )
    rows = [PublishedRow(cell_type=cell, gate="always", updates=50.0, solved=True, **same) for cell in ("lstm", "gru")]
    rows += [
        PublishedRow(
            cell_type=cell, gate="random", skip_probability=skipped, updates=50 * (1 - skipped), solved=False, **same
        )
        for cell, skipped in (("lstm", 0.2), ("lstm", 0.5), ("gru", 0.02), ("gru", 0.5))
    ]
    return rows + [
        PublishedRow(
            cell_type=cell,
            gate="learned",
            budget_weight=weight,
            updates=share / 2,
            updates_std=std / 2,
            solved=True,
            **same,
        )
        for cell, weight, share, std in learned
    ]


def _frequency() -> list[PublishedRow]:
    """Table 4; every model solves the task."""
    rows = []
    for cell, period, steps, learned in (
        ("lstm", 1.0, 100.0, ((0.0, 55.5, 16.9), (1e-5, 47.4, 14.1), (1e-4, 12.7, 0.5))),
        ("lstm", 0.5, 200.0, ((0.0, 147.9, 27.0), (1e-5, 50.7, 16.8), (1e-4, 19.9, 1.5))),
        ("gru", 1.0, 100.0, ((0.0, 73.7, 17.9), (1e-5, 51.9, 10.2), (1e-4, 23.5, 6.2))),
        ("gru", 0.5, 200.0, ((0.0, 167.0, 18.3), (1e-5, 54.2, 4.4), (1e-4, 22.5, 2.1))),
    ):
        same: dict[str, Any] = {"table": 4, "task": "frequency", "cell_type": cell, "solved": True}
        same["options"] = {"sampling_period": period}
        rows.append(PublishedRow(gate="always", updates=steps, **same))
        rows += [
            PublishedRow(gate="learned", budget_weight=weight, updates=mean, updates_std=std, **same)
            for weight, mean, std in learned
        ]
    return rows


def _mnist() -> list[PublishedRow]:
    """Table 2."""
    rows = []
    for cell, plain, random, learned in (
        ("lstm", (0.910, 0.045), (0.893, 0.003), (0.973, 0.002, 379.38, 33.09)),
        ("gru", (0.968, 0.013), (0.912, 0.004), (0.976, 0.003, 392.62, 26.48)),
    ):
        same: dict[str, Any] = {"table": 2, "task": "mnist", "cell_type": cell}
        value, value_std, updates, updates_std = learned
        rows += [
            PublishedRow(gate="always", value=plain[0], value_std=plain[1], updates=784.0, **same),
            PublishedRow(
                gate="random", skip_probability=0.5, value=random[0], value_std=random[1], updates=392.0, **same
            ),
            PublishedRow(
                gate="learned",
                budget_weight=1e-4,
                value=value,
                value_std=value_std,
                updates=updates,
                updates_std=updates_std,
                **same,
            ),
        ]
    return rows


def _imdb() -> list[PublishedRow]:
    """Table 5, in which padding counts as steps."""
    rows = []
    weights = (0.0, 1e-5, 1e-4, 1e-3)
    for cell, length, plain, accuracies, updates in (
        ("lstm", 200, 0.843, (0.844, 0.846, 0.837, 0.811), (196.75, 197.15, 164.65, 73.85)),
        ("lstm", 400, 0.868, (0.866, 0.865, 0.862, 0.836), (369.70, 380.62, 186.30, 84.22)),
        ("gru", 200, 0.845, (0.848, 0.842, 0.834, 0.800), (200.0, 199.25, 180.97, 106.15)),
        ("gru", 400, 0.862, (0.866, 0.862, 0.853, 0.814), (399.02, 398.0, 314.30, 99.12)),
    ):
        same: dict[str, Any] = {"table": 5, "task": "imdb", "cell_type": cell, "options": {"length": length}}
        rows.append(PublishedRow(gate="always", value=plain, updates=float(length), **same))
        rows += [
            PublishedRow(gate="learned", budget_weight=weight, value=value, updates=read, **same)
            for weight, value, read in zip(weights, accuracies, updates, strict=True)
        ]
    return rows


def _videos() -> list[PublishedRow]:
    """Tables 3 (Charades; mean average precision, which the paper gives in percent) and 6 (UCF-101)."""
    rows = []
    for cell, plain, learned in (
        ("lstm", 0.671, ((0.0, 0.749, 138.9), (1e-5, 0.757, 24.2), (1e-4, 0.790, 7.6))),
        ("gru", 0.791, ((0.0, 0.796, 124.2), (1e-5, 0.792, 29.7), (1e-4, 0.793, 23.7))),
    ):
        same: dict[str, Any] = {"table": 6, "task": "ucf101", "cell_type": cell}
        same["options"] = {"list_number": 1, "frames": 250, "frame_rate": 25.0}
        rows.append(PublishedRow(gate="always", value=plain, updates=250.0, **same))
        rows += [PublishedRow(gate="learned", budget_weight=w, value=v, updates=u, **same) for w, v, u in learned]
    for cell, localised in (
        ("lstm", ((0.0, 8.32, 172.9), (1e-4, 8.61, 172.9), (1e-3, 8.32, 41.9), (1e-2, 7.86, 17.4))),
        ("gru", ((0.0, 8.94, 159.9), (1e-4, 8.76, 100.8), (1e-3, 8.68, 54.2), (1e-2, 7.95, 18.4))),
    ):
        same = {"table": 3, "task": "charades", "cell_type": cell, "metric": "map_100"}
        rows += [
            PublishedRow(gate="learned", budget_weight=w, value=v / 100, updates=u, **same) for w, v, u in localised
        ]
    return rows


ROWS = [*_adding(), *_frequency(), *_mnist(), *_imdb(), *_videos()]
