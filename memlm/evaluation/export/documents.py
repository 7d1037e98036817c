"""Trials as documents of lm-evaluation-harness: text that it tokenises to the same ids."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from memlm.data.corpus import adds_bos
from memlm.errors import UserError
from memlm.evaluation.babilong.labels import LABELS, answer_labels, found_labels
from memlm.evaluation.prompts import Question
from memlm.evaluation.tasks.base import PromptTask, Setting

_LABELLED = re.compile(r"(?:babilong_qa|stories_)(\d+)")


@dataclass(frozen=True)
class Documents:
    """All documents of a setting.

    Attributes:
        rows: one per question.
        least_new_tokens, new_tokens: most tokens of an answer, of the question that allows fewest
            and of the one that allows most.
        tokens: of the longest prompt.
    """

    rows: list[dict[str, Any]]
    least_new_tokens: int
    new_tokens: int
    tokens: int


def make_documents(task: PromptTask, setting: Setting) -> Documents:
    """The plain prompts of a setting, those that eval.py asks in the condition "on".

    Raises:
        UserError: for a prompt whose text has other tokens than the prompt.
    """
    tokenizer = task.tools.tokenizer
    rows, new_tokens, tokens = [], [], 0
    for index, number, ids, question in _prompts(task, setting):
        where = f"{task.name}: {setting.label}, trial {index}"
        text = checked_text(tokenizer, ids, where)
        target, *_ = question.references
        rows.append(
            {
                "trial": index,
                "question": number,
                "text": text,
                "target": target,
                "references": list(question.references),
                **_labels(task.name, tokenizer.decode(question.token_ids.tolist()), target),
            }
        )
        new_tokens.append(question.new_tokens)
        tokens = max(tokens, len(ids))
    return Documents(rows, min(new_tokens), max(new_tokens), tokens)


def _prompts(task: PromptTask, setting: Setting) -> Iterator[tuple[int, int, np.ndarray, Question]]:
    """Trial, number of the question, all ids of the prompt, and the question.

    Every question goes on from the context.
    """
    for index in range(setting.trials):
        trial = task.trial(int(setting.label), index)
        context = trial.context.read(0, len(trial.context))
        for number, question in enumerate(trial.questions):
            yield index, number, np.concatenate([context, question.token_ids]), question


def checked_text(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, where: str) -> str:
    """The text of a prompt, which the harness tokenises to `ids` again.

    Raises:
        UserError: when it does not: scores would be those of other prompts.
    """
    first = int(adds_bos(tokenizer) and len(ids) > 0 and ids[0] == tokenizer.bos_token_id)
    text = tokenizer.decode(ids[first:].tolist(), clean_up_tokenization_spaces=False)
    found = np.asarray(tokenizer(text, verbose=False)["input_ids"])
    if not np.array_equal(found, ids):
        size = min(len(found), len(ids))
        differs = np.flatnonzero(found[:size] != ids[:size])
        place = int(differs[0]) if len(differs) else size
        raise UserError(
            f"{where}: as text the prompt has {len(found)} tokens instead of {len(ids)}, others "
            f"from token {place} on; this tokenizer cannot export the task, choose tasks that are "
            "built as text (ruler, retention and recall_completion are) or a byte tokenizer"
        )
    return text


def _labels(task: str, question: str, answer: str) -> dict[str, list[str]]:
    """What the score of BABILong and stories needs beside the references."""
    found = _LABELLED.fullmatch(task)
    if found is None:
        return {}
    number = int(found[1])
    return {
        "labels": sorted(label.lower() for label in LABELS[number]),
        "asked": sorted(found_labels(number, question)),
        "named": sorted(answer_labels(number, answer)),
    }
