"""The beginning of the page: what was measured, on what, and the main numbers."""

from collections.abc import Sequence
from typing import Any

from memlm.evaluation.report.groups import TITLES
from memlm.evaluation.report.html import Pictures, details, estimate, picture, table, text
from memlm.evaluation.report.numbers import (
    MISSING,
    bytes_text,
    count_text,
    estimate_text,
    seconds_text,
    setting_text,
    unit_of,
    value_text,
)
from memlm.evaluation.report.shape import (
    Runs,
    conditions_of,
    is_group,
    mean_score,
    name_of,
    score_of,
    sections,
    settings_of,
    shared_settings,
    task_names,
    task_of,
)

CONDITION_TEXT = {
    "on": "the memory works as trained",
    "off": "every memory branch gives zero, from the first token on",
    "reset": "the memory is emptied between context and question (on held-out text: before every "
    "segment); attention keeps what it holds",
    "swapped": "the memory of another document stands in its place",
    "zeroed": "the values of the learned table count as zero",
    "changed": "the prompt holds another value in the same place, and that value is right",
    "absent": "the prompt holds nothing to be found",
}


def heading_of(runs: Runs, section: str) -> str:
    """The title of a task or a group."""
    return TITLES[section] if is_group(section) else task_of(runs, section)["title"]


def overview(results: dict[str, Any], light: Pictures, dark: Pictures) -> str:
    """Everything before the first task."""
    runs = results["runs"]
    tasks = task_names(runs)
    conditions = conditions_of(runs, *tasks)
    listed = "".join(f"<li><b>{name}</b>: {CONDITION_TEXT[name]}.</li>" for name in conditions)
    notes = [
        f"<p><b>{text(name_of(run))}.</b> {text(note)}</p>" for run in runs for note in run["notes"]
    ]
    parts = [
        f"<p>{count_text(len(tasks), 'task')} with {count_text(len(runs), 'model')}, in "
        f"{count_text(len(conditions), 'condition')} of the memory and the prompt; "
        f"{100 * results['confidence']:.0f} % intervals; {seconds_text(results['seconds'])} of "
        "computation.</p>",
        _models(runs),
        "<h3>In short</h3>",
        _headline(runs),
        *notes,
        details("What the conditions mean", f"<ul>{listed}</ul>"),
        picture("frontier.png", "Recall against bytes of state", light, dark),
        picture("cost.png", "Time per token, state and peak memory by length", light, dark),
    ]
    return "\n".join(part for part in parts if part)


def _models(runs: Runs) -> str:
    rows = []
    for run in runs:
        model = run["model"]
        reach = model["attention_reach_tokens"]
        costs = [cost for task in run["tasks"].values() for cost in task["cost"].values()]
        largest = max(costs, key=lambda cost: cost.get("state_bytes") or 0, default={})
        rows.append(
            [
                text(name_of(run)),
                f"{model['parameters']:,}",
                "everything" if reach is None else f"{reach:,} tokens",
                bytes_text(largest.get("state_bytes")),
                bytes_text(largest.get("memory_state_bytes")),
                bytes_text(largest.get("key_value_bytes")),
            ]
        )
    header = [
        "model", "parameters", "attention sees", "largest state of a row", "of it memory",
        "of it keys/values",
    ]  # fmt: skip
    return table(header, rows)


def _headline(runs: Runs) -> str:
    """Every task or group at the longest setting that all models have."""
    columns = [
        (run, condition)
        for run in runs
        for condition in conditions_of([run], *task_names(runs))
        if condition in ("on", "off")
    ]
    header = ["task"]
    for run, condition in columns:
        header.append(
            f"{text(name_of(run))}, {condition}" if len(runs) > 1 else f"memory {condition}"
        )
    rows = []
    for section, tasks in sections(runs):
        first = task_of(runs, tasks[0])
        settings = shared_settings(runs, *tasks) or settings_of(runs, *tasks)
        setting = "all" if "all" in settings else settings[-1]
        place = f"{setting_text(setting, first['axis'])} {unit_of(first['axis'])}"
        if setting == "all":
            place = "whole documents"
        name = heading_of(runs, section)
        metric = first["metric"]
        if is_group(section):
            name, metric = f"{name}, mean of {count_text(len(tasks), 'task')}", "score (%)"
        cells = [_head_cell(run, section, tasks, setting, condition) for run, condition in columns]
        link = f'<a href="#{text(section)}">{text(name)}</a>'
        rows.append([f"{link}<br><small>{text(metric)}, {text(place)}</small>", *cells])
    return table(header, rows)


def _head_cell(
    run: dict[str, Any], section: str, tasks: Sequence[str], setting: str, condition: str
) -> str:
    if is_group(section):
        mean = mean_score(run, list(tasks), setting, condition)
        return MISSING if mean is None else value_text(mean, "shares")
    kind = run["tasks"].get(section, {"kind": "hits"})["kind"]
    found = score_of(run, section, setting, condition)
    return estimate(estimate_text(found, kind), strong=condition == "on")
