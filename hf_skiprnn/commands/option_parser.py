"""Command lines made from dataclasses: HfArgumentParser with titled groups and percent signs in help texts."""

import argparse
import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from hf_skiprnn import SkipRNNConfig


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that keeps the description's lines, shows defaults and prints percent signs as they are.

    argparse formats help texts with the % operator, so "1 % of the steps" would raise TypeError. So every % is doubled,
    except in placeholders such as %(default)s.
    """

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        return f"{action.option_strings[0]}{value}"  # --an-option is the same as --an_option

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None:
            return re.sub("%", "%%", action.help or "")
        return re.sub(r"%%|%(?!\(\w+\)s)", "%%", super()._get_help_string(action) or "")


class OptionParser(HfArgumentParser):
    """HfArgumentParser whose help page shows the options of each dataclass under their own title.

    groups: title -> dataclass, in the order of the help page.
    """

    def __init__(self, groups: dict[str, Any], **kwargs: Any) -> None:
        self._titles = {dataclass: title for title, dataclass in groups.items()}
        super().__init__(groups.values(), formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        group, types = self.add_argument_group(self._titles[dtype]), get_type_hints(dtype)
        for field in dataclasses.fields(dtype):
            if field.init:
                field.type = types[field.name]
                self._parse_dataclass_field(group, field)  # type: ignore[arg-type]  # a group also has add_argument


def model_arguments() -> type[Any]:
    """Return a dataclass with the fields of SkipRNNConfig; a field is None unless the command line sets it."""
    own = {field.name for field in dataclasses.fields(SkipRNNConfig)} & set(SkipRNNConfig.__annotations__)
    fields = []
    for name, annotation in SkipRNNConfig.__annotations__.items():
        if name in own:
            kind = float if float in get_args(annotation) else annotation
            text = {"help": described(name)}
            fields.append((name, kind | None, dataclasses.field(default=None, metadata=text)))
    return dataclasses.make_dataclass("ModelArguments", fields)


def described(field: str) -> str:
    """Return the description of a field in SkipRNNConfig's docstring."""
    found = re.search(
        rf"^ {{4,8}}{field}: (.*?)(?=^ {{4,8}}\w+: |^\s*$)", SkipRNNConfig.__doc__ or "", re.MULTILINE | re.DOTALL
    )
    return " ".join(found[1].split()) if found else f"SkipRNNConfig.{field}"


@contextmanager
def wrong_input_exits() -> Iterator[None]:
    """Turn an error about options, files or data into an exit with its message and without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        raise SystemExit(f"hf-skiprnn: {error}") from error
