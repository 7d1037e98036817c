"""Pieces of a page. Text goes through `text`; everything else is HTML that is finished."""

import base64
import unicodedata
from collections.abc import Sequence
from html import escape

from memlm.evaluation.report.numbers import MISSING

Pictures = dict[str, bytes]


def text(value: object) -> str:
    """Any text, escaped, with its control characters visible; line breaks and tabs stay."""
    shown = (one if one in "\n\t" else _visible(one) for one in str(value))
    return escape("".join(shown))


def inline(value: object) -> str:
    """As `text`, on one line: line breaks and tabs are written out too."""
    return escape("".join(map(_visible, str(value))))


def _visible(character: str) -> str:
    # Controls, marks of writing direction, halves of surrogate pairs (not even valid UTF-8).
    if unicodedata.category(character) in ("Cc", "Cf", "Cs"):
        return character.encode("unicode_escape").decode()
    return character


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1, free: bool = False
) -> str:
    """A table that scrolls where the page is narrow.

    Args:
        header: of all columns.
        rows: their cells.
        texts: so many columns from the left hold text.
        free: the text, the first column's too, may be long and is broken.
    """
    style = "free" if free else "text"
    lines = "".join(f"<tr>{_cells(row, texts, style, header=not free)}</tr>" for row in rows)
    return f'<div class="wide"><table>{_head(header, texts)}<tbody>{lines}</tbody></table></div>'


def grouped_table(
    header: Sequence[str], groups: Sequence[tuple[str, Sequence[Sequence[str]]]], texts: int = 1
) -> str:
    """A table whose first column holds one name for several rows.

    Args:
        header: of all columns.
        groups: (name, rows without it).
        texts: columns of text, the first one included.
    """
    lines = []
    for name, rows in groups:
        for number, row in enumerate(rows):
            span = f' rowspan="{len(rows)}"' if len(rows) > 1 else ""
            first = f'<th scope="row"{span}>{name}</th>' if number == 0 else ""
            start = ' class="start"' if number == 0 and len(rows) > 1 else ""
            lines.append(f"<tr{start}>{first}{_cells(row, texts - 1, 'text')}</tr>")
    body = "".join(lines)
    return f'<div class="wide"><table>{_head(header, texts)}<tbody>{body}</tbody></table></div>'


def _head(header: Sequence[str], texts: int) -> str:
    cells = "".join(
        f'<th scope="col"{_style(column < texts, "text")}>{cell}</th>'
        for column, cell in enumerate(header)
    )
    return f"<thead><tr>{cells}</tr></thead>"


def _cells(row: Sequence[str], texts: int, style: str, header: bool = False) -> str:
    found = []
    for column, cell in enumerate(row):
        if column == 0 and header:
            found.append(f'<th scope="row">{cell}</th>')
        else:
            found.append(f"<td{_style(column < texts, style)}>{cell}</td>")
    return "".join(found)


def _style(is_text: bool, name: str) -> str:
    return f' class="{name}"' if is_text else ""


def estimate(parts: tuple[str, str], strong: bool = False) -> str:
    """A value with its interval, small."""
    value, interval = parts
    value = f"<b>{value}</b>" if strong and value != MISSING else value
    return f"{value} <small>{interval}</small>" if interval else value


def picture(name: str, label: str, light: Pictures, dark: Pictures) -> str:
    """The picture `name` for bright and dark pages; nothing where it was not drawn."""
    if name not in light:
        return ""
    source, night = (
        "data:image/png;base64," + base64.b64encode(images[name]).decode()
        for images in (light, dark)
    )
    width = int.from_bytes(light[name][16:20], "big")  # of a PNG's header
    # Pictures have 130 dots per inch; a page has 96. Letters keep a readable size on a phone.
    shown = round(width * 96 / 130)
    return (
        '<div class="wide"><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{night}"><img src="{source}" alt="{text(label)}" '
        f'style="max-width:{shown}px;min-width:{min(round(0.7 * shown), 900)}px"></picture></div>'
    )


def details(summary: str, body: str) -> str:
    """A part that is folded until it is asked for."""
    return f"<details><summary>{summary}</summary>{body}</details>"
