"""From records to the numbers of a report: scores with intervals, gains, costs, failures."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from memlm.evaluation.config import ALL_CONDITIONS
from memlm.evaluation.ledger import Done
from memlm.evaluation.statistics import (
    Estimate,
    estimate,
    paired_difference,
    paired_proportions,
    wilson,
)
from memlm.evaluation.tasks.base import Record, Task

_FAILURES = 12  # shown of a task


def summarise(task: Task, done: Sequence[Done]) -> dict[str, Any]:
    """All numbers of one task and one model.

    Returns:
        {"title", "description", "metric", "axis", "kind", "scores": {setting: {condition:
        Estimate}}, "memory_gain": {setting: {condition: Estimate of how much better `on` is than
        the condition on the same prompts}}, "by_memory": {setting: Estimate of the share of trials
        that are right with the memory on and wrong with it off}, "depths": {setting: {depth:
        {condition: Estimate}}}, "cost": {setting: {...}}, "failures": [...]}, and what the
        task itself adds.
    """
    by_setting: dict[str, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for batch in done:
        for record in batch.records:
            by_setting[record.setting][record.condition][record.trial] = record
    labels = [label for label in task.labels() if label in by_setting]
    found: dict[str, Any] = {
        "title": task.title,
        "description": task.description,
        "metric": task.metric,
        "axis": task.axis,
        "kind": task.kind,
        "scores": {},
        "memory_gain": {},
        "by_memory": {},
        "depths": {},
    }
    for label in labels:
        conditions = by_setting[label]
        names = [name for name in ALL_CONDITIONS if name in conditions]
        values = {
            name: {trial: record.score for trial, record in conditions[name].items()}
            for name in names
        }
        found["scores"][label] = {
            name: estimate(list(scores.values()), task.kind) for name, scores in values.items()
        }
        found["memory_gain"][label] = {
            name: gain(values["on"], scores, task.kind)
            for name, scores in values.items()
            if name != "on"
        }
        if "off" in values and task.kind != "losses":
            found["by_memory"][label] = recalled_by_memory(values["on"], values["off"])
        depths = _by_depth(conditions, task.kind)
        if depths:
            found["depths"][label] = depths
    found["cost"] = costs(done)
    records = [record for batch in done for record in batch.records]
    found["failures"] = failures(records) if task.kind != "losses" else []
    return found | task.details(records)


def gain(first: dict[int, float], second: dict[int, float], kind: str) -> Estimate:
    """How much better `first` is than `second`, paired by trial; losses are better when lower."""
    both = sorted(first.keys() & second.keys())
    a, b = [first[trial] for trial in both], [second[trial] for trial in both]
    if kind == "hits":
        return paired_proportions([value > 0 for value in a], [value > 0 for value in b])
    if kind == "losses":
        a, b = b, a
    return paired_difference(a, b, kind)


def recalled_by_memory(on: dict[int, float], off: dict[int, float]) -> Estimate:
    """The share of trials that are right with the memory and not without it.

    For partial scores, the part that is right only with the memory.
    """
    both = sorted(on.keys() & off.keys())
    return wilson(sum(max(on[trial] - off[trial], 0.0) for trial in both), len(both))


def _by_depth(
    conditions: dict[str, dict[int, Record]], kind: str
) -> dict[str, dict[str, Estimate]]:
    """Scores by the label "depth" of the trials, where they have one."""
    values: dict[float, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for condition, records in conditions.items():
        for record in records.values():
            if "depth" in record.labels:
                values[record.labels["depth"]][condition].append(record.score)
    return {
        str(depth): {name: estimate(scores, kind) for name, scores in values[depth].items()}
        for depth in sorted(values)
    }


def costs(done: Iterable[Done]) -> dict[str, dict[str, Any]]:
    """Cost of every setting: bytes, tokens and seconds, peak memory."""
    found: dict[str, dict[str, Any]] = {}
    for batch in done:
        mine = found.setdefault(
            batch.batch.setting,
            {"tokens": {}, "seconds": {}, "state_bytes": 0, "peak_memory_bytes": None},
        )
        spent = batch.costs
        for key in ("tokens", "seconds"):
            for kind, value in spent[key].items():
                mine[key][kind] = mine[key].get(kind, 0) + value
        if spent["state_bytes"] >= mine["state_bytes"]:
            for key in ("state_bytes", "memory_state_bytes", "key_value_bytes"):
                mine[key] = spent[key]
        if spent["peak_memory_bytes"] is not None:
            mine["peak_memory_bytes"] = max(
                mine["peak_memory_bytes"] or 0, spent["peak_memory_bytes"]
            )
    for mine in found.values():
        for kind, tokens in mine["tokens"].items():
            mine[f"{kind}_tokens_per_second"] = round(tokens / max(mine["seconds"][kind], 1e-9), 1)
    return found


def failures(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The worst answers with the memory on, at the greatest lengths first."""
    missed = [record for record in records if record.condition == "on" and record.score < 1]
    missed.sort(key=lambda record: (record.score, -record.tokens, record.trial))
    return [
        {
            "setting": record.setting,
            "trial": record.trial,
            "score": record.score,
            "answers": [answer for answer in record.answers if answer["score"] < 1][:4],
            "labels": record.labels,
            "excerpt": record.excerpt,
        }
        for record in missed[:_FAILURES]
    ]
