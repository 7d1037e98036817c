"""Loss on held-out text, by position in the document.

Documents are streamed in segments. `off` (and `zeroed`) read everything without the memory. At
every segment after the first, `reset` and `swapped` go on from the states of `on`, with the
memories as new or those of another document at the same position; the first segment is the same
for the three. Losses are compared document by document.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memlm.data.corpus import Corpus
from memlm.data.tokenizers import byte_level
from memlm.errors import UserError
from memlm.evaluation.conditions import Pass, Plan
from memlm.evaluation.costs import Meter
from memlm.evaluation.haystack import held_out_corpus
from memlm.evaluation.prompts import Context
from memlm.evaluation.scoring import pad_documents, score_targets
from memlm.evaluation.subject import Subject
from memlm.evaluation.tasks.base import Record, Setting, Task, Tools

WHOLE = "all"
FIRST_BUCKET = 128


class Perplexity(Task):
    """Bits per byte over whole documents (setting "all") and per range of positions."""

    title = "Held-out text"
    metric = "bits per byte"
    axis = "position (tokens)"
    kind = "losses"
    description = "The loss on documents that training never saw, by position in the document."

    def __init__(self, name: str, tools: Tools):
        super().__init__(name, tools)
        self.options = tools.config.perplexity
        corpus = held_out_corpus(tools.tokenizer, self.options.files)
        self.documents = choose_documents(corpus, self.options.documents, self.options.length)
        self.length = max(map(len, self.documents))
        self.spans = {WHOLE: (1, self.length)} | {
            f"{low}-{high - 1}": (low, high) for low, high in buckets(self.length)
        }

    def settings(self) -> list[Setting]:
        return [Setting(WHOLE, len(self.documents), self.length)]

    def labels(self) -> list[str]:
        return list(self.spans)

    def passes(self, plan: Plan) -> int:
        return sum(len(one.conditions) for one in plan.passes if one.variant == "plain")

    def run(self, setting: Setting, trials: range, subject: Subject, meter: Meter) -> list[Record]:
        documents = [self.documents[index] for index in trials]
        if not subject.ragged and len({len(document) for document in documents}) > 1:
            alone = (range(index, index + 1) for index in trials)
            return [record for one in alone for record in self.run(setting, one, subject, meter)]
        rates = [self._tokens_per_byte(document) for document in documents]
        prompts = [Context([document]).fingerprint() for document in documents]
        inputs, targets = pad_documents(documents)
        records = []
        for one in subject.plan.passes:
            if one.variant != "plain":
                continue
            tokens = sum(len(document) - 1 for document in documents) * len(one.conditions)
            with one.ablation(), meter.measure("score", tokens):
                losses = self._score(subject, inputs, targets, one, meter)
            for condition, values in losses.items():
                for index, loss, document, rate, prompt in zip(
                    trials, values, documents, rates, prompts, strict=True
                ):
                    for label, (low, high) in self.spans.items():
                        if len(document) <= low:
                            continue
                        part = loss[low - 1 : min(high, len(document)) - 1]
                        records.append(
                            Record(
                                setting=label,
                                trial=index,
                                condition=condition,
                                score=float(part.mean()) / math.log(2) * rate,
                                labels={"nats": float(part.sum()), "tokens": len(part)},
                                tokens=len(document),
                                prompt=prompt,
                            )
                        )
        return records

    def details(self, records: Sequence[Record]) -> dict[str, Any]:
        nats, tokens = {}, {}
        for record in records:
            if record.setting == WHOLE:
                name = record.condition
                nats[name] = nats.get(name, 0.0) + record.labels["nats"]
                tokens[name] = tokens.get(name, 0) + record.labels["tokens"]
        mean = {name: nats[name] / tokens[name] for name in nats}
        return {
            "documents": len(self.documents),
            "tokens": sum(map(len, self.documents)),
            "segment": self.options.segment,
            "loss_nats_per_token": mean,
            "perplexity_per_token": {name: _exp(value) for name, value in mean.items()},
        }

    def _tokens_per_byte(self, document: np.ndarray) -> float:
        tokenizer = self.tools.tokenizer
        if byte_level(tokenizer):
            return 1.0
        # A bos is no text, and it is not predicted.
        text = document[1:] if document[0] == tokenizer.bos_token_id else document
        return len(text) / len(tokenizer.decode(text.tolist()).encode())

    def _score(
        self, subject: Subject, inputs: Tensor, targets: Tensor, one: Pass, meter: Meter
    ) -> dict[str, Tensor]:
        """Losses float32 [B, T] in nats of every condition of one pass, on the CPU."""
        states: Any = None
        losses: dict[str, list[Tensor]] = {name: [] for name in one.conditions}
        first = one.conditions[0]
        size = self.options.segment
        for start in range(0, inputs.shape[1], size):
            part = inputs[:, start : start + size], targets[:, start : start + size]
            begin = states
            for condition in reversed(one.conditions):
                meter.advance(part[0].numel())
                if begin is None and condition != first:
                    continue
                ablated = begin if begin is None else subject.ablate(begin, condition)
                # The first condition comes last: only then may the states be used up.
                going = ablated if begin is None or condition == first else subject.fork(ablated)
                found, after = score_targets(subject, *part, going, one.use_memory)
                losses[condition].append(found)
                if condition == first:
                    states = after
            if begin is None:
                for condition in one.conditions[1:]:
                    losses[condition].append(losses[first][0])
        meter.saw(subject.state_bytes(states))
        return {name: torch.cat(parts, dim=1) for name, parts in losses.items()}


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def choose_documents(corpus: Corpus, count: int, length: int) -> list[np.ndarray]:
    """The first `count` documents that have `length` tokens, cut there.

    Where there are fewer, the longest of the others follow, longest first.

    Raises:
        UserError: when fewer than two documents have two tokens.
    """
    lengths = corpus.lengths
    full = np.flatnonzero(lengths >= length)[:count]
    others = np.flatnonzero((lengths < length) & (lengths > 1))
    others = others[np.argsort(-lengths[others], kind="stable")]
    chosen = [*full, *others[: count - len(full)]]
    if len(chosen) < 2:
        raise UserError(
            f"perplexity.files: {len(chosen)} document with text; two or more are needed, so that "
            "the memory of one can be given to another"
        )
    return [
        corpus.tokens[corpus.starts[index] :][: min(length, lengths[index])].astype(np.int64)
        for index in chosen
    ]


def buckets(length: int) -> list[tuple[int, int]]:
    """Ranges [low, high) of positions that double from 128 on and cover 1 .. length - 1."""
    edges = [1]
    while edges[-1] < length:
        edges.append(min(length, max(FIRST_BUCKET, 2 * edges[-1])))
    return list(pairwise(edges))
