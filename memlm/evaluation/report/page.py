"""The page as a whole: summary, sections, comparisons, how to repeat it."""

from itertools import groupby
from typing import Any

from memlm.evaluation.report.groups import group_body
from memlm.evaluation.report.html import Pictures, details, estimate, table, text
from memlm.evaluation.report.numbers import MISSING, estimate_text, setting_text
from memlm.evaluation.report.overview import heading_of, overview
from memlm.evaluation.report.shape import (
    Runs,
    is_group,
    name_of,
    sections,
    task_of,
)
from memlm.evaluation.report.style import PAGE
from memlm.evaluation.report.tasks import task_body


def render_report(results: dict[str, Any], light: Pictures, dark: Pictures) -> str:
    """One HTML page without external assets; `light` and `dark` are PNGs by file name."""
    runs = results["runs"]
    title = _title(runs)
    found = [(section, heading_of(runs, section), tasks) for section, tasks in sections(runs)]
    links = [(section, heading) for section, heading, _ in found]
    if results["comparisons"]:
        links.append(("comparisons", "Comparisons"))
    links.append(("repeat", "How to repeat it"))
    anchors = "".join(f'<a href="#{text(key)}">{text(name)}</a>' for key, name in links)
    body = [
        f"<h1>{text(title)}</h1>",
        f"<nav>{anchors}</nav>",
        overview(results, light, dark),
    ]
    for section, heading, tasks in found:
        body.append(f'<h2 id="{text(section)}">{text(heading)}</h2>')
        if is_group(section):
            body.append(group_body(runs, section, tasks, light, dark))
        else:
            body.append(task_body(runs, section, light, dark))
    body += [_comparisons(results), _repeat(results)]
    return PAGE.format(title=text(title), body="\n".join(part for part in body if part))


def _title(runs: Runs) -> str:
    names = [name_of(run) for run in runs]
    if len(names) > 3:
        return f"Recall of {len(names)} models"
    return "Recall of " + (f"{', '.join(names[:-1])} and {names[-1]}" if names[1:] else names[0])


def _comparisons(results: dict[str, Any]) -> str:
    found = results["comparisons"]
    if not found:
        return ""
    runs = results["runs"]
    parts = [
        '<h2 id="comparisons">Comparisons between models</h2>',
        "<p>First − second, memory on, in percentage points or in the unit of the loss (where "
        "lower is better). <b>Bold</b>: the interval excludes 0. Paired: both read the same "
        "prompts, and the interval is a bootstrap over them; otherwise their tokenizers differ, "
        "and it is one for independent trials. Only first, only second: trials in which only "
        "that one was right (for partial scores and losses: did better).</p>",
    ]
    pairs = groupby(found, key=lambda one: (one["first"], one["second"]))
    for (first, second), comparisons in pairs:
        rows = []
        for one in comparisons:
            task = task_of(runs, one["task"])
            rows.append(
                [
                    text(one["task"]),
                    text(setting_text(one["setting"], task["axis"])),
                    _difference(one["difference"], task["kind"]),
                    str(one["difference"]["count"]),
                    str(one["first_only"]),
                    str(one["second_only"]),
                    "yes" if one["paired"] else "no",
                ]
            )
        header = ["task", "at", "difference", "trials", "only first", "only second", "paired"]
        parts.append(f"<h3>{text(first)} − {text(second)}</h3>" + table(header, rows))
    return "\n".join(parts)


def _difference(difference: dict[str, Any], kind: str) -> str:
    low, high = difference["low"], difference["high"]
    clear = low is not None and high is not None and (low > 0 or high < 0)
    return estimate(estimate_text(difference, kind, signed=True), strong=clear)


def _repeat(results: dict[str, Any]) -> str:
    parts = ['<h2 id="repeat">How to repeat it</h2>']
    if results["command"]:
        parts.append(f"<pre>{text(results['command'])}</pre>")
    parts.append(
        "<p>Every prompt follows from the seed, the task, the length and its number; the config "
        "and the answers are in results.json and in the records beside it.</p>"
    )
    rows = [
        [
            text(name_of(run)),
            text(run["model"]["source"] or "made in memory"),
            text(run["model"].get("device") or MISSING),
            f"<code>{text(run['model']['fingerprint'])}</code>",
        ]
        for run in results["runs"]
    ]
    header = ["model", "source", "device", "hash of its weights"]
    parts.append(table(header, rows, texts=4))
    versions = ", ".join(f"{key} {value}" for key, value in results["versions"].items())
    parts.append(f'<p class="dim">{text(versions)}</p>')
    if results["hashes"]:
        rows = [
            [text(path), f"<code>{text(found)}</code>"] for path, found in results["hashes"].items()
        ]
        parts.append(details("Files read", table(["file", "SHA-256"], rows, texts=2, free=True)))
    return "\n".join(parts)
