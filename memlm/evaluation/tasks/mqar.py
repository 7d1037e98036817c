"""Multi-query associative recall (Arora et al., 2024): pairs in the context, keys as questions.

The pairs are read as a context; the rest of the row asks for them in one pass that reads and
writes on. A row's score is the share of its queries whose most likely next token is the value.
Queries of a row are not independent, so intervals count rows.
"""

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from memlm.data.mqar import IGNORED, check_mqar, make_mqar
from memlm.evaluation.conditions import Plan
from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.statistics import wilson
from memlm.evaluation.streaming import batches, read_context, score_targets, state_bytes
from memlm.evaluation.tasks.base import Meter, TaskResult, gains

LARGEST_VOCABULARY = 8192  # of the benchmark's definition


def longest(config: EvaluationConfig) -> int:
    """Tokens of a row."""
    return config.mqar.length


def tokens(config: EvaluationConfig, plan: Plan) -> int:
    """Context tokens read and questions answered, for the progress bar."""
    options = config.mqar
    per_row = [
        len(plan.passes) * 2 * pairs + len(plan.conditions) * (options.length - 2 * pairs)
        for pairs in options.pairs
    ]
    return options.rows * sum(per_row)


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids the pairs are drawn from."""
    return min(LARGEST_VOCABULARY, tokenizer.vocab_size)


def check(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig, plan: Plan
) -> None:
    """Raise UserError when the pairs do not fit the vocabulary or the row."""
    for pairs in config.mqar.pairs:
        check_mqar(vocabulary(tokenizer), config.mqar.length, pairs)


def run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    plan: Plan,
    meter: Meter,
) -> TaskResult:
    """Accuracy per number of pairs and condition."""
    options = config.mqar
    result = TaskResult("accuracy (%)", "key-value pairs", {}, {})
    for pairs in options.pairs:
        accuracy: dict[str, list[float]] = {name: [] for name in plan.conditions}
        for rows in batches(options.rows, config.batch_size):
            examples = [
                make_mqar(
                    vocabulary(tokenizer),
                    options.length,
                    pairs,
                    np.random.default_rng((config.seed, pairs, row)),
                )
                for row in rows
            ]
            inputs = torch.from_numpy(np.stack([e.input_ids for e in examples])).to(model.device)
            labels = torch.from_numpy(np.stack([e.labels for e in examples])).to(model.device)
            cut = examples[0].context_length
            asked = labels[:, cut:] != IGNORED
            for one in plan.passes:
                with one.ablation():
                    states = read_context(
                        model, inputs[:, :cut], config.segment, one.use_memory, meter.advance
                    )
                    if "on" in one.conditions:
                        result.cost["memory_state_bytes"] = state_bytes(states, plan.memory_names)
                    for condition in one.conditions:
                        start = plan.ablate(states, condition)
                        with meter.measure("answer", asked.numel()):
                            _, guesses, _ = score_targets(
                                model, inputs[:, cut:], labels[:, cut:], start, one.use_memory
                            )
                        meter.advance(asked.numel())
                        right = (guesses == labels[:, cut:]) & asked
                        accuracy[condition] += (right.sum(1) / asked.sum(1)).tolist()
        result.scores[str(pairs)] = {
            name: wilson(sum(values), len(values)) for name, values in accuracy.items()
        }
        result.memory_gain[str(pairs)] = gains(accuracy, higher_is_better=True)
    result.cost |= meter.rates()
    result.details = {"row_tokens": options.length, "vocabulary": vocabulary(tokenizer)}
    return result
