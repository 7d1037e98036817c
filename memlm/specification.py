"""Strict construction of config dataclasses from plain mappings."""

import dataclasses
import types
import typing
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from memlm.errors import UserError, require_known


def build_config(config_class: type, values: dict[str, Any], where: str) -> Any:
    """An instance of a dataclass made strict by `huggingface_hub.dataclasses.strict`.

    Whole numbers are accepted where a float is meant.

    Raises:
        UserError: for an unknown key or a value of the wrong type, naming `where`.
    """
    require_known(values, (field.name for field in dataclasses.fields(config_class)), where)
    hints = typing.get_type_hints(config_class)
    values = {key: _as_float(value, hints[key]) for key, value in values.items()}
    try:
        return config_class(**values)
    except (StrictDataclassError, TypeError) as error:
        reason = str(error.__cause__ or error).splitlines()[-1].strip()
        raise UserError(f"{where}: {reason}") from error


def _as_float(value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) is int and float in options and int not in options:
        return float(value)
    return value
