"""The data section of a run config and its strict validation."""

import math
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from memlm.data.stories import HOPS, LEAST_SENTENCES, MOST_SENTENCES_OF_THREE
from memlm.data.synthetic import GENERATORS, Generator, generator_class
from memlm.errors import UserError, nearest, require_known


@dataclass
class StdlibSource:
    """The running Python's own standard-library sources (real text on every machine)."""

    weight: float = 1.0


@dataclass
class TextSource:
    """Local text: files, folders or globs of txt, md, jsonl and parquet (others read as text)."""

    files: list[str]
    column: str = "text"  # field of jsonl records, column of parquet tables
    weight: float = 1.0


@dataclass
class HubSource:
    """A dataset of the Hub, streamed in its own order unless told otherwise."""

    dataset: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    streaming: bool = True
    shuffle_buffer: int = 0  # documents; 0 keeps the stream order
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.shuffle_buffer < 0:
            raise UserError(f"data.sources: shuffle_buffer must be >= 0, got {self.shuffle_buffer}")


@dataclass
class PasskeySource:
    """A key hidden in real text and asked for again (memlm.data.passkey)."""

    files: list[str] | None = None  # None: the standard library
    digits: tuple[int, int] = (5, 30)
    queries: tuple[int, int] = (1, 3)
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_range("data.sources: passkey digits", self.digits)
        check_range("data.sources: passkey queries", self.queries)


@dataclass
class MqarSource:
    """Multi-query associative recall (Arora et al., 2024; memlm.data.mqar)."""

    pairs: int | None = None  # None: one pair per 16 tokens
    vocab_size: int | None = None  # None: the tokenizer's, at most 8192
    random_filler: bool = False
    weight: float = 1.0


@dataclass
class StoriesSource:
    """Stories with a question and its answer as text (memlm.data.stories)."""

    hops: tuple[int, int] = (1, 3)  # facts that the answer follows from
    sentences: tuple[int, int] = (4, 32)  # facts of a story
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_range("data.sources: stories hops", self.hops)
        check_range("data.sources: stories sentences", self.sentences)
        if self.hops[1] > max(HOPS):
            raise UserError(
                f"data.sources: stories hops: {self.hops[1]} is too large; the most is {max(HOPS)}"
            )
        if self.sentences[0] < LEAST_SENTENCES:
            raise UserError(
                f"data.sources: stories sentences: {self.sentences[0]} is too small; the least is "
                f"{LEAST_SENTENCES}"
            )
        if self.hops[1] == max(HOPS) and self.sentences[1] > MOST_SENTENCES_OF_THREE:
            raise UserError(
                f"data.sources: stories sentences: {self.sentences[1]} is too large for hops of "
                f"{max(HOPS)}; the most is {MOST_SENTENCES_OF_THREE}"
            )


@dataclass
class SyntheticSource:
    """A task of memlm.data.synthetic; in a config the task's name is the type."""

    generator: Generator
    lengths: tuple[int, int] | None = None  # of examples; None: one example per row
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.lengths is not None:
            check_range("data.sources: lengths", self.lengths)


Source = (
    StdlibSource
    | TextSource
    | HubSource
    | PasskeySource
    | MqarSource
    | StoriesSource
    | SyntheticSource
)
SOURCES: dict[str, type] = {
    "stdlib": StdlibSource,
    "text": TextSource,
    "hub": HubSource,
    "passkey": PasskeySource,
    "mqar": MqarSource,
    "stories": StoriesSource,
}


