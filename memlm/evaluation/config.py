"""What an evaluation runs on."""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from memlm.data.config import parse_generator
from memlm.data.stories import LEAST_SENTENCES
from memlm.data.synthetic import GENERATORS
from memlm.errors import UserError, nearest
from memlm.evaluation.lengths import parse_length, parse_lengths

MULTI_TURN, MULTI_REQUEST = "multi_turn", "multi_request"
HISTORIES = ("gold", "own")
ALL_CONDITIONS = ("on", "off", "reset", "swapped", "zeroed", "changed", "absent")


def _at_least(minimum: int, where: str, *values: int) -> None:
    for value in values:
        if value < minimum:
            raise UserError(f"{where}: {value} is too small; the least is {minimum}")


def _one_of(where: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(
            f"{where}: {value!r} is unknown{nearest(value, known)} (valid: {', '.join(known)})"
        )


@dataclass
class NeedleOptions:
    """A pass key hidden in real text, asked for at the end.

    Attributes:
        depths: how many places from the start of the text to the last one allowed.
        digits: digits of a pass key.
        distance: least tokens between the needle and the question; None = just further than
            attention reaches, 0 for a model whose attention reaches everything.
    """

    depths: int = 5
    digits: int = 5
    distance: int | None = None

    def validate(self) -> None:
        """Raise UserError for a size that cannot work."""
        _at_least(1, "needle.depths", self.depths)
        _at_least(1, "needle.digits", self.digits)
        _at_least(0, "needle.distance", self.distance or 0)


@dataclass
class NiahOptions:
    """Needle in a haystack (Kamradt, 2023).

    Attributes:
        depths: how many depths from 0 to 100 % of the context.
        needles: facts hidden in one context, each asked for by its own question.
    """

    depths: int = 5
    needles: int = 1

    def validate(self) -> None:
        """Raise UserError for a size that cannot work."""
        _at_least(1, "niah.depths", self.depths)
        _at_least(1, "niah.needles", self.needles)


@dataclass
class MqarOptions:
    """Multi-query associative recall: key-value pairs, then the keys again in another order.

    Attributes:
        length: tokens of a row, pairs and questions together.
        pairs: key-value pairs per row, one setting each.
        rows: rows per setting.
        power: exponent of the power law that draws the gaps before the questions.
        overwritten: of mqar_overwrite: the share of the keys that get a second value, which is the
            right one.
    """

    length: int = 512
    pairs: list[int] = field(default_factory=lambda: [4, 8, 16])
    rows: int = 96
    power: float = 0.01
    overwritten: float = 0.5

    def validate(self) -> None:
        """Raise UserError for a size that cannot work."""
        if not self.pairs:
            raise UserError("mqar.pairs: empty; give at least one number of pairs")
        _at_least(1, "mqar.pairs", *self.pairs)
        _at_least(2, "mqar.rows", self.rows)
        _at_least(4 * max(self.pairs), "mqar.length", self.length)
        if not self.power > 0:
            raise UserError(f"mqar.power: {self.power} is too small; it must be above 0")
        if not 0 < self.overwritten <= 1:
            raise UserError(f"mqar.overwritten: {self.overwritten} is no share in (0, 1]")


@dataclass
class SyntheticOptions:
    """The synthetic tasks of memlm.data.synthetic.

    Attributes:
        lengths: of examples in tokens, one setting each: 512, 4k or a range that doubles, 64..4k.
        rows: examples per setting.
        options: options of the tasks by name, as in a training source: {parity: {...}}.
    """

    lengths: list[int | str] = field(default_factory=lambda: ["64..256"])
    rows: int = 96
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def all_lengths(self) -> list[int]:
        """Lengths in tokens, ascending."""
        return parse_lengths(self.lengths, "synthetic.lengths")

    def validate(self) -> None:
        """Raise UserError for a size that cannot work."""
        _at_least(1, "synthetic.lengths", *self.all_lengths)
        _at_least(2, "synthetic.rows", self.rows)
        for name, options in self.options.items():
            if name not in GENERATORS:
                raise UserError(
                    f"synthetic.options: unknown task {name!r}{nearest(name, GENERATORS)} "
                    f"(valid: {', '.join(GENERATORS)})"
                )
            parse_generator(name, options, f"synthetic.options.{name}")


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
class RulerOptions:
    """Corpora of RULER's question answering (Hsieh et al., 2024).

    Attributes:
        squad: a SQuAD 2.0 JSON file (qa_1), or the name of a Hub data set.
        hotpotqa: a HotpotQA file, JSON as published or in the Hub's columns (qa_2), or the name of
            a Hub data set.
    """

    squad: str = "rajpurkar/squad_v2"
    hotpotqa: str = "hotpotqa/hotpot_qa"

    def validate(self) -> None:
        """Nothing that can be told from the values alone."""


@dataclass
class BabilongOptions:
    """bAbI stories in book text (Kuratov et al., 2024).

    Attributes:
        stories: a folder with bAbI's files, such as en-10k; None = stories of a simulated world
            with the same question types.
    """

    stories: str | None = None

    def validate(self) -> None:
        """Nothing that can be told from the values alone."""


@dataclass
class StoriesOptions:
    """Stories of a simulated world, questions with one to three supporting facts.

    Attributes:
        sentences: facts of a story, one setting each.
        haystack: hide the facts in the haystack; then `lengths` are the settings and the trials
            take the numbers of sentences in turn.
    """

    sentences: list[int] = field(default_factory=lambda: [8, 16, 32])
    haystack: bool = False

    def validate(self) -> None:
        """Raise UserError for a size that cannot work."""
        if not self.sentences:
            raise UserError("stories.sentences: empty; give at least one number of sentences")
        _at_least(LEAST_SENTENCES, "stories.sentences", *self.sentences)


@dataclass
class RetentionOptions:
    """A fact, then unrelated text, then the question.

    Attributes:
        facts: a SQuAD JSON file, or the name of a Hub data set.
    """

    facts: str = "rajpurkar/squad_v2"

    def validate(self) -> None:
        """Nothing that can be told from the values alone."""


@dataclass
class ScbenchOptions:
    """Conversations about one context (Li et al., 2024).

    Attributes:
        mode: multi_turn = each question follows the one before; multi_request = each is asked from
            the state after the context.
        history: which answers stand in the history of multi_turn: gold, or the model's own.
        turns: questions per context, at most.
        data: a folder with the published files, or the name of a Hub data set
            (microsoft/SCBench); None = contexts that are made, for the five tasks that can.
    """

    mode: str = MULTI_TURN
    history: str = "gold"
    turns: int = 5
    data: str | None = None

    def validate(self) -> None:
        """Raise UserError for an unknown mode or history, or no turn."""
        _one_of("scbench.mode", self.mode, (MULTI_TURN, MULTI_REQUEST))
        _one_of("scbench.history", self.history, HISTORIES)
        _at_least(1, "scbench.turns", self.turns)


@dataclass
class RecallCompletionOptions:
    """Documents and cloze questions (Arora et al., 2024): files or names of Hub data sets.

    Attributes:
        swde, fda, squad: rows with a whole prompt as "text" and its "value".
        triviaqa, nq, drop: rows with "context", "question" and "answers".
    """

    swde: str = "hazyresearch/based-swde-v2"
    fda: str = "hazyresearch/based-fda"
    squad: str = "hazyresearch/based-squad"
    triviaqa: str = "hazyresearch/based_triviaqa"
    nq: str = "hazyresearch/based_nq_512"
    drop: str = "hazyresearch/based_drop"

    def validate(self) -> None:
        """Nothing that can be told from the values alone."""


@dataclass
class LongbenchOptions:
    """Questions and tasks on long documents (Bai et al., 2023).

    Attributes:
        data: a folder with the published files, such as hotpotqa.jsonl, or the name of a Hub data
            set.
        cut_middle: rows that are too long for a length lose the middle of their prompt instead of
            being left out; records tell how many tokens.
    """

    data: str = "THUDM/LongBench"
    cut_middle: bool = False

    def validate(self) -> None:
        """Nothing that can be told from the values alone."""


@dataclass
class EvaluationConfig:
    """One evaluation.

    Attributes:
        tasks: names of tasks or groups of them; `memlm.evaluation.tasks` lists them.
        lengths: of whole prompts in tokens, question and answer included: 4096, 4k, 1M or a range
            that doubles, 4k..64k. mqar, stories, synthetic tasks and perplexity have sizes
            of their own.
        trials: prompts per length.
        long_trials: prompts of lengths beyond `long_length`; None = `trials`.
        long_length: see `long_trials`.
        conditions: those that are measured, where they apply.
        haystack: text files, folders and globs that things are hidden in; empty = the standard
            library's held-out sources.
        batch_size: rows that are read together; another row gives the swapped memory.
        segment: tokens of a context read at a time; bounds the memory used, not the result.
        seed: of everything that is drawn.
    """

    tasks: list[str] = field(default_factory=lambda: ["needle", "mqar", "perplexity"])
    lengths: list[int | str] = field(default_factory=lambda: ["512..4k"])
    trials: int = 96
    long_trials: int | None = None
    long_length: int | str = "64k"
    conditions: list[str] = field(default_factory=lambda: list(ALL_CONDITIONS))
    haystack: list[str] = field(default_factory=list)
    needle: NeedleOptions = field(default_factory=NeedleOptions)
    niah: NiahOptions = field(default_factory=NiahOptions)
    ruler: RulerOptions = field(default_factory=RulerOptions)
    babilong: BabilongOptions = field(default_factory=BabilongOptions)
    stories: StoriesOptions = field(default_factory=StoriesOptions)
    retention: RetentionOptions = field(default_factory=RetentionOptions)
    scbench: ScbenchOptions = field(default_factory=ScbenchOptions)
    recall_completion: RecallCompletionOptions = field(default_factory=RecallCompletionOptions)
    longbench: LongbenchOptions = field(default_factory=LongbenchOptions)
    mqar: MqarOptions = field(default_factory=MqarOptions)
    synthetic: SyntheticOptions = field(default_factory=SyntheticOptions)
    perplexity: PerplexityOptions = field(default_factory=PerplexityOptions)
    batch_size: int = 32
    segment: int = 256
    seed: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EvaluationConfig":
        """The inverse of `dataclasses.asdict`."""
        hints = get_type_hints(cls)
        return cls(
            **{
                name: hints[name](**value) if is_dataclass(hints[name]) else value
                for name, value in values.items()
            }
        )

    @property
    def all_lengths(self) -> list[int]:
        """Lengths in tokens, ascending."""
        return parse_lengths(self.lengths, "lengths")

    def trials_at(self, length: int) -> int:
        """Prompts of a length."""
        long = length > parse_length(self.long_length, "long_length")
        return self.long_trials if long and self.long_trials is not None else self.trials

    def validate(self) -> None:
        """Raise UserError for an unknown task or condition, or a size that cannot work."""
        from memlm.evaluation.tasks import expand_tasks

        expand_tasks(self.tasks)
        _at_least(32, "lengths", *self.all_lengths)
        parse_length(self.long_length, "long_length")
        _at_least(2, "trials", self.trials)
        if self.long_trials is not None:
            _at_least(2, "long_trials", self.long_trials)
        for name in self.conditions:
            if name not in ALL_CONDITIONS:
                raise UserError(
                    f"conditions: unknown condition {name!r}{nearest(name, ALL_CONDITIONS)} "
                    f"(valid: {', '.join(ALL_CONDITIONS)})"
                )
        for item in fields(self):
            options = getattr(self, item.name)
            if is_dataclass(options):
                options.validate()
        _at_least(2, "batch_size", self.batch_size)
        _at_least(1, "segment", self.segment)
        _at_least(0, "seed", self.seed)
