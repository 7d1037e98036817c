"""What people read: the table in the terminal and the one-page HTML report."""

import base64
from html import escape
from typing import Any

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --text: #1c1e21; --back: #ffffff; --line: #d5d8dc; --soft: #f3f4f6; --dim: #5c636b; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e8e6e3; --back: #16181c; --line: #3a3e45; --soft: #22252b; --dim: #a3a9b2; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 60rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0.5rem 0; }}
h2 {{ font-size: 1.2rem; margin: 2rem 0 0.5rem; }}
p, li {{ max-width: 46rem; }}
.dim {{ color: var(--dim); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }}
th, td {{ padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
td small {{ color: var(--dim); }}
img {{ width: 100%; min-width: 34rem; height: auto; display: block; margin: 0.7rem 0; }}
pre {{ background: var(--soft); padding: 0.7rem; overflow-x: auto; border-radius: 4px; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

TASK_TITLES = {
    "needle": "Needle in real text",
    "mqar": "Multi-query associative recall",
    "perplexity": "Held-out text",
}
TASK_PLOTS = {
    "needle": ("needle_heatmap.png", "needle_recall.png"),
    "mqar": ("mqar_accuracy.png",),
    "perplexity": ("perplexity_by_position.png",),
}
CONDITION_TEXT = {
    "on": "the memory works as trained",
    "off": "every memory branch gives zero, from the first token on",
    "reset": "the memory is emptied between context and question (on held-out text: before every "
    "segment); attention keeps what it holds",
    "swapped": "the memory of another document stands in its place",
    "zeroed": "the values of the learned table count as zero",
}
COST_TEXT = {
    "read_tokens_per_second": ("context read", "tokens/s"),
    "generate_tokens_per_second": ("answers generated", "tokens/s"),
    "answer_tokens_per_second": ("questions answered", "tokens/s"),
    "score_tokens_per_second": ("text scored", "tokens/s"),
    "state_bytes": ("all states of a row", "bytes"),
    "memory_state_bytes": ("memory states of a row", "bytes"),
}


def _is_share(task: dict[str, Any]) -> bool:
    return task["metric"].endswith("(%)")


def _number(task: dict[str, Any], value: float | None, signed: bool = False) -> str:
    if value is None:
        return "?"
    sign = "+" if signed else ""
    if _is_share(task):
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.3f}"


def _cell(task: dict[str, Any], estimate: dict[str, Any], signed: bool = False) -> tuple[str, str]:
    """Value and interval."""
    value, low, high = (_number(task, estimate[key], signed) for key in ("value", "low", "high"))
    return value, f"[{low}, {high}]"


def format_table(results: dict[str, Any]) -> str:
    """The scores of all tasks by condition as one table of plain text.

    Losses without the memory are given as their paired difference to the memory on.
    """
    conditions = results["conditions"]
    rows = [["task", "setting", *conditions]]
    for name, task in results["tasks"].items():
        for setting, scores in task["scores"].items():
            cells = []
            for condition in conditions:
                if _is_share(task) or condition == "on":
                    cells.append(" ".join(_cell(task, scores[condition])))
                else:
                    gain = task["memory_gain"][setting][condition]
                    cells.append(" ".join(_cell(task, gain, signed=True)))
            rows.append([f"{name}, {task['metric']}", f"{setting} {_unit(task)}", *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    lines.append("Brackets: 95 % intervals; losses with a sign: paired difference to `on`.")
    return "\n".join(lines + results["notes"])


def _unit(task: dict[str, Any]) -> str:
    axis = task["axis"]
    return axis.split("(")[1].rstrip(")") if "(" in axis else axis.rsplit(" ", 1)[-1]


def render_report(results: dict[str, Any], light: dict[str, bytes], dark: dict[str, bytes]) -> str:
    """One HTML page without external assets; `light` and `dark` are PNGs by file name."""
    model = results["model"]
    title = f"Recall of {model['name']}"
    reach = model["attention_reach_tokens"]
    reaches = "everything" if reach is None else f"{reach} tokens back"
    listed = "".join(
        f"<li><b>{name}</b>: {CONDITION_TEXT[name]}.</li>" for name in results["conditions"]
    )
    body = [
        f'<p class="dim">{model["parameters"]:,} parameters; attention reaches {reaches}; '
        f"{results['seconds']:.0f} s in all.</p>",
        "<p>Every number is measured in several conditions of the memory, on the same text:</p>",
        f"<ul>{listed}</ul>",
    ]
    body += [f"<p><b>Note.</b> {escape(note)}</p>" for note in results["notes"]]
    for name, task in results["tasks"].items():
        body.append(f"<h2>{TASK_TITLES[name]}</h2>")
        body.append(f"<p>{escape(_explain(name, task))}</p>")
        body.append(_scores(task, results["conditions"]))
        body += [_picture(plot, name, light, dark) for plot in TASK_PLOTS[name]]
        body.append("<h3>What the memory gives</h3>" + _gains(task, results["conditions"]))
        body.append(_costs(task))
    body.append("<h2>How to repeat it</h2>")
    if results["command"]:
        body.append(f"<pre>{escape(results['command'])}</pre>")
    versions = ", ".join(f"{key} {value}" for key, value in results["versions"].items())
    body.append(f'<p class="dim">{escape(versions)}</p>')
    return PAGE.format(title=escape(title), body="\n".join(body))


def _explain(name: str, task: dict[str, Any]) -> str:
    if name == "needle":
        return (
            "A line with a pass key stands in real text, at least "
            f"{task['least_distance_tokens']} tokens before the question. Its digits are "
            "generated greedily; only an exact match counts. Guessing the digits gives "
            f"{100 * task['chance']:.3g} %. Wilson 95 % intervals."
        )
    if name == "mqar":
        return (
            f"Key-value pairs, then every key again, in rows of {task['row_tokens']} tokens. A "
            "query counts when the most likely next token is its value. Many queries stand close "
            "to the pairs, where attention may answer them without the memory. Wilson 95 % "
            "intervals that count rows, not queries."
        )
    perplexities = ", ".join(
        f"{key} {value:.2f}" for key, value in task["perplexity_per_token"].items()
    )
    return (
        f"{task['documents']} held-out documents, {task['tokens']:,} tokens, in segments of "
        f"{task['segment']} tokens. Bits per byte, mean over documents, bootstrap 95 % "
        f"intervals. Perplexity per token: {perplexities}."
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'


def _scores(task: dict[str, Any], conditions: list[str]) -> str:
    rows = [
        [setting, *(_html(_cell(task, scores[name])) for name in conditions)]
        for setting, scores in task["scores"].items()
    ]
    return f"<p>{task['metric']}:</p>" + _table([task["axis"], *conditions], rows)


def _gains(task: dict[str, Any], conditions: list[str]) -> str:
    others = [name for name in conditions if name != "on"]
    if not others:
        return "<p>The model has no memory to take away.</p>"
    rows = [
        [setting, *(_html(_cell(task, found[name], signed=True)) for name in others)]
        for setting, found in task["memory_gain"].items()
    ]
    unit = "percentage points" if _is_share(task) else task["metric"]
    explained = (
        f"<p>How much better the memory on is than each condition on the same prompts, {unit}; "
        "positive = the memory helps.</p>"
    )
    return explained + _table([task["axis"], *others], rows)


def _html(cell: tuple[str, str]) -> str:
    return f"{cell[0]} <small>{cell[1]}</small>"


def _costs(task: dict[str, Any]) -> str:
    parts = [
        f"{COST_TEXT[key][0]} {value:,.0f} {COST_TEXT[key][1]}"
        for key, value in task["cost"].items()
    ]
    parts.append(f"{task['seconds']:.1f} s")
    return f'<p class="dim">{"; ".join(parts)}</p>'


def _picture(plot: str, task: str, light: dict[str, bytes], dark: dict[str, bytes]) -> str:
    source, night = (
        "data:image/png;base64," + base64.b64encode(images[plot]).decode()
        for images in (light, dark)
    )
    label = f"{TASK_TITLES[task]}: {plot.removesuffix('.png').replace('_', ' ')}"
    return (
        f'<div class="wide"><picture><source media="(prefers-color-scheme: dark)" srcset="{night}">'
        f'<img src="{source}" alt="{label}"></picture></div>'
    )
