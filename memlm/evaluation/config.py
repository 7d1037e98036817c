"""What an evaluation runs on."""

from dataclasses import dataclass, field

from memlm.errors import UserError, nearest

TASK_NAMES = ("needle", "mqar", "perplexity")


def _at_least(minimum: int, where: str, *values: int) -> None:
    for value in values:
        if value < minimum:
            raise UserError(f"{where}: {value} is too small; the least is {minimum}")


@dataclass
class NeedleOptions:
    """A pass key hidden in real text, asked for at the end.

    Attributes:
        lengths: whole prompts in tokens, question and answer included.
        depths: how many places from the start of the text to the last one allowed.
        trials: prompts per length, spread over the depths.
        digits: digits of a pass key.
        distance: least tokens between the needle and the question; None = just further than
            attention reaches, 0 for a model whose attention reaches everything.
        files: text files for the haystack; empty = the standard library's held-out sources.
    """

    lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096])
    depths: int = 5
    trials: int = 96
    digits: int = 5
    distance: int | None = None
    files: list[str] = field(default_factory=list)

    def validate(self) -> None:
        """Raise UserError for a size that cannot work."""
        if not self.lengths:
            raise UserError("needle.lengths: empty; give at least one length in tokens")
        _at_least(64, "needle.lengths", *self.lengths)
        _at_least(1, "needle.depths", self.depths)
        _at_least(1, "needle.digits", self.digits)
        _at_least(0, "needle.distance", self.distance or 0)
        _at_least(max(2, self.depths), "needle.trials", self.trials)


@dataclass
class MqarOptions:
    """Multi-query associative recall: key-value pairs, then the keys again in another order.

    Attributes:
        length: tokens of a row, pairs and questions together.
        pairs: key-value pairs per row, one setting each.
        rows: rows per setting.
    """

    length: int = 512
    pairs: list[int] = field(default_factory=lambda: [4, 8, 16])
    rows: int = 96

    def validate(self) -> None:
        """Raise UserError for a size that cannot work."""
        if not self.pairs:
            raise UserError("mqar.pairs: empty; give at least one number of pairs")
        _at_least(1, "mqar.pairs", *self.pairs)
        _at_least(2, "mqar.rows", self.rows)
        _at_least(4 * max(self.pairs), "mqar.length", self.length)


@dataclass
class PerplexityOptions:
    """Loss on held-out text by position in the document.

    Attributes:
        length: tokens read per document, at most.
        documents: documents, the longest-enough ones of the held-out split in its order.
        segment: tokens between two resets (or swaps) of the memory.
        files: text files; empty = the standard library's held-out sources.
    """

    length: int = 4096
    documents: int = 32
    segment: int = 512
    files: list[str] = field(default_factory=list)

    def validate(self) -> None:
        """Raise UserError for a size that cannot work."""
        _at_least(16, "perplexity.length", self.length)
        _at_least(2, "perplexity.documents", self.documents)
        _at_least(1, "perplexity.segment", self.segment)


@dataclass
class EvaluationConfig:
    """One evaluation.

    Attributes:
        tasks: any of needle, mqar, perplexity.
        batch_size: rows that are read together; another row gives the swapped memory.
        segment: tokens of a context read at a time; bounds the memory used, not the result.
        seed: of the needles, places and synthetic rows.
    """

    tasks: list[str] = field(default_factory=lambda: list(TASK_NAMES))
    needle: NeedleOptions = field(default_factory=NeedleOptions)
    mqar: MqarOptions = field(default_factory=MqarOptions)
    perplexity: PerplexityOptions = field(default_factory=PerplexityOptions)
    batch_size: int = 32
    segment: int = 256
    seed: int = 0

    def validate(self) -> None:
        """Raise UserError for an unknown task or a size that cannot work."""
        if not self.tasks:
            raise UserError(f"tasks: empty; choose from {', '.join(TASK_NAMES)}")
        for name in self.tasks:
            if name not in TASK_NAMES:
                raise UserError(
                    f"tasks: unknown task {name!r}{nearest(name, TASK_NAMES)} "
                    f"(valid: {', '.join(TASK_NAMES)})"
                )
            getattr(self, name).validate()
        _at_least(2, "batch_size", self.batch_size)
        _at_least(1, "segment", self.segment)
