"""The pictures of a report, as PNG bytes."""

from typing import Any

from memlm.evaluation.plots.curves import draw_group, draw_losses, draw_recall
from memlm.evaluation.plots.frontier import draw_costs, draw_frontier
from memlm.evaluation.plots.heatmaps import draw_depths, draw_group_depths, draw_tasks
from memlm.evaluation.plots.style import styled
from memlm.evaluation.plots.surprise import draw_surprise
from memlm.evaluation.report.shape import is_group, sections, task_of

__all__ = ["draw_plots", "draw_surprise"]


def draw_plots(results: dict[str, Any], dark: bool = False) -> dict[str, bytes]:
    """File name -> PNG of every plot that the runs of `results` have.

    `frontier.png` and `cost.png` are about all tasks; the others start with the name of a task or
    of a group and end with _curves, _losses, _tasks or, for each run that has depths, _depths_1.
    """
    runs, confidence = results["runs"], results["confidence"]
    found: dict[str, bytes | None] = {}
    with styled(dark):
        found["frontier.png"] = draw_frontier(runs, confidence)
        found["cost.png"] = draw_costs(runs)
        for section, tasks in sections(runs):
            if is_group(section):
                found[f"{section}_curves.png"] = draw_group(runs, tasks, confidence)
                found[f"{section}_tasks.png"] = draw_tasks(runs, tasks)
                for number, run in enumerate(runs, start=1):
                    found[f"{section}_depths_{number}.png"] = draw_group_depths(run, tasks)
            elif task_of(runs, section)["kind"] == "losses":
                found[f"{section}_losses.png"] = draw_losses(runs, section, confidence)
            else:
                found[f"{section}_curves.png"] = draw_recall(runs, section, confidence)
                for number, run in enumerate(runs, start=1):
                    found[f"{section}_depths_{number}.png"] = draw_depths(run, section)
    return {name: image for name, image in found.items() if image is not None}
