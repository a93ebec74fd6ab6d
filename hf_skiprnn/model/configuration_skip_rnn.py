"""SkipRNNConfig: the architecture, the budget and the regularisation of a Skip RNN."""

import difflib
import math
import operator
from dataclasses import fields
from itertools import pairwise
from typing import Any, ClassVar, Literal, SupportsIndex

import torch
from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Bounds far beyond any use. Without them, a config from a stranger could ask for more memory than there is.
LARGEST = {
    "input_size": 2**24,
    "hidden_size": 2**16,
    "num_hidden_layers": 2**10,
    "vocab_size": 2**28,
    "num_labels": 2**20,
    "stride": 2**31 - 1,
}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# Names that transformers takes as arguments of a config, or writes into saved ones, and that are no fields of it.
BESIDE_FIELDS = (
    *("num_labels", "name_or_path", "_name_or_path", "_commit_hash", "model_type", "torch_dtype", "auto_map"),
    *("custom_pipelines", "output_attentions", "attn_implementation", "_attn_implementation_autoset"),
    *("experts_implementation", "use_cache", "quantization_config"),
)
FROM_FILE = "_is_from_file"  # how from_dict tells the constructor that it need not be strict
MISSPELT = 0.85  # similarity, by difflib, from which an unknown name is taken for a spelling mistake
OWN_PIPELINES = "pipeline_skip_rnn."  # the module of this package's pipelines, which travels with a checkpoint
IS_PACKAGE = __name__.startswith("hf_skiprnn.")  # else this file came with a checkpoint


class CustomPipelines(dict[str, Any]):
    """A config's custom_pipelines. Where the package is installed, `in` does not find those that the package has.

    `transformers.pipeline` runs the code beside a checkpoint for a task that it finds `in` this dictionary, also where
    the same code is installed. For other tasks it takes what is registered: the package's pipelines. The entries stay,
    since they are saved with the config, and name the task to a call that names none.
    """

    def __contains__(self, task: object) -> bool:
        """Return whether the pipeline of a task must be loaded from the checkpoint."""
        entry = self.get(str(task))
        return entry is not None and not (IS_PACKAGE and entry["impl"].startswith(OWN_PIPELINES))


def _check_code(name: str, value: Any) -> None:
    """Raise ValueError if auto_map or custom_pipelines do not have the form that transformers expects in a file."""
    found, form = list(value.values()) if isinstance(value, dict) else [None], '"module.Class"'
    if name == "custom_pipelines":
        found = [entry.get("impl") if isinstance(entry, dict) else None for entry in found]
        form = '{"impl": "module.Class"}'
    if not all(isinstance(entry, str | list | tuple) for entry in found):
        raise ValueError(f"config.json: {name} must map names to {form}; got {value!r}. Remove it, or repair it.")


def _names_by_number(label2id: dict[str, Any]) -> dict[int, str]:
    """Return id2label for a label2id; raise ValueError if its values are not 0, 1, 2, ..., each once."""
    numbers = list(label2id.values())
    if any(type(number) is not int for number in numbers) or sorted(numbers) != list(range(len(numbers))):
        raise ValueError(f"label2id must number the labels 0, 1, 2, ..., each once; got {label2id!r}.")
    return {number: name for name, number in label2id.items()}


def _count_of_labels(count: Any) -> int:
    """Return a number of labels, an integer of any library, as an int.

    Raises:
        ValueError: it is no integer, or out of bounds.
    """
    is_integer = isinstance(count, SupportsIndex) and not isinstance(count, bool)
    if not (is_integer and 1 <= operator.index(count) <= LARGEST["num_labels"]):
        raise ValueError(f"num_labels must be an integer from 1 to {LARGEST['num_labels']}; got {count!r}.")
    return operator.index(count)


