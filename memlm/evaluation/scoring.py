"""The loss at every token of a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.evaluation.subject import Subject


def score_targets(
    subject: Subject, inputs: Tensor, targets: Tensor, states: Any, use_memory: bool = True
) -> tuple[Tensor, Any]:
    """Loss at every target, going on from `states`, and the states after them.

    Args:
        subject: the model.
        inputs: int64 [B, T].
        targets: int64 [B, T], what should follow each token; -100 = not scored, and the token is
            padding: nothing is read or written there.
        states: where the rows stand, may be used up; None = at the start of a document.
        use_memory: False = memories give zero.

    Returns:
        Losses float32 [B, T] in nats (0 where not scored) on the CPU, and the states.
    """
    mask = targets != -100
    losses = []
    size = subject.logits_at_once(len(inputs))
    for tokens, wanted, real in zip(
        inputs.split(size, dim=1), targets.split(size, dim=1), mask.split(size, dim=1), strict=True
    ):
        padding = None if bool(real.all()) else real.to(subject.device)
        logits, states = subject.score(tokens.to(subject.device), padding, states, use_memory)
        loss = F.cross_entropy(
            logits.float().transpose(1, 2), wanted.to(subject.device), reduction="none"
        )
        losses.append(loss.cpu())
    return torch.cat(losses, dim=1), states


def guess_and_score(
    subject: Subject, inputs: Tensor, targets: Tensor, states: Any, use_memory: bool = True
) -> tuple[Tensor, Tensor, Any]:
    """The most likely answers and the losses of the right ones, going on from `states`.

    Args:
        subject: the model.
        inputs: int64 [B, T], all of them read.
        targets: int64 [B, T], the right answer behind each token; -100 = none is asked.
        states: where the rows stand, may be used up; None = at the start of a document.
        use_memory: False = memories give zero.

    Returns:
        Guesses int64 [B, T], losses float32 [B, T] in nats (0 where none is asked), both on the
        CPU, and the states.
    """
    guesses, losses = [], []
    size = subject.logits_at_once(len(inputs))
    for tokens, wanted in zip(inputs.split(size, dim=1), targets.split(size, dim=1), strict=True):
        logits, states = subject.score(tokens.to(subject.device), None, states, use_memory)
        guesses.append(logits.argmax(-1).cpu())
        asked = wanted != -100
        loss = torch.zeros(wanted.shape)
        at = asked.to(subject.device)
        right = wanted[asked].to(subject.device)
        loss[asked] = F.cross_entropy(logits[at].float(), right, reduction="none").cpu()
        losses.append(loss)
    return torch.cat(guesses, dim=1), torch.cat(losses, dim=1), states


def pad_documents(documents: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Inputs and targets int64 [B, longest - 1]; targets are -100 behind the end of a document."""
    length = max(map(len, documents)) - 1
    inputs = torch.zeros(len(documents), length, dtype=torch.int64)
    targets = torch.full_like(inputs, -100)
    for row, document in enumerate(documents):
        values = torch.from_numpy(document.astype(np.int64))
        inputs[row, : len(document) - 1] = values[:-1]
        targets[row, : len(document) - 1] = values[1:]
    return inputs, targets