@dataclass
class DataConfig:
    """What the rows are made of.

    `sources` are mappings `{type: stdlib|text|hub|passkey|mqar|stories, weight: 1.0, ...}` with
    the fields of the source's dataclass, or `{type: TASK, weight: 1.0, lengths: null, ...}` with
    the options of a synthetic task; rows are mixed by weight. `validation_fraction` of the
    documents, chosen by a hash of their text, is held out. With `carry`, documents go on across
    the rows of a lane (see PackedDataset). With `shards`, a folder, texts are tokenised into files
    there once, by `tokenize_processes` processes, and read from them; streams as they are read.
    None = texts are tokenised at every start and kept in memory, streams are read again. Raises
    UserError on any unknown or impossible value.
    """

    tokenizer: str = "bytes"
    sources: list[dict[str, Any]] = field(default_factory=lambda: [{"type": "stdlib"}])
    seed: int = 0
    validation_fraction: float = 0.05
    carry: bool = False
    shards: str | None = None
    tokenize_processes: int = 1

    def __post_init__(self) -> None:
        if self.tokenize_processes < 1:
            raise UserError(
                f"data.tokenize_processes must be at least 1, got {self.tokenize_processes}"
            )
        if self.shards is not None and (not self.shards or "\0" in self.shards):
            raise UserError("data.shards: needs the name of a folder, or null")
        if self.seed < 0:
            raise UserError(f"data.seed must be >= 0, got {self.seed}")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"data.validation_fraction must be in [0, 1), got {self.validation_fraction}"
            )
        self.parsed_sources()

    def parsed_sources(self) -> list[Source]:
        """The sources as dataclasses; raises UserError naming the bad entry."""
        if not isinstance(self.sources, list) or not self.sources:
            raise UserError("data.sources: needs a list of at least one source")
        return [parse_source(entry, f"data.sources[{i}]") for i, entry in enumerate(self.sources)]


def parse_source(entry: dict[str, Any], where: str) -> Source:
    """One source from its mapping; raises UserError on unknown types and keys or bad values."""
    known = [*SOURCES, *GENERATORS]
    if not isinstance(entry, dict) or "type" not in entry:
        raise UserError(f"{where}: needs a mapping with a type ({', '.join(known)})")
    values = dict(entry)
    kind = values.pop("type")
    if not isinstance(kind, str) or kind not in known:
        hint = nearest(kind, known) or f" (valid: {', '.join(known)})"
        raise UserError(f"{where}: unknown source type {kind!r}{hint}")
    if kind in GENERATORS:
        common = {name: values.pop(name) for name in ("lengths", "weight") if name in values}
        known = [*_names(generator_class(kind)), "lengths", "weight"]
        require_known(values, known, f"{where} ({kind})")
        hints = typing.get_type_hints(SyntheticSource)
        common = {
            name: _coerce(value, hints[name], f"{where}.{name}") for name, value in common.items()
        }
        source: Source = SyntheticSource(parse_generator(kind, values, where), **common)
    else:
        source = SOURCES[kind](**_fields_of(SOURCES[kind], values, where, kind))
    if not 0 < source.weight < math.inf:
        raise UserError(f"{where}.weight must be > 0 and finite, got {source.weight}")
    return source


def parse_generator(name: str, options: dict[str, Any], where: str) -> Generator:
    """The synthetic task `name` of memlm.data.synthetic with some of its options.

    Raises:
        UserError: for an unknown option or a value of the wrong type; what an option must be is
            told by the generator's `check`.
    """
    if not isinstance(options, dict):
        raise UserError(f"{where}: needs a mapping of options, got {options!r}")
    cls = generator_class(name)
    return cls(**_fields_of(cls, options, where, name))


def _names(cls: type) -> list[str]:
    return [item.name for item in fields(cls)]


def _fields_of(cls: type, values: dict[str, Any], where: str, kind: str) -> dict[str, Any]:
    """The values of a dataclass's fields as their types."""
    hints = typing.get_type_hints(cls)
    require_known(values, _names(cls), f"{where} ({kind})")
    found = {}
    for item in fields(cls):
        if item.name in values:
            value = values[item.name]
            found[item.name] = _coerce(value, hints[item.name], f"{where}.{item.name}")
        elif item.default is MISSING:
            raise UserError(f"{where} ({kind}): needs {item.name!r}")
    return found


def check_range(where: str, bounds: tuple[int, int]) -> None:
    """Raise UserError unless 1 <= lowest <= highest."""
    if not 1 <= bounds[0] <= bounds[1]:
        raise UserError(f"{where}: needs 1 <= lowest <= highest, got {list(bounds)}")


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type; YAML gives lists for tuples, ints for floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        hint = next(argument for argument in arguments if argument is not types.NoneType)
        return _coerce(value, hint, where)
    if origin is list and isinstance(value, str):
        value = [value]
    if origin in (list, tuple):
        length = len(arguments) if origin is tuple else None
        if isinstance(value, (list, tuple)) and length in (None, len(value)) and len(value):
            return origin(_coerce(item, arguments[0], where) for item in value)
        size = f"{length} values" if length else "values"
        raise UserError(f"{where}: needs a list of {size} ({arguments[0].__name__}), got {value!r}")
    # bool is an int in Python; a switch given for a number is a mistake.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{where}: needs {hint.__name__}, got {value!r}")
