"""Reading YAML, laying mappings over each other, and dotted overrides."""

import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from memlm.errors import UserError, nearest


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-3 is a number, `no` and `on` are words, keys are unique."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {
        first: [entry for entry in entries if entry[0].rpartition(":")[2] not in ("bool", "float")]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|false|True|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?(\d[\d_]*\.[\d_]*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.inf|\.nan)$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not valid YAML{place}: {problem}") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid YAML: nested too deeply") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: for a file that is missing, unreadable or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        siblings = sorted(str(other) for other in path.parent.glob("*.yaml"))
        hint = nearest(str(path), siblings)
        raise UserError(f"{path}: no such config file{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable text file") from error
    sections = _parse_yaml(text, str(path))
    if not isinstance(sections, dict):
        raise UserError(f"{path}: needs the sections model, data, train")
    return sections


def merge(base: Any, over: Any) -> Any:
    """`over` laid over `base`.

    Mappings merge, unless `over` names another `type`; lists of mappings of equal length merge
    element by element; anything else is replaced.
    """
    if isinstance(base, dict) and isinstance(over, dict):
        if over.get("type", base.get("type")) != base.get("type"):
            return over
        return base | {key: merge(base.get(key), value) for key, value in over.items()}
    lists = isinstance(base, list) and isinstance(over, list)
    if lists and len(base) == len(over) and all(isinstance(item, dict) for item in base + over):
        return [merge(*pair) for pair in zip(base, over, strict=True)]
    return over


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """Values by dotted key from `--a.b value` and `--a.b=value`; values are YAML.

    Raises:
        UserError: for anything else, and for a key whose value another word takes away.
    """
    changed: dict[str, Any] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word[2:3] in ("", "="):
            raise UserError(f"unexpected argument {word!r}; overrides look like --train.steps 200")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"{word}: needs a value, as in {word} VALUE")
            text = words.pop(0)
        if "" in key.split("."):
            raise UserError(f"--{key}: has an empty part; a key looks like --train.steps")
        value = _parse_yaml(text, f"--{key}")
        for earlier, given in changed.items():
            if earlier == key and given != value:
                raise UserError(f"--{key} is given twice, as {given!r} and as {value!r}")
            if earlier.startswith(f"{key}."):
                raise UserError(f"--{key} takes the place of --{earlier}; give it before that one")
        changed[key] = value
    return changed


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key in place; mappings on the way are made, numbers are places.

    Raises:
        UserError: when the way leads through a plain value or past the end of a list.
    """
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        here = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = node[_place(node, part, key)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(
                f"--{key}: {here} is {node!r}, which has no {last!r}; give {here} as a mapping"
            )
    if isinstance(node, list):
        node[_place(node, last, key)] = value
    else:
        node[last] = value


def _place(items: list, part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise UserError(
            f"--{key}: {part!r} is not a place in a list of {len(items)} (the first is 0)"
        )
    return int(part)
