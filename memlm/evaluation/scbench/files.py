"""SCBench's rows as they are published: one JSON object per line, or the rows of the Hub.

{"id", "context", "multi_turns": [{"input", "answer"}]}, where a context may be a list of numbers
and an answer a text, a number or a list of texts; choices have "options", and turns of two tasks in
one row their "task".
"""

import dataclasses
from collections import defaultdict
from pathlib import Path

from memlm.evaluation.question_files import JsonPart, read_content
from memlm.evaluation.scbench.conversation import Conversation, Turn
from memlm.evaluation.scbench.templates import MIXTURES

OPTION = "scbench.data"
_WANTED = "a folder with SCBench's files, such as scbench_kv.jsonl"
_CODE = "scbench_repoqa"


def published_file(source: str, task: str) -> Path | None:
    """The file of a task in a folder; None where `source` is no folder."""
    folder = Path(source).expanduser()
    return folder / f"{task}.jsonl" if folder.is_dir() else None


def read_conversations(source: str, task: str) -> list[Conversation]:
    """The rows of a task.

    Args:
        source: a folder with the published files, or the name of a Hub data set with a
            configuration per task, such as microsoft/SCBench.
        task: such as scbench_kv.

    Raises:
        UserError: for a file that is missing or malformed, a data set that cannot be loaded, an
            unknown task of a turn, no row.
    """
    path = published_file(source, task)
    place = source if path is None else str(path)
    content = read_content(place, OPTION, task, _WANTED, split="test")
    rows = list(content.items())
    if not rows:
        raise content.fail("no row")
    found = [_conversation(row, task) for row in rows]
    if _CODE in (task, *MIXTURES.get(task, ())):
        found = _with_others(rows, found)
    return found


def _conversation(row: JsonPart, task: str) -> Conversation:
    context = row.field("context")
    text = str(context.value) if isinstance(context.value, list) else context.of(str)
    turns = tuple(_turn(turn, task) for turn in row.field("multi_turns").items())
    if not turns:
        raise row.field("multi_turns").fail("no turn")
    return Conversation(text, turns)


def _turn(turn: JsonPart, task: str) -> Turn:
    asked = turn.field("input").of(str)
    answers = _answers(turn.field("answer"))
    options: tuple[str, ...] = ()
    if task == "scbench_choice_eng":
        options = tuple(turn.field("options").texts())
        if len(options) != 4 or answers[0] not in options:
            raise turn.fail(f"'options' has to hold 4 texts, one of them {answers[0]!r}")
    if task in MIXTURES:
        named = turn.field("task")
        if named.of(str) not in MIXTURES[task]:
            raise named.fail(f"{named.value!r} is none of {', '.join(MIXTURES[task])}")
        task = named.value
    return Turn(asked, answers, options, task)


def _answers(answer: JsonPart) -> tuple[str, ...]:
    values = answer.value if isinstance(answer.value, list) else [answer.value]
    numbers = int | float
    if not values or not all(
        isinstance(one, str | numbers) and not isinstance(one, bool) for one in values
    ):
        raise answer.fail("a text, a number or a list of them is missing here")
    return tuple(map(str, values))


def _with_others(rows: list[JsonPart], found: list[Conversation]) -> list[Conversation]:
    """The same, each function with the others that are asked for in its repository."""
    names = [row.field("repo").of(str) for row in rows]
    functions: dict[str, list[str]] = defaultdict(list)
    for name, conversation in zip(names, found, strict=True):
        functions[name] += [turn.answers[0] for turn in conversation.turns if turn.task == _CODE]
    return [
        Conversation(
            conversation.context,
            tuple(
                dataclasses.replace(
                    turn,
                    others=tuple(one for one in functions[name] if one != turn.answers[0]),
                )
                if turn.task == _CODE
                else turn
                for turn in conversation.turns
            ),
        )
        for name, conversation in zip(names, found, strict=True)
    ]
