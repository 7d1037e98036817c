"""Loss on held-out text, by position in the document.

Documents are streamed in segments. `off` (and `zeroed`) read everything without the memory. At
every segment after the first, `reset` and `swapped` go on from the states of `on`, with the
memories as new or those of another document at the same position; the first segment is the same
for the three. Losses are compared document by document.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from memlm.data.corpus import Corpus
from memlm.data.tokenizers import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.conditions import Pass, Plan
from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.statistics import bootstrap_mean
from memlm.evaluation.streaming import States, batches, score_targets, segments, state_bytes
from memlm.evaluation.tasks.base import Meter, TaskResult, gains
from memlm.evaluation.text import held_out_text

WHOLE = "all"
FIRST_BUCKET = 128


def longest(config: EvaluationConfig) -> int:
    """Tokens read of a document."""
    return config.perplexity.length


def tokens(config: EvaluationConfig, plan: Plan) -> int:
    """Tokens scored over all conditions, for the progress bar."""
    options = config.perplexity
    return options.documents * (options.length - 1) * len(plan.conditions)


def check(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig, plan: Plan
) -> None:
    """Any text can be scored."""


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


def run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    plan: Plan,
    meter: Meter,
) -> TaskResult:
    """Bits per byte over whole documents (setting "all") and per range of positions."""
    options = config.perplexity
    corpus = held_out_text(tokenizer, options.files)
    documents = choose_documents(corpus, options.documents, options.length)
    length = max(map(len, documents))
    losses: dict[str, list[Tensor]] = {name: [] for name in plan.conditions}
    result = TaskResult("bits per byte", "position (tokens)", {}, {})
    for rows in batches(len(documents), config.batch_size):
        inputs, targets = _pad([documents[row] for row in rows], length, model)
        for one in plan.passes:
            with one.ablation(), meter.measure("score", inputs.numel() * len(one.conditions)):
                found, states = _score(model, inputs, targets, one, plan, options.segment, meter)
            if "on" in one.conditions:
                result.cost["state_bytes"] = state_bytes(states)
                result.cost["memory_state_bytes"] = state_bytes(states, plan.memory_names)
            for name, values in found.items():
                losses[name] += values.cpu().unbind()
    per_byte = [_tokens_per_byte(document, tokenizer) for document in documents]
    spans = {WHOLE: (1, length)} | {
        f"{low}-{high - 1}": (low, high) for low, high in buckets(length)
    }
    for label, (low, high) in spans.items():
        bits = {
            name: [
                float(loss[low - 1 : min(high, len(document)) - 1].mean()) / math.log(2) * rate
                for loss, document, rate in zip(values, documents, per_byte, strict=True)
                if len(document) > low
            ]
            for name, values in losses.items()
        }
        result.scores[label] = {name: bootstrap_mean(values) for name, values in bits.items()}
        result.memory_gain[label] = gains(bits, higher_is_better=False)
    nats = {name: _mean_nats(values, documents) for name, values in losses.items()}
    result.cost |= meter.rates()
    result.details = {
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "loss_nats_per_token": nats,
        "perplexity_per_token": {name: math.exp(value) for name, value in nats.items()},
        "segment": options.segment,
    }
    return result


def _tokens_per_byte(document: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> float:
    if isinstance(tokenizer, ByteTokenizer):
        return 1.0
    return len(document) / len(tokenizer.decode(document.tolist()).encode())


def _mean_nats(losses: list[Tensor], documents: list[np.ndarray]) -> float:
    return float(sum(loss.double().sum() for loss in losses)) / sum(
        len(document) - 1 for document in documents
    )


def _pad(documents: list[np.ndarray], length: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs and targets int64 [B, length - 1]; targets are -100 behind the end of a document."""
    inputs = torch.zeros(len(documents), length - 1, dtype=torch.int64)
    targets = torch.full_like(inputs, -100)
    for row, document in enumerate(documents):
        inputs[row, : len(document) - 1] = torch.from_numpy(document[:-1])
        targets[row, : len(document) - 1] = torch.from_numpy(document[1:])
    return inputs.to(model.device), targets.to(model.device)


def _score(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    one: Pass,
    plan: Plan,
    segment: int,
    meter: Meter,
) -> tuple[dict[str, Tensor], States]:
    """Losses [B, T] in nats of every condition of one pass, and the states at the end."""
    states: States | None = None
    losses: dict[str, list[Tensor]] = {name: [] for name in one.conditions}
    for part in segments(inputs.shape[1], segment):
        start = states
        for condition in one.conditions:
            meter.advance(inputs[:, part].numel())
            if start is None and condition != one.conditions[0]:
                losses[condition].append(losses[one.conditions[0]][0])
                continue
            ablated = None if start is None else plan.ablate(start, condition)
            found, _, after = score_targets(
                model, inputs[:, part], targets[:, part], ablated, one.use_memory
            )
            losses[condition].append(found)
            if condition == one.conditions[0]:
                states = after
    return {name: torch.cat(parts, dim=1) for name, parts in losses.items()}, states