@strict
class SkipRNNConfig(PreTrainedConfig):
    """Configuration of a Skip RNN (Campos et al., ICLR 2018).

    Args:
        cell_type: "lstm" or "gru".
        gru_reset: where a GRU's reset gate acts: "before" the recurrent product (paper) or "after" it (torch.nn.GRU).
        gate: "learned" (the paper's), "always" (a plain LSTM or GRU), or one of two baselines: "random" (each step is
            skipped with probability `skip_probability`) and "strided" (every `stride`-th step is read).
        skip_probability: p_skip of the "random" gate, in [0, 1).
        stride: of the "strided" gate, at least 1.
        input_size: width of an input vector, or of a token's embedding where `vocab_size` is set.
        hidden_size: units of each layer.
        num_hidden_layers: layers stacked under one shared gate.
        vocab_size: number of tokens; where set, the model takes `input_ids` and embeds them.
        pad_token_id: token whose embedding stays zero.
        budget_weight: lambda, the factor of the budget loss (section 3.3).
        budget_loss: "cost": lambda * N; "l1": lambda * |N - budget_target * L|; "l2": its square times lambda; with N
            updates over the L real steps of a row. "rate": lambda * N / L, the share of steps read. It has no scale of
            its own, so one lambda serves sequences of any length; it may be negative (a reward for reading), as
            `hf_skiprnn.training.RateController` needs to hold a share.
        budget_target: wanted share of real steps read, in [0, 1]; needed by "l1" and "l2", refused with "cost"; with
            "rate" it is what training was asked for.
        budget_slope: with budget_loss="rate" and gate_noise=[low, high]: lambda of a row is budget_weight +
            budget_slope * its noise, so that rows that shall read more can have another price.
        gate_shift: added to the gate's bias b_p at run time: the operating point. Below 0 fewer steps are read, above 0
            more. Saved with the checkpoint; `gate_shift=` and `update_rate=` of a call replace it.
        gate_noise: in training each row's gate is shifted by a draw from U(-a, a), so that the trained model bears
            other shifts. 0 switches it off. With [low, high] draws are from U(low, high), and the row's wanted share
            follows: its logit is that of budget_target plus the noise.
        gate_gradient: how the gates between two updates add to the gradient of the update probability. "sum": each with
            weight 1, the straight-through estimator (section 3.1). "capped": with weight min(1, 4 D), so that
            those of an interval of more than 2 steps count as 2; gradients then rarely explode. "mean": with weight
            min(1, 2 D), so that those of every interval count as 1.
        gate_calibration: pairs [share of steps read, gate_shift] that were measured on validation rows, both
            increasing; `update_rate=` looks its shift up here. None: not calibrated.
        learn_initial_state: learn s_0, drawn from N(0, 1); otherwise it is zero.
        update_bias: initial value of b_p; at 1 nearly every step is an update at the start of training.
        forget_bias: initial value of an LSTM's forget gate bias.
        input_noise: standard deviation of the Gaussian noise added to input_values and pixel_values in training;
            0 switches it off. With few rows, noise keeps the model from memorising them.
        embedding_dropout: probability of zeroing an element of an embedding.
        classifier_dropout: probability of zeroing an element of the state that a classifier reads.

    Raises:
        StrictDataclassError: a value has the wrong type, is out of its range, or contradicts another one.
    """

    model_type = "skip_rnn"
    # Everything but the logits, so that `logits, labels = eval_pred` works with a plain Trainer.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "task_loss",
        "budget_loss",
        "num_updates",
        "update_gates",
        "state",
        "hidden_states",
    ]

    cell_type: Literal["lstm", "gru"] = "lstm"
    gru_reset: Literal["before", "after"] = "before"
    gate: Literal["learned", "always", "random", "strided"] = "learned"
    skip_probability: float | int = 0.5
    stride: int = 2
    input_size: int = 1
    hidden_size: int = 110
    num_hidden_layers: int = 1
    vocab_size: int | None = None
    pad_token_id: int | None = None
    budget_weight: float | int = 1e-4
    budget_loss: Literal["cost", "l1", "l2", "rate"] = "cost"
    budget_target: float | int | None = None
    budget_slope: float | int = 0.0
    gate_shift: float | int = 0.0
    gate_noise: float | int | list[float | int] = 0.0
    gate_gradient: Literal["sum", "capped", "mean"] = "sum"
    gate_calibration: list[list[float | int]] | None = None
    learn_initial_state: bool = True
    update_bias: float | int = 1.0
    forget_bias: float | int = 1.0
    input_noise: float | int = 0.0
    embedding_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("auto_map", "custom_pipelines"):
            _check_code(name, value := value or {})
            value = CustomPipelines(value) if name == "custom_pipelines" else value
        super().__setattr__(name, value)

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        content: Any = super()._dict_from_json_file(json_file)
        if not isinstance(content, dict):
            raise ValueError(f"{json_file} must hold a JSON object, {{...}}; it holds {content!r}.")
        return content

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return a config from the fields of a file. Fields that other tools and users added are kept.

        (The constructor refuses them: there, an unknown name is a spelling mistake.) Arguments override fields, and are
        checked with them. With a gate that is not learned, the file's operating point is left out; with another
        `budget_loss`, its weight, slope and target of the budget, which had other units.

        Raises:
            ValueError: a field has a name of the class, such as "to_dict", which it would replace.
            StrictDataclassError: as the constructor.
        """
        inherited = {field.name for field in fields(PreTrainedConfig)}
        names = {field.name for field in fields(cls)} - inherited
        own = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        useless: set[str] = set()
        if own.get("gate", "learned") != "learned":
            useless |= {"gate_shift", "gate_noise", "gate_calibration"}
        before = config_dict.get("budget_loss", cls.budget_loss)
        if own.get("budget_loss", before) != before:
            useless |= {"budget_weight", "budget_slope", "budget_target"}
        kept = {name: value for name, value in config_dict.items() if name not in useless}
        return super().from_dict(kept | own | {FROM_FILE: True}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """Return a config from a JSON file; see `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def __post_init__(self, **kwargs: Any) -> None:
        from_file = kwargs.pop(FROM_FILE, False)
        unknown = {name: kwargs.pop(name) for name in list(kwargs) if name not in BESIDE_FIELDS}
        self._check_unknown(unknown, from_file)
        if kwargs.get("num_labels", 1) is None:  # as in transformers: the default
            del kwargs["num_labels"]
        if "num_labels" in kwargs:
            kwargs["num_labels"] = _count_of_labels(kwargs["num_labels"])
        for name in ("id2label", "label2id"):
            value = getattr(self, name)
            if not isinstance(value, dict | None) or (name == "id2label" and value == {}):
                raise ValueError(f"{name} must be a dictionary of labels; got {value!r}.")
        if self.label2id and self.id2label is None:  # transformers would drop the names without a word
            self.id2label = _names_by_number(self.label2id)
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if self.dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be that of floating point numbers, as 'float32'; got {self.dtype!r}.")
        super().__post_init__(**kwargs)
        for name, value in unknown.items():
            setattr(self, name, value)

    def _check_unknown(self, unknown: dict[str, Any], from_file: bool) -> None:
        """Raise ValueError for unknown fields; from a file, warn only of those that look like spelling mistakes.

        Removes what transformers does not keep in a config either: settings of text generation.
        """
        own = [field.name for field in fields(self)]
        if not from_file and unknown:
            name = next(iter(unknown))
            near = difflib.get_close_matches(name, own, n=1)
            text = f"SkipRNNConfig has no field {name!r}." + (f" Did you mean {near[0]!r}?" if near else "")
            raise ValueError(f"{text} Leave it out; help(SkipRNNConfig) lists the fields.")
        for name in unknown.keys() & GenerationConfig._get_default_generation_params().keys():
            del unknown[name]
        for name in unknown:
            if hasattr(type(self), name):
                raise ValueError(f"The config has a field {name!r}, which would replace what the class has. Remove it.")
        nearest = {name: difflib.get_close_matches(name, own, n=1, cutoff=MISSPELT) for name in unknown}
        if hints := [f"{name!r} (did you mean {near[0]!r}?)" for name, near in nearest.items() if near]:
            logger.warning("The config holds fields that nothing reads: %s.", ", ".join(hints))

    def validate_sizes(self) -> None:
        """Check that sizes are at least 1 and within their bounds."""
        for name in ("input_size", "hidden_size", "num_hidden_layers", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name, largest in LARGEST.items():
            if (getattr(self, name) or 0) > largest:
                raise ValueError(f"{name} must be at most {largest}; got {getattr(self, name)}.")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(
                f"vocab_size must be at least 1, or None for inputs without tokens; got {self.vocab_size}."
            )

    def validate_probabilities(self) -> None:
        """Check that probabilities are in [0, 1)."""
        for name in ("skip_probability", "embedding_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}.")

    def validate_finite(self) -> None:
        """Check that the weight of the budget, initial biases, shift and noise are finite."""
        for name in ("budget_weight", "budget_slope", "update_bias", "forget_bias", "gate_shift"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite; got {getattr(self, name)}.")
        if not 0 <= self.input_noise < math.inf:
            raise ValueError(f"input_noise must be a finite standard deviation, at least 0; got {self.input_noise}.")
        low, high = self.noise_range()
        if not -math.inf < low <= high < math.inf:
            raise ValueError(
                f"gate_noise must be a, the half width of U(-a, a), or [low, high], both finite; got {self.gate_noise}."
            )
        if self.budget_weight < 0 and self.budget_loss != "rate":
            raise ValueError(
                f"budget_weight must not be negative; got {self.budget_weight}. 0 switches the budget off."
            )

    def validate_budget(self) -> None:
        """Check that budget_target is given for the budgets that have a target, and only for those."""
        if self.budget_loss == "cost" and self.budget_target is not None:
            raise ValueError(
                f"budget_loss='cost' has no target; got budget_target={self.budget_target}. "
                "Use budget_loss='l1' or 'l2'."
            )
        if self.budget_loss in ("l1", "l2") and self.budget_target is None:
            raise ValueError(
                f"budget_loss={self.budget_loss!r} needs budget_target, the wanted share of steps in [0, 1]."
            )
        if self.budget_target is not None and not 0 <= self.budget_target <= 1:
            raise ValueError(f"budget_target is a share of a row's real steps, in [0, 1]; got {self.budget_target}.")

    def noise_range(self) -> tuple[float, float]:
        """Return the lowest and the highest shift that `gate_noise` draws."""
        noise = self.gate_noise
        if not isinstance(noise, list):
            return -noise, noise
        if len(noise) != 2:
            raise ValueError(f"gate_noise must be a number or [low, high]; got {noise}.")
        return noise[0], noise[1]

    def validate_operating_point(self) -> None:
        """Check that only a learned gate is moved, and that shares increase with shifts in a calibration."""
        if self.gate != "learned" and (self.gate_shift or any(self.noise_range()) or self.gate_calibration):
            raise ValueError(
                f"gate_shift, gate_noise and gate_calibration need gate='learned'; got gate={self.gate!r}."
            )
        pairs = self.gate_calibration
        if pairs is None:
            return
        is_right = bool(pairs) and all(
            len(pair) == 2 and 0 <= pair[0] <= 1 and math.isfinite(pair[1]) for pair in pairs
        )
        if not is_right or any(a[0] >= b[0] or a[1] >= b[1] for a, b in pairwise(pairs)):
            raise ValueError(
                "gate_calibration must hold pairs [share of steps read, gate_shift], both increasing, shares in "
                f"[0, 1]; got {pairs!r}."
            )

    def validate_tokens(self) -> None:
        """Check that settings of tokens have a vocabulary, and that input noise has none."""
        if self.vocab_size is None:
            if self.pad_token_id is not None:
                raise ValueError(
                    f"pad_token_id={self.pad_token_id} needs vocab_size; without it inputs are not tokens."
                )
            if self.embedding_dropout:
                raise ValueError(f"embedding_dropout={self.embedding_dropout} needs vocab_size; nothing is embedded.")
        elif self.input_noise:
            raise ValueError(
                f"input_noise={self.input_noise} needs numbers as inputs; for tokens use embedding_dropout."
            )
        elif self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id must be in [0, vocab_size = {self.vocab_size}); got {self.pad_token_id}.")

    def validate_problem_type(self) -> None:
        """Check problem_type, which transformers does not check in configs with fields of their own."""
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}; got {self.problem_type!r}.")

    def validate_cell(self) -> None:
        """Check that gru_reset is set for a GRU only."""
        if self.cell_type == "lstm" and self.gru_reset != "before":
            raise ValueError(f"gru_reset={self.gru_reset!r} needs cell_type='gru'; got cell_type='lstm'.")

    @property
    def cell(self) -> str:
        """The name of the cell in `cells_skip_rnn.CELLS`."""
        return "gru_reset_after" if (self.cell_type, self.gru_reset) == ("gru", "after") else self.cell_type
