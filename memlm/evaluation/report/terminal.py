"""The table that an evaluation prints."""

from typing import Any

from memlm.evaluation.report.numbers import (
    MISSING,
    estimate_text,
    setting_text,
    unit_of,
    value_text,
)
from memlm.evaluation.report.shape import conditions_of, name_of, settings_of, task_names, task_of

_AVERAGES = {
    "average": "mean of all lengths",
    "increasing": "weighted, increasing",
    "decreasing": "weighted, decreasing",
}


def format_table(results: dict[str, Any]) -> str:
    """The scores of all models and tasks by condition as one table of plain text.

    Losses without the memory are given as their paired difference to the memory on. RULER's
    averages follow where all its tasks were run.
    """
    runs = results["runs"]
    names = task_names(runs)
    conditions = conditions_of(runs, *names)
    rows = [["model", "task", "setting", *conditions]]
    for name in names:
        axis, metric = task_of(runs, name)["axis"], task_of(runs, name)["metric"]
        for setting in settings_of(runs, name):
            for run in runs:
                if setting in run["tasks"].get(name, {"scores": {}})["scores"]:
                    place = f"{setting_text(setting, axis)} {unit_of(axis)}"
                    cells = [_cell(run["tasks"][name], setting, one) for one in conditions]
                    rows.append([name_of(run), f"{name}, {metric}", place, *cells])
    for run in runs:
        rows += _ruler_rows(run, conditions)
    if len(runs) == 1:
        rows = [row[1:] for row in rows]
    lines = _align(rows, texts=len(rows[0]) - len(conditions))
    share = f"{100 * results['confidence']:.0f} %"
    lines.append(f"Brackets: {share} intervals; losses with a sign: paired difference to `on`.")
    for run in runs:
        start = f"{name_of(run)}: " if len(runs) > 1 else ""
        lines += [start + note for note in run["notes"]]
        if run.get("ruler"):
            lines.append(f"{start}RULER: effective length {effective_text(run['ruler']['on'])}")
    return "\n".join(lines)


def effective_text(averages: dict[str, Any]) -> str:
    """RULER's effective length."""
    found = averages["effective_length"]
    if found is None:
        return f"below {setting_text(next(iter(averages['means'])), 'tokens')} tokens"
    return f"{setting_text(str(found), 'tokens')} tokens"


def _cell(task: dict[str, Any], setting: str, condition: str) -> str:
    if task["kind"] == "losses" and condition != "on":
        found = task["memory_gain"].get(setting, {}).get(condition)
        return " ".join(estimate_text(found, "losses", signed=True)).rstrip()
    return " ".join(estimate_text(task["scores"][setting].get(condition), task["kind"])).rstrip()


def _ruler_rows(run: dict[str, Any], conditions: list[str]) -> list[list[str]]:
    averages = run.get("ruler")
    if not averages:
        return []
    rows = {
        f"{setting_text(length, 'tokens')} tokens": [
            averages[one]["means"][length] if one in averages else None for one in conditions
        ]
        for length in averages["on"]["means"]
    }
    for key, text in _AVERAGES.items():
        rows[text] = [averages[one][key] if one in averages else None for one in conditions]
    return [
        [
            name_of(run),
            "RULER, mean of 13 tasks (%)",
            text,
            *(MISSING if value is None else value_text(value, "shares") for value in values),
        ]
        for text, values in rows.items()
    ]


def _align(rows: list[list[str]], texts: int) -> list[str]:
    """Lines with the first `texts` columns to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:texts], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[texts:], widths[texts:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return lines
