"""What is where in results: tasks, settings and conditions over all runs."""

from collections.abc import Iterable
from typing import Any

from memlm.evaluation.config import ALL_CONDITIONS
from memlm.evaluation.lengths import parse_length
from memlm.evaluation.tasks import GROUPS

Runs = list[dict[str, Any]]
PROMPT_CONDITIONS = ("changed", "absent")


def name_of(run: dict[str, Any]) -> str:
    """What a run is called."""
    return run["model"]["name"]


def task_names(runs: Runs) -> list[str]:
    """All tasks, in the order of their first appearance."""
    return list(dict.fromkeys(name for run in runs for name in run["tasks"]))


def group_of(task: str) -> str | None:
    """The group that a task is shown in."""
    return next((group for group, names in GROUPS.items() if task in names), None)


def sections(runs: Runs) -> list[tuple[str, list[str]]]:
    """(name of a task or group, its tasks that were run) in order."""
    found: dict[str, list[str]] = {}
    for task in task_names(runs):
        found.setdefault(group_of(task) or task, []).append(task)
    return list(found.items())


def is_group(section: str) -> bool:
    """Whether a section is a group of tasks."""
    return section in GROUPS


def task_of(runs: Runs, name: str) -> dict[str, Any]:
    """The task in the first run that has it: for title, axis, metric and kind."""
    return next(run["tasks"][name] for run in runs if name in run["tasks"])


def number_of(label: str) -> int | None:
    """The number that a setting stands for, such as 4096 of "4096" or "4k"; None without one."""
    if label in ("0", "0k"):
        return 0
    try:
        return parse_length(label, "")
    except ValueError:
        return None


def in_order(labels: Iterable[str]) -> list[str]:
    """Settings without repetition: by number where all have one, else as they come."""
    found = list(dict.fromkeys(labels))
    numbers = {label: number_of(label) for label in found}
    if None in numbers.values():
        return found
    return sorted(found, key=lambda label: numbers[label] or 0)


def settings_of(runs: Runs, *tasks: str) -> list[str]:
    """The settings that any run has in any of the tasks, in order."""
    return in_order(
        label
        for run in runs
        for task in tasks
        if task in run["tasks"]
        for label in run["tasks"][task]["scores"]
    )


def shared_settings(runs: Runs, *tasks: str) -> list[str]:
    """The settings that every run has in all of the tasks."""
    everywhere = [
        set(run["tasks"].get(task, {"scores": {}})["scores"]) for run in runs for task in tasks
    ]
    return [label for label in settings_of(runs, *tasks) if all(label in one for one in everywhere)]


def conditions_of(runs: Runs, *tasks: str) -> list[str]:
    """The conditions that any run has in any of the tasks, in the usual order."""
    found = {
        condition
        for run in runs
        for task in tasks
        if task in run["tasks"]
        for scores in run["tasks"][task]["scores"].values()
        for condition in scores
    }
    return [name for name in ALL_CONDITIONS if name in found]


def score_of(run: dict[str, Any], task: str, setting: str, condition: str) -> dict[str, Any] | None:
    """One estimate; None where it was not measured."""
    return run["tasks"].get(task, {"scores": {}})["scores"].get(setting, {}).get(condition)


def mean_score(run: dict[str, Any], tasks: list[str], setting: str, condition: str) -> float | None:
    """The mean of the tasks' values; None where one of them was not measured."""
    scores = [score_of(run, task, setting, condition) for task in tasks]
    if not scores or any(score is None for score in scores):
        return None
    return sum(score["value"] for score in scores) / len(scores)
