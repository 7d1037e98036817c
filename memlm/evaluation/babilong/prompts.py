"""BABILong's prompts: what stands before and behind the text that holds the facts."""

import re
from functools import cache
from pathlib import Path

from memlm.yaml_tree import read_yaml


@cache
def _prompts() -> dict[str, dict[str, str]]:
    return read_yaml(Path(__file__).with_name("prompts.yaml"))


def prompt_start(number: int) -> str:
    """Instruction, examples and format of the answer, down to the line before the text.

    Args:
        number: of the question type, 1 to 20.
    """
    prompt = _prompts()[f"qa{number}"]
    return (
        f"{prompt['instruction']}\n\n{prompt['examples']}\n\n{prompt['post_prompt']}\n\n<context>\n"
    )


def prompt_end(question: str) -> str:
    """What stands behind the text; BABILong writes no "Answer:" before the model's words."""
    return f"\n</context>\n\nQuestion: {question}"


def likely_answers(number: int) -> list[str]:
    """Right answers as a model would continue a prompt, "\\nAnswer: garden", long ones among them.

    They are those of the examples, and for qa8 also the longest list that a story asks for.
    """
    found = re.findall(r"\nAnswer: .+", _prompts()[f"qa{number}"]["examples"])
    return [*found, "\nAnswer: apple, football, milk"] if number == 8 else found
