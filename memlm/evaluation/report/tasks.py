"""The section of one task: scores, what the memory gives, controls, cost, failures."""

from typing import Any

from memlm.evaluation.report.failures import failures
from memlm.evaluation.report.html import Pictures, estimate, grouped_table, picture, text
from memlm.evaluation.report.numbers import (
    bytes_text,
    estimate_text,
    rate_text,
    seconds_text,
    setting_text,
)
from memlm.evaluation.report.shape import (
    PROMPT_CONDITIONS,
    Runs,
    conditions_of,
    name_of,
    settings_of,
    task_of,
)

_RATES = {"read": "read", "generate": "generated", "answer": "answered", "score": "scored"}


def task_body(runs: Runs, name: str, light: Pictures, dark: Pictures) -> str:
    """Everything about a task below its heading."""
    task = task_of(runs, name)
    own = [run for run in runs if name in run["tasks"]]
    parts = [f"<p>{text(task['description'])} {_intervals(task['kind'])}</p>"]
    parts.append(_facts(own, name))
    parts.append(f"<h3>Scores</h3>{_scores(own, name)}")
    for kind in ("curves", "losses"):
        parts.append(picture(f"{name}_{kind}.png", f"{task['title']}: {kind}", light, dark))
    for number, run in enumerate(runs, start=1):
        label = f"{task['title']}: scores of {name_of(run)} by depth"
        parts.append(picture(f"{name}_depths_{number}.png", label, light, dark))
    parts += [_gains(own, name), _controls(own, name), _costs(own, name)]
    worst = "".join(failures(run["tasks"][name], name_of(run)) for run in own)
    if worst:
        parts.append(f"<h3>Failures</h3>{worst}")
    return "\n".join(part for part in parts if part)


def _intervals(kind: str) -> str:
    return {
        "hits": "Small figures: Wilson intervals over trials.",
        "shares": "Small figures: Wilson intervals that count trials, not questions.",
        "losses": "Small figures: bootstrap intervals over documents; lower is better.",
    }[kind]


def _facts(runs: Runs, name: str) -> str:
    """Further numbers that a task gives; models that agree share a line."""
    lines: dict[str, list[str]] = {}
    for run in runs:
        lines.setdefault(_details(run["tasks"][name]), []).append(text(name_of(run)))
    if len(lines) == 1:
        return "".join(f'<p class="dim">{line}</p>' for line in lines if line)
    return "".join(
        f'<p class="dim">{", ".join(names)}: {line}</p>' for line, names in lines.items() if line
    )


def _details(task: dict[str, Any]) -> str:
    found = []
    if "least_distance_tokens" in task:
        found.append(f"at least {task['least_distance_tokens']:,} tokens before the question")
    if "chance" in task:
        found.append(f"a guess is right in {100 * task['chance']:.3g} %")
    if "row_tokens" in task:
        found.append(f"rows of {task['row_tokens']:,} tokens")
    if "vocabulary" in task:
        found.append(f"{task['vocabulary']:,} different tokens")
    if "stale_answers" in task:
        found.append(
            f"an overwritten value is answered in {100 * task['stale_answers']:.1f} % of the "
            "questions about one"
        )
    if "documents" in task:
        found.append(
            f"{task['documents']} documents, {task['tokens']:,} tokens, in segments of "
            f"{task['segment']}"
        )
    for setting, conditions in task.get("turns", {}).items():
        values = ", ".join(f"{100 * turn['value']:.1f}" for turn in conditions["on"].values())
        found.append(f"{setting_text(setting, task['axis'])}, by turn: {values} %")
    if "perplexity_per_token" in task:
        values = ", ".join(
            f"{key} {'?' if value is None else f'{value:.2f}'}"
            for key, value in task["perplexity_per_token"].items()
        )
        found.append(f"perplexity per token: {values}")
    return f"{'; '.join(found)}." if found else ""


def by_setting(runs: Runs, name: str, columns: list[str], cells: Any) -> str:
    """A table by setting and, where there are several, by model.

    Args:
        runs: those that have the task.
        name: of the task.
        columns: headings of the values.
        cells: function (task of a run, setting) -> one cell per column, or None for no row.
    """
    axis = task_of(runs, name)["axis"]
    groups = []
    for setting in settings_of(runs, name):
        rows = []
        for run in runs:
            found = cells(run["tasks"][name], setting)
            if found is not None:
                rows.append([text(name_of(run)), *found] if len(runs) > 1 else found)
        if rows:
            groups.append((text(setting_text(setting, axis)), rows))
    if not groups:
        return ""
    models = ["model"] if len(runs) > 1 else []
    return grouped_table([text(axis), *models, *columns], groups, texts=1 + len(models))


