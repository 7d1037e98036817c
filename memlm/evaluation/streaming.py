"""Reading long contexts in segments, and answering from the states they leave."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.layers.state import MemoryState

States = dict[str, MemoryState]

# Logits held at a time when every position is scored: 0.25 GB of float32.
_LOGITS = 1 << 26


def segments(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `length` tokens."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def batches(count: int, size: int) -> Iterator[range]:
    """Ranges that cover `count` rows in few batches of about `size`, evenly filled.

    Swapping needs a second row: no batch has a single one, so with a size of two some have three.
    """
    number = max(1, min(-(-count // size), count // 2))
    for index in range(number):
        yield range(count * index // number, count * (index + 1) // number)


def read_context(
    model: nn.Module,
    tokens: Tensor,
    segment: int,
    use_memory: bool = True,
    progress: Callable[[int], None] = lambda tokens: None,
) -> States:
    """The states after reading `tokens` (int64 [B, T]) from the start of a document.

    Only one segment is held at a time, so the memory used does not grow with T beyond the
    model's own states. `progress` is told the tokens read after every segment.
    """
    states: States | None = None
    for part in segments(tokens.shape[1], segment):
        states = model(
            input_ids=tokens[:, part],
            memory_states=states,
            use_memory=use_memory,
            logits_to_keep=1,
            return_memory_states=True,
        ).memory_states
        progress(tokens[:, part].numel())
    return states


def generate_greedy(
    model: nn.Module,
    states: States,
    question: Tensor,
    new_tokens: int,
    use_memory: bool = True,
) -> Tensor:
    """The most likely continuation of `question` (int64 [B, T]) after what `states` have read.

    Token by token with carried states: int64 [B, new_tokens].
    """
    generated = []
    tokens = question
    for _ in range(new_tokens):
        output = model(
            input_ids=tokens,
            memory_states=states,
            use_memory=use_memory,
            logits_to_keep=1,
            return_memory_states=True,
        )
        states = output.memory_states
        tokens = output.logits[:, -1].argmax(-1, keepdim=True)
        generated.append(tokens)
    return torch.cat(generated, dim=1)


def score_targets(
    model: nn.Module,
    tokens: Tensor,
    targets: Tensor,
    states: States | None,
    use_memory: bool = True,
) -> tuple[Tensor, Tensor, States]:
    """Loss and best guess at every target, going on from `states`.

    Args:
        model: the model.
        tokens: int64 [B, T].
        targets: int64 [B, T], what should follow each token; -100 = not scored. Where a row has
            no target any more its tokens count as padding: nothing is read or written there.
        states: where the rows stand; None = at the start of a document.
        use_memory: as in the model.

    Returns:
        losses float32 [B, T] in nats (0 where not scored), guesses int64 [B, T], new states.
    """
    # A target ahead keeps a token alive: questions may stand between tokens without a target.
    ahead = (targets != -100).flip(1).cumsum(1).flip(1) > 0
    size = max(1, _LOGITS // (tokens.shape[0] * model.config.vocab_size))
    losses, guesses = [], []
    for part in segments(tokens.shape[1], size):
        mask = ahead[:, part]
        output = model(
            input_ids=tokens[:, part],
            attention_mask=None if bool(mask.all()) else mask.long(),
            memory_states=states,
            use_memory=use_memory,
            return_memory_states=True,
        )
        states = output.memory_states
        logits = output.logits.float().transpose(1, 2)
        losses.append(F.cross_entropy(logits, targets[:, part], reduction="none"))
        guesses.append(logits.argmax(1))
    return torch.cat(losses, dim=1), torch.cat(guesses, dim=1), states


def state_bytes(states: States, names: Sequence[str] | None = None) -> int:
    """Bytes of the states of one row; only of the states `names` when given."""
    chosen = states.values() if names is None else [states[name] for name in names]
    return sum(state.nbytes // state.batch_size for state in chosen)
