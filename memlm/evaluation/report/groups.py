"""The section of a group of tasks: RULER, BABILong and others."""

from typing import Any

from memlm.evaluation.report.html import Pictures, details, grouped_table, picture, table, text
from memlm.evaluation.report.numbers import MISSING, count_text, setting_text, value_text
from memlm.evaluation.report.shape import (
    PROMPT_CONDITIONS,
    Runs,
    mean_score,
    name_of,
    score_of,
    settings_of,
    task_of,
)
from memlm.evaluation.report.tasks import task_body
from memlm.evaluation.report.terminal import effective_text

TITLES = {
    "ruler": "RULER",
    "babilong": "BABILong",
    "stories": "Stories",
    "scbench": "SCBench",
    "chomsky": "Chomsky hierarchy",
    "recall_completion": "Recall by completion",
    "longbench": "LongBench",
}


def group_body(runs: Runs, group: str, tasks: list[str], light: Pictures, dark: Pictures) -> str:
    """Everything about a group below its heading; its tasks are folded."""
    title = TITLES[group]
    own = [run for run in runs if any(task in run["tasks"] for task in tasks)]
    tables = "".join(
        f"<div><h3>{text(name_of(run))}</h3>{_scores(run, tasks)}</div>" for run in own
    )
    parts = [
        f"<p>{count_text(len(tasks), 'task')}; scores in %, memory on. Intervals stand with each "
        "task.</p>",
        f'<div class="row">{tables}</div>',
    ]
    if group == "ruler":
        parts.append(_averages(own))
    parts.append(picture(f"{group}_tasks.png", f"{title}: scores by task and length", light, dark))
    parts.append(picture(f"{group}_curves.png", f"{title}: every task by length", light, dark))
    for number, run in enumerate(runs, start=1):
        label = f"{title}: scores of {name_of(run)} by depth"
        parts.append(picture(f"{group}_depths_{number}.png", label, light, dark))
    for task in tasks:
        title = task_of(runs, task)["title"]
        heading = title if task in title else f"{task}: {title}"
        parts.append(details(text(heading), task_body(runs, task, light, dark)))
    return "\n".join(part for part in parts if part)


def _scores(run: dict[str, Any], tasks: list[str]) -> str:
    tasks = [task for task in tasks if task in run["tasks"]]
    settings = settings_of([run], *tasks)
    axis = task_of([run], tasks[0])["axis"]
    rows = [
        [text(task), *(_number(score_of(run, task, setting, "on")) for setting in settings)]
        for task in tasks
    ]
    means = [mean_score(run, tasks, setting, "on") for setting in settings]
    rows.append(
        [
            f"<b>mean of {count_text(len(tasks), 'task')}</b>",
            *(
                MISSING if mean is None else f"<b>{value_text(mean, 'shares')}</b>"
                for mean in means
            ),
        ]
    )
    return table(["task", *(text(setting_text(setting, axis)) for setting in settings)], rows)


def _number(estimate: dict[str, Any] | None) -> str:
    return MISSING if estimate is None else value_text(estimate["value"], "shares")


def _averages(runs: Runs) -> str:
    groups = [
        (
            text(name_of(run)),
            [
                [
                    condition if condition in PROMPT_CONDITIONS else f"memory {condition}",
                    *(
                        value_text(found[key], "shares")
                        for key in ("average", "increasing", "decreasing")
                    ),
                    effective_text(found),
                ]
                for condition, found in run["ruler"].items()
            ],
        )
        for run in runs
        if run.get("ruler")
    ]
    if not groups:
        return '<p class="dim">RULER\'s own averages need all 13 tasks at the same lengths.</p>'
    header = ["model", "condition", "average", "wAvg (inc)", "wAvg (dec)", "effective length"]
    return (
        "<p>Averages over the lengths as RULER defines them: unweighted, and with weights that "
        "increase or decrease with the length. The effective length is the longest one whose mean "
        "exceeds 85.6 %.</p>" + grouped_table(header, groups, texts=2)
    )
