"""A pass key hidden in real text, asked for from further away than attention reaches.

Every prompt is real text with one line `# The pass key is 12345.` in it and ends with the same
line cut before the digits. The digits are generated greedily; only an exact match counts. The
score of a cell is the share of exact matches with its 95 % Wilson interval.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from memlm.data.passkey import Needle, make_needle, passkey_tokens
from memlm.errors import UserError
from memlm.evaluation.conditions import Plan
from memlm.evaluation.config import EvaluationConfig, NeedleOptions
from memlm.evaluation.statistics import wilson
from memlm.evaluation.streaming import batches, generate_greedy, read_context, state_bytes
from memlm.evaluation.tasks.base import Meter, TaskResult, gains
from memlm.evaluation.text import held_out_text


def longest(config: EvaluationConfig) -> int:
    """Tokens of the longest prompt."""
    return max(config.needle.lengths)


def tokens(config: EvaluationConfig, plan: Plan) -> int:
    """Context tokens read over all passes, for the progress bar."""
    return config.needle.trials * sum(config.needle.lengths) * len(plan.passes)


def check(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig, plan: Plan
) -> None:
    """Raise UserError when a needle cannot stand out of attention's reach."""
    distance = least_distance(config.needle, plan)
    pieces = passkey_tokens(tokenizer)
    lines = 2 * (pieces.overhead + config.needle.digits)
    for length in config.needle.lengths:
        if length < distance + lines + 1:
            raise UserError(
                f"needle.lengths: {length} tokens are too short for a needle {distance} tokens "
                f"before the question (attention's reach); use at least {distance + lines + 1}, "
                "or a smaller needle.distance"
            )


def least_distance(options: NeedleOptions, plan: Plan) -> int:
    """Least tokens between the end of the needle and the question."""
    return options.distance if options.distance is not None else plan.attention_reach or 0


def run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    plan: Plan,
    meter: Meter,
) -> TaskResult:
    """Recall per length and condition; `details["cells"]` has the length x depth grid."""
    options = config.needle
    haystack = held_out_text(tokenizer, options.files).tokens
    distance = least_distance(options, plan)
    result = TaskResult("recall (%)", "length (tokens)", {}, {})
    cells = []
    for length in options.lengths:
        trials = [
            place_needle(
                tokenizer,
                haystack,
                length,
                _share(trial % options.depths, options.depths),
                (config.seed, length, trial),
                options.digits,
                distance,
            )
            for trial in range(options.trials)
        ]
        hits: dict[str, list[bool]] = {name: [] for name in plan.conditions}
        for rows in batches(options.trials, config.batch_size):
            found = _ask(model, [trials[row] for row in rows], config, plan, meter, result.cost)
            for name, values in found.items():
                hits[name] += values
        result.scores[str(length)] = {
            name: wilson(sum(values), len(values)) for name, values in hits.items()
        }
        result.memory_gain[str(length)] = gains(hits, higher_is_better=True, binary=True)
        for place in range(options.depths):
            for name, values in hits.items():
                mine = values[place :: options.depths]
                cells.append(
                    {
                        "length": length,
                        "depth": _share(place, options.depths),
                        "condition": name,
                        "score": wilson(sum(mine), len(mine)),
                    }
                )
    result.cost |= meter.rates()
    result.details = {
        "cells": cells,
        "least_distance_tokens": distance,
        "chance": 10.0**-options.digits,
    }
    return result


def _share(place: int, places: int) -> float:
    return place / (places - 1) if places > 1 else 0.5


def place_needle(
    tokenizer: PreTrainedTokenizerBase,
    haystack: np.ndarray,
    length: int,
    depth: float,
    seed: Sequence[int],
    digits: int,
    distance: int,
) -> Needle:
    """A needle at `depth` of the text that lies `distance` tokens or more before the question.

    depth 0 = the start of the text, 1 = as late as the distance allows. The needle stands on the
    line border that is nearest, and on an earlier one where that would be too late.
    """

    def make(position: float) -> Needle:
        # The same draws every time: only the place moves.
        rng = np.random.default_rng(seed)
        return make_needle(tokenizer, haystack, length, position / text, rng, digits)

    text = length
    needle = make(0)
    text = len(needle.context_ids) - passkey_tokens(tokenizer).overhead - digits
    latest = text - distance
    wanted = depth * latest
    while wanted > 0:
        candidate = make(wanted)
        if candidate.position <= latest:
            return candidate
        wanted -= candidate.position - latest
    return needle


def _ask(
    model: nn.Module,
    needles: list[Needle],
    config: EvaluationConfig,
    plan: Plan,
    meter: Meter,
    cost: dict[str, float],
) -> dict[str, list[bool]]:
    """Exact matches of one batch by condition."""
    digits = config.needle.digits
    context, question, answer = (
        _stack([getattr(needle, name) for needle in needles], model)
        for name in ("context_ids", "question_ids", "answer_ids")
    )
    found = {}
    for one in plan.passes:
        with one.ablation():
            with meter.measure("read", context.numel()):
                states = read_context(model, context, config.segment, one.use_memory, meter.advance)
            if "on" in one.conditions:
                cost["state_bytes"] = state_bytes(states)
                cost["memory_state_bytes"] = state_bytes(states, plan.memory_names)
            for condition in one.conditions:
                with meter.measure("generate", digits * len(needles)):
                    written = generate_greedy(
                        model, plan.ablate(states, condition), question, digits, one.use_memory
                    )
                found[condition] = (written == answer[:, :digits]).all(1).tolist()
    return found


def _stack(rows: list[np.ndarray], model: nn.Module) -> Tensor:
    return torch.from_numpy(np.stack(rows)).to(model.device)
