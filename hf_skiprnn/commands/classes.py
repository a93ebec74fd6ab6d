"""Match the classes of a checkpoint with the classes of the data, by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_skiprnn.tasks import Task


def names_of(labels: Mapping[Any, str] | None) -> list[str] | None:
    """Return the class names of an id2label in the order of their ids; None if they are the defaults (LABEL_0)."""
    if not labels:
        return None
    names = [labels[i] for i in sorted(labels, key=int)]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def order_of(held: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Return the index in `held` of every name in `wanted`; None if the two lists differ in more than their order."""
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
    """Reorder the model's outputs so that they follow the task's classes, which are matched by name.

    Raises:
        ValueError: the task and the checkpoint have different classes, or different numbers of outputs.
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
            f"{shown(asked)}. Evaluate on data with the same class names, or rename the classes."
        )
    if order != list(range(len(order))):
        print(f"The data have the checkpoint's {len(order)} classes in another order; they are matched by name.")
        reorder_outputs(model, order, labels)


def shown(names: Sequence[str]) -> str:
    """Return a text with the first ten names and the number of the others."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more


def start_classifier(model: Any, checkpoint: str, held: Any) -> None:
    """Adapt the classifier of a model to the classes of the data it is fine-tuned on, and print what was done.

    Same classes: the classifier is kept, or its outputs are reordered. Other classes: it is initialised anew, by
    from_pretrained where the number of outputs differs. held: the checkpoint's config.
    """
    before, now = names_of(held.id2label), names_of(model.config.id2label)
    if held.num_labels == model.config.num_labels:
        if before is None or now is None or before == now:
            return
        if (order := order_of(before, now)) is not None:
            print(f"The classes of {checkpoint} are in another order here; its outputs are reordered by class name.")
            reorder_outputs(model, order, model.config.id2label)
            return
        model.classifier = torch.nn.Linear(model.classifier.in_features, model.classifier.out_features)
        model._init_weights(model.classifier)
    print(
        f"A new classifier is trained: {checkpoint} has {held.num_labels} outputs ({shown(before or ['unnamed'])}), "
        f"this task {model.config.num_labels} ({shown(now or ['unnamed'])})."
    )
