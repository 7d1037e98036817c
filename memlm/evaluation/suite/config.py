"""The configuration of a suite, and its strict loading from YAML, presets and overrides."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlm.errors import UserError, nearest, require_known
from memlm.yaml_tree import merge, parse_overrides, read_yaml, set_value

FOLDER = Path("configs/suites")
_SECTIONS = ("model", "data", "train", "evaluate")
_AXES = ("widths", "learning_rates")
_NEEDED = ("title", "question", "report", "base", "tasks", "memories")
_KEYS = (*_NEEDED, *_AXES, "seeds", "presets")


@dataclass(frozen=True)
class Axes:
    """What a memory is trained at; None = as its run config says.

    Attributes:
        widths: values of model.hidden_size.
        learning_rates: values of train.learning_rate, or of train.muon_learning_rate with Muon.
    """

    widths: list[int] | None = None
    learning_rates: list[float] | None = None


@dataclass(frozen=True)
class SuiteConfig:
    """A suite: what is trained, on what, and what is reported of it.

    Attributes:
        name: name of the file without its ending.
        path: of the file.
        preset: that was laid over it; None = none.
        title, question: of the report.
        report: its kind and that kind's options.
        base: sections of a run config, which all cells share.
        tasks: sections that are laid over the base, by task.
        memories: sections that are laid over base and task, by memory.
        axes: of each memory.
        seeds: values of train.seed and data.seed.
    """

    name: str
    path: Path
    preset: str | None
    title: str
    question: str
    report: dict[str, Any]
    base: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    memories: dict[str, dict[str, Any]]
    axes: dict[str, Axes]
    seeds: list[int]


def suite_path(name: str) -> Path:
    """The file of a suite: a path that ends in .yaml, or a name in configs/suites."""
    return Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"


def load_suite(name: str, preset: str | None = None, overrides: Iterable[str] = ()) -> SuiteConfig:
    """Read a suite.

    Args:
        name: see `suite_path`.
        preset: name of an entry of `presets`, which is laid over everything else, as
            `memlm.yaml_tree.merge` does.
        overrides: command-line words such as `--base.train.steps 200` or `--seeds [0]`, after the
            preset; values are YAML.

    Raises:
        UserError: for a missing or broken file, an unknown key or a wrong value.
    """
    path = suite_path(name)
    if path.parent == FOLDER and not FOLDER.is_dir():
        raise UserError(
            f"{path}: there is no folder {FOLDER} in {Path.cwd()}; start it where the project's "
            "configs are, or give the path of a suite"
        )
    tree = _unshared(read_yaml(path))
    require_known(tree, _KEYS, str(path))
    presets = _mapping(tree.pop("presets", None) or {}, f"{path}: presets")
    if preset is not None:
        if preset not in presets:
            valid = ", ".join(presets) or "none"
            raise UserError(
                f"{path}: no preset {preset!r}{nearest(preset, presets)} (presets: {valid})"
            )
        where = f"{path}: presets.{preset}"
        require_known(_mapping(presets[preset], where), set(_KEYS) - {"presets"}, where)
        tree = _unshared(merge(tree, presets[preset]))
    for key, value in parse_overrides(overrides).items():
        set_value(tree, key, value)
    require_known(tree, _KEYS, f"{path} and command line")
    for key in _NEEDED:
        if not tree.get(key):
            raise UserError(f"{path}: needs {key!r}")
    return _build(tree, path, preset)


def _build(tree: dict[str, Any], path: Path, preset: str | None) -> SuiteConfig:
    from memlm.evaluation.suite.reports import check_report

    for key in ("title", "question"):
        if not isinstance(tree[key], str):
            raise UserError(f"{path}: {key}: expected a line of text, got {tree[key]!r}")
    report = _mapping(tree["report"], f"{path}: report")
    try:
        check_report(report)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    shared = _axes(tree, str(path))
    memories, axes = {}, {}
    for name, given in _named(tree["memories"], f"{path}: memories").items():
        where = f"{path}: memories.{name}"
        own = _axes(given, where)
        axes[name] = Axes(
            shared.widths if own.widths is None else own.widths,
            shared.learning_rates if own.learning_rates is None else own.learning_rates,
        )
        sections = {key: value for key, value in given.items() if key not in _AXES}
        memories[name] = _sections(sections, where)
    tasks = {
        name: _sections(given, f"{path}: tasks.{name}")
        for name, given in _named(tree["tasks"], f"{path}: tasks").items()
    }
    for group, members in (report.get("groups") or {}).items():
        for task in members:
            if task not in tasks:
                hint = nearest(task, tasks) or f" (valid: {', '.join(tasks)})"
                raise UserError(f"{path}: report.groups.{group}: unknown task {task!r}{hint}")
    base = _sections(_mapping(tree["base"], f"{path}: base"), f"{path}: base")
    seeds = [0] if tree.get("seeds") is None else tree["seeds"]
    return SuiteConfig(
        path.stem,
        path,
        preset,
        tree["title"],
        tree["question"],
        report,
        base,
        tasks,
        memories,
        axes,
        _numbers(seeds, int, 0, f"{path}: seeds"),
    )


def _axes(given: dict[str, Any], where: str) -> Axes:
    widths, rates = (given.get(key) for key in _AXES)
    if widths is not None:
        widths = _numbers(widths, int, 1, f"{where}: widths")
    if rates is not None:
        rates = [float(rate) for rate in _numbers(rates, float, 0, f"{where}: learning_rates")]
    return Axes(widths, rates)


def _numbers(values: Any, kind: type, least: int, where: str) -> list:
    """`values`, a list of different numbers."""
    kinds = (int,) if kind is int else (int, float)
    if (
        not isinstance(values, list)
        or not values
        or not all(type(value) in kinds and least <= value < math.inf for value in values)
        or len(set(values)) < len(values)
    ):
        what = "integers" if kind is int else "numbers"
        raise UserError(f"{where}: expected a list of different {what} >= {least}, got {values!r}")
    return values


def _named(value: Any, where: str) -> dict[str, dict[str, Any]]:
    """Mappings by name; one that is left empty is an empty mapping."""
    return {
        str(name): _mapping({} if given is None else given, f"{where}.{name}")
        for name, given in _mapping(value, where).items()
    }


def _sections(given: dict[str, Any], where: str) -> dict[str, Any]:
    require_known(given, _SECTIONS, where)
    for key in given:
        _mapping(given[key], f"{where}.{key}")
    if "output_dir" in given.get("train", {}):
        raise UserError(f"{where}.train.output_dir: run folders are the suite's; see --output")
    return given


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a mapping, got {value!r}")
    return value


def _unshared(value: Any) -> Any:
    """A copy in which what YAML's aliases share is there once for each."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value
