"""A sample of the training texts of a run, within a limit of bytes."""

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from tqdm import tqdm

from memlm.data.config import DataConfig, HubSource, Source
from memlm.data.corpus import in_split, split_documents
from memlm.data.hub import hub_documents
from memlm.data.text_origin import TextOrigin, text_origin
from memlm.errors import UserError

PART_CHARACTERS = 1 << 14


@dataclass
class TextSample:
    """What was read of a source, and what was kept of it.

    Attributes:
        name: what the config says of the source.
        parts: texts of up to `PART_CHARACTERS` characters, in their order.
        documents: number of documents that were read.
        read_bytes: of text that was read, as UTF-8.
        kept_bytes: of text in `parts`.
        ended: whether the source was read to its end.
    """

    name: str
    parts: list[str]
    documents: int = 0
    read_bytes: int = 0
    kept_bytes: int = 0
    ended: bool = True


def sample_sources(config: DataConfig, max_bytes: int) -> list[TextSample]:
    """A sample of the training texts of each source that has texts.

    Each source has its share of `max_bytes`, by weight. Where it has more text than that, parts of
    documents are drawn at random from all of it; a stream is read until its share is full.
    Documents that are held out for validation are left out. The same texts give the same sample.
    A bar on a terminal shows the bytes that were read.

    Raises:
        UserError: as the readers of texts do, and when no source has texts.
    """
    weights: list[tuple[TextOrigin | HubSource, float]] = []
    for source in config.parsed_sources():
        texts = _texts_of(source)
        if texts is None:
            continue
        same = [i for i, (other, _) in enumerate(weights) if other == texts]
        before = weights.pop(same[0])[1] if same else 0.0
        weights.append((texts, before + source.weight))
    if not weights:
        raise UserError("data.sources: no source has texts to train a tokenizer on")
    total = sum(weight for _, weight in weights)
    return [_sample(texts, config, int(max_bytes * w / total)) for texts, w in weights]


def _texts_of(source: Source) -> TextOrigin | HubSource | None:
    """What tells apart the texts of sources; None where there are none."""
    if isinstance(source, HubSource) and source.streaming:
        return HubSource(**{**vars(source), "weight": 1.0})
    return text_origin(source)


def _sample(texts: TextOrigin | HubSource, config: DataConfig, limit: int) -> TextSample:
    """The parts with the lowest of random numbers, as many as fit; of a stream the first."""
    stream = isinstance(texts, HubSource)
    sample = TextSample(f"hub {texts.dataset}" if stream else _name(texts), [])
    documents = hub_documents(texts, config.seed) if stream else texts.documents()
    draw = random.Random(0).random
    kept: list[tuple[float, int, str, int]] = []  # the highest number first
    number = 0
    with tqdm(desc=f"reading {sample.name}", unit="B", unit_scale=True, disable=None) as bar:
        for document in _training_documents(documents, config.validation_fraction):
            sample.documents += 1
            for part in _parts(document):
                size = len(part.encode("utf-8", errors="replace"))
                heapq.heappush(kept, (-draw(), number, part, size))
                number += 1
                sample.read_bytes += size
                sample.kept_bytes += size
                bar.update(size)
                while sample.kept_bytes > limit and not stream and len(kept) > 1:
                    sample.kept_bytes -= heapq.heappop(kept)[3]
            if stream and sample.kept_bytes >= limit:
                sample.ended = False
                break
    sample.parts = [part for _, _, part, _ in sorted(kept, key=lambda entry: entry[1])]
    return sample


def _name(origin: TextOrigin) -> str:
    content = origin.description
    if "files" in content:
        first, *more = content["files"]
        return f"text {first}" + (f" and {len(more)} more" if more else "")
    return f"{origin.kind} {content.get('dataset', '')}".strip()


def _training_documents(documents: Iterator[str], fraction: float) -> Iterator[str]:
    first = list(islice(documents, 2))
    if len(first) == 1:
        return iter(split_documents(first, "train", fraction))
    if not fraction:
        return chain(first, documents)
    return (text for text in chain(first, documents) if in_split(text, "train", fraction))


def _parts(document: str) -> Iterator[str]:
    """A document, cut at a space or behind a line where it is longer than a part."""
    start = 0
    while len(document) - start > PART_CHARACTERS:
        end = start + PART_CHARACTERS
        found = max(document.rfind("\n", start, end) + 1, document.rfind(" ", start, end))
        cut = found if found > start else end
        yield document[start:cut]
        start = cut
    yield document[start:]
