"""The worst answers, with the text around what was to be found."""

import re
from typing import Any

from memlm.evaluation.report.html import details, inline, table, text
from memlm.evaluation.report.numbers import setting_text, unit_of

_SHOWN = 1  # before a reader asks for more


def failures(task: dict[str, Any], name: str) -> str:
    """The failures of one model in one task; nothing where there are none."""
    # Without an answer in words or a text around it there is nothing to look at.
    found = [one for one in task["failures"] if one["answers"] or one["excerpt"]]
    if not found:
        return ""
    blocks = [_failure(task, failure) for failure in found]
    shown, rest = blocks[:_SHOWN], blocks[_SHOWN:]
    more = details(f"{len(rest)} more", "".join(rest)) if rest else ""
    return f"<h4>Worst answers of {text(name)}, memory on</h4>{''.join(shown)}{more}"


def _failure(task: dict[str, Any], failure: dict[str, Any]) -> str:
    axis = task["axis"]
    place = f"{setting_text(failure['setting'], axis)} {unit_of(axis)}"
    labels = "".join(
        f"; {inline(key)} {inline(_rounded(value))}" for key, value in failure["labels"].items()
    )
    head = (
        f'<p class="dim">{text(place)}, trial {failure["trial"]}: '
        f"score {100 * failure['score']:.0f} %{labels}</p>"
    )
    references = [reference for answer in failure["answers"] for reference in answer["references"]]
    excerpt = ""
    if failure["excerpt"]:
        excerpt = f"<pre>{mark(failure['excerpt'], references)}</pre>"
    answers = ""
    if failure["answers"]:
        rows = [
            [
                ", ".join(_code(reference) for reference in answer["references"]),
                _code(answer["prediction"]) if answer["prediction"] else "nothing",
                f"{100 * answer['score']:.0f}",
            ]
            for answer in failure["answers"]
        ]
        answers = table(["expected", "answered", "score (%)"], rows, texts=2, free=True)
    return head + excerpt + answers


def _code(value: str) -> str:
    return f"<code>{inline(value)}</code>"


def mark(excerpt: str, references: list[str]) -> str:
    """The excerpt as HTML with every whole occurrence of a reference marked, in any case."""
    # The longest first: "12345" before "123".
    wanted = sorted({reference for reference in references if reference.strip()}, key=len)[::-1]
    if not wanted:
        return text(excerpt)
    pattern = "|".join(re.escape(reference) for reference in wanted)
    found, end = [], 0
    for match in re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", excerpt, re.IGNORECASE):
        found.append(f"{text(excerpt[end : match.start()])}<mark>{text(match[0])}</mark>")
        end = match.end()
    return "".join(found) + text(excerpt[end:])


def _rounded(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value
