"""SCBench's prompts, word for word (see NOTICE), and how long its answers may be.

They are those for models without a chat template. Two things differ. There no empty line stands
between context and question where every question is asked alone; here one does, so that both modes
read the same context. And there a history shows several right answers (vt) as Python writes a list,
['AB', 'CD']; here spaces join them.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

from memlm.evaluation.scbench.conversation import Conversation, Turn


@dataclass(frozen=True)
class Template:
    """The prompts of a task.

    Attributes:
        before: in front of the context; the field {target} is what the first turn asks for.
        first: behind the context; the fields {input}, {target} and {A} to {D}, the options.
        follow_up: behind a gold answer, with the same fields.
        request: as `first`, where every question is the first.
        new_tokens: most tokens of an answer.
    """

    before: str
    first: str
    follow_up: str
    request: str
    new_tokens: int


def _template(before: str, new_tokens: int, question: str = "\n\n{input}") -> Template:
    return Template(before, question, question, question, new_tokens)


_KV = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
_CHOICES = "\n\nQuestion: {input}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\n"

TEMPLATES = {
    "scbench_kv": _template(_KV, 150),
    "scbench_prefix_suffix": _template("", 150),
    "scbench_vt": _template("", 30),
    "scbench_repoqa": _template(
        "Based on the function description and code context, please retrieve and repeat the exact "
        "described function from the code context in a code block wrapped by ```:\n\n",
        1024,
    ),
    "scbench_qa_eng": _template(
        "Read the book and answer the question. Be very concise in your answer.\n\n",
        40,
        "\n\nQuestion: {input}\nAnswer:",
    ),
    "scbench_qa_chn": _template("阅读以下书籍然后回答问题。\n\n", 40, "\n\n问题：{input}\n答案："),
    "scbench_choice_eng": Template(
        "Read the book and answer the question.\n\n",
        _CHOICES + "The the correct answer is",
        _CHOICES + "The letter of the correct answer is",
        _CHOICES + "The the correct answer is",
        40,
    ),
    "scbench_many_shot": _template("", 10),
    "scbench_mf": Template(
        "What is {target}?\n\n",
        "\n\n{input}",
        "\n\nWhat is {target}?\n\n{input}",
        "\n\nWhat is {target}?\n\n{input}",
        5,
    ),
    "scbench_summary": _template("", 200),
    "scbench_summary_with_needles": _template("", 0),
    "scbench_repoqa_and_kv": _template("", 0),
}
# Of the tasks that ask in turns, by the task of the turn.
_TURN_TOKENS = {
    "scbench_summary_with_needles": {"scbench_summary": 800, "scbench_passkey": 15},
    "scbench_repoqa_and_kv": {"scbench_repoqa": 1024, "scbench_kv": 80},
}
MIXTURES = {task: tuple(tokens) for task, tokens in _TURN_TOKENS.items()}
_TARGET = re.compile(r"The .+ is")


def new_tokens(task: str, turn: Turn) -> int:
    """Most tokens of an answer to a turn."""
    return _TURN_TOKENS[task][turn.task] if task in _TURN_TOKENS else TEMPLATES[task].new_tokens


def context_text(task: str, conversation: Conversation) -> str:
    """The text up to the end of the context."""
    before = TEMPLATES[task].before.format(target=_target(conversation.turns[0]))
    return before + conversation.context


def request_texts(task: str, conversation: Conversation) -> list[str]:
    """What stands behind the context for each question alone."""
    template = TEMPLATES[task].request
    return [_fill(template, turn) for turn in conversation.turns]


def turn_texts(task: str, conversation: Conversation, gold: bool) -> list[str]:
    """What each turn adds to the text.

    Args:
        task: whose templates are used.
        conversation: at least one turn.
        gold: a turn starts with the right answer to the one before; else that one's answer, which
            somebody else has written, stands in front of it.
    """
    template = TEMPLATES[task]
    texts = [_fill(template.first, conversation.turns[0])]
    for before, turn in pairwise(conversation.turns):
        texts.append((before.gold if gold else "") + _fill(template.follow_up, turn))
    return texts


def _fill(template: str, turn: Turn) -> str:
    options = dict(zip("ABCD", turn.options, strict=False))
    return template.format(input=turn.input, target=_target(turn), **options)


def _target(turn: Turn) -> str:
    """What a question asks for: of "The largest number of the list is: ", the start without is."""
    found = _TARGET.search(turn.input)
    return found.group().lower().removesuffix(" is") if found else ""
