"""The classes of a checkpoint and of data: the same names in another order are mapped, others are not mixed up."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_skiprnn.tasks import Task


def names_of(labels: Mapping[Any, str] | None) -> list[str] | None:
    """Return the names of an id2label in the order of their ids; None where there are only made-up ones (LABEL_0)."""
    if not labels:
        return None
    names = [labels[i] for i in sorted(labels, key=int)]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def order_of(held: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Return the place in `held` of every wanted name; None where the two do not hold the same names."""
    if sorted(held) != sorted(wanted) or len(set(held)) < len(held):
        return list(range(len(held))) if list(held) == list(wanted) else None
    return [held.index(name) for name in wanted]


def reorder_outputs(model: Any, order: Sequence[int], labels: Mapping[int, str]) -> None:
    """Put the classifier's outputs in another order, and name them by `labels` (id -> name)."""
    rows = torch.tensor(order, device=model.classifier.weight.device)
    with torch.no_grad():
        for parameter in (model.classifier.weight, model.classifier.bias):
            parameter.copy_(parameter[rows].clone())
    model.config.id2label = dict(labels)


def match_task(model: Any, task: Task, checkpoint: str) -> None:
    """Give the model's outputs the order of the task's classes, found by name.

    Raises:
        ValueError: the task has other classes, or another number of outputs, than the checkpoint.
    """
    wanted = task.model_defaults()
    labels, number = wanted.get("id2label"), wanted.get("num_labels", model.config.num_labels)
    held, asked = names_of(model.config.id2label), names_of(labels)
    if held is None or asked is None or not labels:
        if number != model.config.num_labels:
            raise ValueError(f"{checkpoint} has {model.config.num_labels} outputs; the data ask for {number}.")
        return
    order = order_of(held, asked)
    if order is None:
        raise ValueError(
            f"{checkpoint} was trained on other classes than the data have: {shown(held)}; the data have "
            f"{shown(asked)}. Evaluate on data with the same names of classes, or rename them."
        )
    if order != list(range(len(order))):
        print(f"The data have the checkpoint's {len(order)} classes in another order; they are matched by name.")
        reorder_outputs(model, order, labels)


def shown(names: Sequence[str]) -> str:
    """Return at most ten names and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more


def start_classifier(model: Any, checkpoint: str, held: Any) -> None:
    """Fit the classifier of a fine-tuned model to its new config: keep, reorder or draw anew, and say which.

    held: the checkpoint's config. Where the number of outputs differs, from_pretrained has drawn a new classifier.
    """
    before, now = names_of(held.id2label), names_of(model.config.id2label)
    if held.num_labels == model.config.num_labels:
        if before is None or now is None or before == now:
            return
        if (order := order_of(before, now)) is not None:
            print(f"The classes of {checkpoint} come in another order here; its classifier is matched by name.")
            reorder_outputs(model, order, model.config.id2label)
            return
        model.classifier = torch.nn.Linear(model.classifier.in_features, model.classifier.out_features)
        model._init_weights(model.classifier)
    print(
        f"A new classifier is trained: {checkpoint} has {held.num_labels} outputs ({shown(before or ['unnamed'])}), "
        f"this task {model.config.num_labels} ({shown(now or ['unnamed'])})."
    )
