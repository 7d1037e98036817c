"""A story with a question about it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Story:
    """Facts in order and a question about them.

    Attributes:
        facts: one sentence each, such as "John travelled to the hallway."; no questions.
        question: such as "Where is John?", without spaces around it.
        answer: such as "hallway"; several things are joined by commas, "apple,milk".
        supporting: places in `facts` (from 0, ascending, at least one) of what the answer follows
            from.
    """

    facts: list[str]
    question: str
    answer: str
    supporting: list[int]