def _scores(runs: Runs, name: str) -> str:
    conditions, task = conditions_of(runs, name), task_of(runs, name)

    def cells(task: dict[str, Any], setting: str) -> list[str] | None:
        scores = task["scores"].get(setting)
        if scores is None:
            return None
        return [
            estimate(estimate_text(scores.get(one), task["kind"]), strong=one == "on")
            for one in conditions
        ]

    return f"<p>{text(task['metric'])}:</p>" + by_setting(runs, name, conditions, cells)


def _gains(runs: Runs, name: str) -> str:
    task = task_of(runs, name)
    others = [
        one for one in conditions_of(runs, name) if one != "on" and one not in PROMPT_CONDITIONS
    ]
    if not others:
        return "<p>No model was measured with its memory taken away.</p>"
    shares = task["kind"] != "losses"

    def cells(task: dict[str, Any], setting: str) -> list[str] | None:
        gains = task["memory_gain"].get(setting, {})
        found = [
            estimate(estimate_text(gains.get(one), task["kind"], signed=True)) for one in others
        ]
        if shares:
            mine = task["by_memory"].get(setting)
            found.insert(0, estimate(estimate_text(mine, "shares"), strong=True))
        # A model without a memory has no row.
        return found if any(one in gains for one in others) else None

    unit = "percentage points" if shares else text(task["metric"])
    explained = (
        f"How much better the memory on is than each condition on the same prompts, {unit}; "
        "positive: the memory helps."
    )
    if shares:
        explained = (
            "<b>Recalled by the memory</b> (%): right with the memory on and wrong with it off. "
            + explained
        )
    columns = [f"on − {one}" if shares else f"{one} − on" for one in others]
    first = ["recalled by the memory"] if shares else []
    return f"<h3>What the memory gives</h3><p>{explained}</p>" + by_setting(
        runs, name, first + columns, cells
    )


def _controls(runs: Runs, name: str) -> str:
    found = [one for one in conditions_of(runs, name) if one in PROMPT_CONDITIONS]
    if not found:
        return ""
    explained = {
        "changed": "<b>changed</b>: another value stands in the same place, and the answer has to "
        "be that value; a model that reads reaches the score of on.",
        "absent": "<b>absent</b>: nothing is hidden; the answer of on should not come, so a score "
        "well above 0 means that it can be guessed or is known beforehand.",
    }

    def cells(task: dict[str, Any], setting: str) -> list[str] | None:
        scores = task["scores"].get(setting)
        if scores is None:
            return None
        return [estimate(estimate_text(scores.get(one), task["kind"])) for one in ("on", *found)]

    text_ = " ".join(explained[one] for one in found)
    return f"<h3>What changing the prompt does</h3><p>{text_}</p>" + by_setting(
        runs, name, ["on", *found], cells
    )


def _costs(runs: Runs, name: str) -> str:
    kinds = [
        kind
        for kind in _RATES
        if any(
            kind in cost["tokens"] for run in runs for cost in run["tasks"][name]["cost"].values()
        )
    ]

    def cells(task: dict[str, Any], setting: str) -> list[str] | None:
        cost = task["cost"].get(setting)
        if cost is None:
            return None
        return [
            *(rate_text(cost.get(f"{kind}_tokens_per_second")) for kind in kinds),
            *(
                bytes_text(cost.get(key))
                for key in (
                    "state_bytes", "memory_state_bytes", "key_value_bytes", "peak_memory_bytes",
                )
            ),
        ]  # fmt: skip

    columns = [
        *(f"{_RATES[kind]}<br><small>tokens/s</small>" for kind in kinds),
        "state of a row",
        "of it memory",
        "of it keys/values",
        "peak memory",
    ]
    spent = ", ".join(
        (f"{text(name_of(run))} " if len(runs) > 1 else "")
        + seconds_text(run["tasks"][name]["seconds"])
        for run in runs
    )
    return (
        f"<h3>Cost</h3>{by_setting(runs, name, columns, cells)}"
        f'<p class="dim">Time in all: {spent}.</p>'
    )
