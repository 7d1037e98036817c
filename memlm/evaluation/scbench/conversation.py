"""What SCBench's rows hold: a context and turns about it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One question about a context.

    Attributes:
        input: the question as the row words it; it ends where the answer starts.
        answers: what an answer is compared with, at least one.
        options: of a multiple choice, in order; else empty.
        task: whose template and score count; of a row of two tasks each turn names its own.
        others: functions of the same repository that an answer must not resemble more (repoqa).
    """

    input: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    task: str = ""
    others: tuple[str, ...] = ()

    @property
    def gold(self) -> str:
        """The right answer as a history shows it; several parts are joined by spaces."""
        return " ".join(self.answers)


@dataclass(frozen=True)
class Conversation:
    """A row: {"context", "multi_turns": [{"input", "answer"}]}."""

    context: str
    turns: tuple[Turn, ...]
