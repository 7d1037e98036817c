"""Cost: recall against the bytes of the state, time and memory over the length."""

from collections import defaultdict
from typing import Any

from memlm.evaluation.plots.style import (
    GREY,
    Places,
    colour,
    error_bars,
    legend,
    line,
    marker,
    new_figure,
    png,
    shorten,
)
from memlm.evaluation.report.numbers import bytes_text, setting_text
from memlm.evaluation.report.shape import (
    Runs,
    in_order,
    mean_score,
    name_of,
    score_of,
    shared_settings,
    task_names,
    task_of,
)

_MOST_PANELS = 3


def draw_frontier(runs: Runs, confidence: float) -> bytes | None:
    """Recall of all models against the bytes of their states at some lengths.

    A score is the mean of all tasks that every model has at that setting; the line joins the
    models that no other one beats in both.
    """
    panels = _panels(runs)
    if not panels:
        return None
    figure, axes = new_figure(4.0 * len(panels) + (2.5 if len(panels) == 1 else 0), 4.0, 1,
                              len(panels), sharey=True)  # fmt: skip
    for axis, (title, setting, tasks) in zip(axes, panels, strict=True):
        points = []
        for number, run in enumerate(runs):
            place = max(1, *(state_bytes(run, task, setting) for task in tasks), 0)
            score = mean_score(run, tasks, setting, "on")
            points.append((place, 100 * score))
            bars = None
            if len(tasks) == 1:
                bars = error_bars([score_of(run, tasks[0], setting, "on")], 100.0)
            axis.errorbar(
                [place],
                [100 * score],
                yerr=bars,
                color=colour(number),
                marker=marker(number),
                markersize=8,
                capsize=2,
                elinewidth=0.9,
                linestyle="none",
                label=shorten(name_of(run)),
                zorder=3,
            )
        edge = frontier(points)
        # To the right edge: more state does not take a score away.
        edge.append((2 * max(place for place, _ in points), edge[-1][1]))
        axis.step(*zip(*edge, strict=True), where="post", color=GREY, linewidth=1.2, zorder=2)
        _byte_axis(axis.xaxis, [place for place, _ in points], most_ticks=4)
        axis.set_xlabel("state of a row")
        axis.set_title(title, size=11)
        axis.set_ylim(-4, 104)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score (%), memory on")
    figure.suptitle("Recall against state", size=12)
    legend(figure, axes[:1])
    return png(figure)


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, score) those that no other point beats in both, by cost."""
    found: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or score > found[-1][1]:
            found.append((cost, score))
    return found


def _panels(runs: Runs) -> list[tuple[str, str, list[str]]]:
    """(title, setting, tasks that every model has there), a few lengths and the other axes."""
    axes = defaultdict(list)
    for task in task_names(runs):
        found = task_of(runs, task)
        if found["kind"] != "losses" and all(task in run["tasks"] for run in runs):
            axes[found["axis"]].append(task)
    panels = []
    for axis, tasks in axes.items():
        settings = in_order(
            label
            for task in tasks
            for label in shared_settings(runs, task)
            if all(state_bytes(run, task, label) for run in runs)
        )
        most = _MOST_PANELS if len(axes) == 1 else _MOST_PANELS - 1
        for setting in _spread(settings, most if "length" in axis else 1):
            mine = [task for task in tasks if setting in shared_settings(runs, task)]
            what = mine[0] if len(mine) == 1 else f"mean of {len(mine)} tasks"
            panels.append((f"{what}, {setting_text(setting, axis)} {_unit(axis)}", setting, mine))
    return panels[:4]


def _unit(axis: str) -> str:
    return "tokens" if "tokens" in axis else axis.rsplit(" ", 1)[-1]


def _spread(labels: list[str], most: int) -> list[str]:
    """At most `most` of the labels, from the last one down to the first in even steps."""
    if len(labels) <= most:
        return labels
    if most == 1:
        return labels[-1:]
    return [labels[round(place * (len(labels) - 1) / (most - 1))] for place in range(most)]


def state_bytes(run: dict[str, Any], task: str, setting: str) -> int:
    """Of a row at a setting, all states together; 0 where it is unknown."""
    return run["tasks"][task]["cost"].get(setting, {}).get("state_bytes") or 0


def draw_costs(runs: Runs) -> bytes | None:
    """Time per token read, bytes of the states and peak memory over the length, all tasks."""
    tables = [costs_by_length(run) for run in runs]
    lengths = in_order(label for table in tables for label in table)
    if not lengths:
        return None
    places = Places(lengths)
    measures = {
        "seconds_per_token": "time per token read (ms)",
        "state_bytes": "state of a row",
        "peak_memory_bytes": "peak memory",
    }
    measures = {
        key: text
        for key, text in measures.items()
        if any(cost[key] for table in tables for cost in table.values())
    }
    figure, axes = new_figure(4.0 * len(measures), 3.7, 1, len(measures))
    for axis, (key, text) in zip(axes, measures.items(), strict=True):
        factor = 1000 if key == "seconds_per_token" else 1
        seen = []
        for number, (run, table) in enumerate(zip(runs, tables, strict=True)):
            points = [
                (places.at(label), factor * table[label][key])
                for label in lengths
                if label in table and table[label][key]
            ]
            seen += [value for _, value in points]
            axis.plot(
                *(zip(*points, strict=True) if points else ([], [])),
                color=colour(number),
                marker=marker(number),
                linestyle=line(number),
                markersize=5,
                linewidth=1.3,
                label=shorten(name_of(run)),
            )
        places.mark(axis, "length (tokens)")
        if key == "seconds_per_token":
            axis.set_ylim(0, 1.15 * max(seen))
        else:
            _byte_axis(axis.yaxis, seen)
        axis.set_title(text, size=11)
        axis.grid(axis="y", alpha=0.4)
    if len(runs) > 1:
        legend(figure, axes[:1])
    return png(figure)


def costs_by_length(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Cost per length over all tasks whose settings are lengths.

    Returns:
        By setting: {"seconds_per_token" of reading, or None, "state_bytes", "peak_memory_bytes":
        the largest, or None}.
    """
    tokens, seconds = defaultdict(float), defaultdict(float)
    largest: dict[str, dict[str, int]] = defaultdict(dict)
    for task in run["tasks"].values():
        if not task["axis"].startswith("length"):
            continue
        for setting, cost in task["cost"].items():
            tokens[setting] += cost["tokens"].get("read", 0)
            seconds[setting] += cost["seconds"].get("read", 0.0)
            for key in ("state_bytes", "peak_memory_bytes"):
                largest[setting][key] = max(largest[setting].get(key, 0), cost.get(key) or 0)
    return {
        setting: {
            "seconds_per_token": seconds[setting] / tokens[setting] if tokens[setting] else None,
            "state_bytes": largest[setting]["state_bytes"] or None,
            "peak_memory_bytes": largest[setting]["peak_memory_bytes"] or None,
        }
        for setting in in_order(tokens)
    }


def _byte_axis(axis: Any, values: list[float], most_ticks: int = 6) -> None:
    """A logarithmic axis of bytes, twice as far as its values on both sides."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    first, last = min(values) / 2, max(values) * 2
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (first, last)})
    powers = [2**power for power in range(60) if first <= 2**power <= 0.8 * last]
    step = -(-len(powers) // most_ticks)
    axis.set_major_locator(FixedLocator(powers[::step]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: bytes_text(int(value)).replace(".0 ", " "))
    )
