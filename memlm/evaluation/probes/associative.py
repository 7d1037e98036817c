"""Associative memories in the weights of an attention model trained on `bigrams`.

"Birth of a Transformer: A Memory Viewpoint" (Bietti et al., 2023, arXiv:2306.00802) describes an
induction head as sums of outer products, and measures by memory recall whether a matrix W maps each
embedding to the right other one: the share of pairs (i, j) for which j is the argmax of
<u_j, W v_i>. Its model has one head per layer, no norms, absolute positions, and some of its
matrices stay random. Here every quantity goes through the modules of a trained model, so the probes
differ from those of the paper, as `HeadProbes` says of each.
"""

import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from memlm.data.synthetic.bigrams import GLOBAL, IN_CONTEXT, Bigrams
from memlm.errors import UserError
from memlm.layers.attention import Attention
from memlm.layers.rotary import rotate, rotate_both
from memlm.models import MemLMForCausalLM
from memlm.models.block import Block, Branch
from memlm.models.head_loss import cap_logits

_ROWS_AT_ONCE = 8
_NO_MIXER = "none"


@dataclass(frozen=True)
class HeadProbes:
    """One head of one layer; all numbers are in [0, 1].

    E(k) is the embedding of token k, norm the norm in front of the layer, and copy(k) = W_O W_V
    norm(E(k)) what a head adds to the residual stream of a token whose attention lies on token k
    alone: with the head's own columns of W_O, without the bias of the output. Feed-forward layers
    and other heads are left out. The norm is computed of each vector alone; in the model it is that
    of a sum of which the vector is a part. The candidates of an argmax are all tokens of the task,
    so recall by chance is one over their number.

    Attributes:
        layer: from 0 on.
        head: query heads, from 0 on.
        previous_token: share of tokens, behind the first of a row, whose largest attention weight
            lies on the token before. The paper asks W_K for this with absolute positions; here it
            is read off attention on rows of the task, as positions are rotary.
        previous_weight: mean weight there.
        induction: share of the triggers that occurred before in their row for which the largest
            weight lies right behind such an occurrence. Not in the paper's list of probes.
        induction_weight: mean of the summed weight there.
        output_value: share of tokens k for which k is the argmax of head(norm(copy(k))), with the
            last norm of the model and its head (the paper's recall of W_O W_V in the second layer).
        key_query: for each head g of the layer before, the share of triggers k for which k is the
            argmax over j of <W_Q norm(E(k)), W_K norm(copy_g(j))>: the query of a trigger finds the
            token behind its earlier occurrence. Keys and queries have their own norms, where the
            model has them, and where positions are rotary scores are averages over all distances
            that occur in a row, each counted once. The paper has no W_Q, and takes the argmax over
            triggers for a key. Empty in the first layer.
    """

    layer: int
    head: int
    previous_token: float
    previous_weight: float
    induction: float
    induction_weight: float
    output_value: float
    key_query: list[float]


@dataclass(frozen=True)
class AssociativeProbes:
    """What was found in one model.

    Attributes:
        heads: by layer and head.
        chance: recall of `output_value` and `key_query` by chance.
        bigram_kl_bits: divergence of what the model predicts, when all attention is left out, from
            the chain, KL(chain || model), in bits: the mean over tokens that are no fixed triggers,
            weighted by the stationary distribution. The paper probes one feed-forward layer so;
            here all of them and the direct path from embedding to head count together.
        uniform_kl_bits: the same of a prediction that gives all tokens of the task one probability.
        in_context_bits, global_bits: mean loss behind triggers seen before in their row, and behind
            tokens that are no triggers; None where there are none.
        measures: those of the task `bigrams` on the same rows.
    """

    heads: list[HeadProbes]
    chance: float
    bigram_kl_bits: float
    uniform_kl_bits: float
    in_context_bits: float | None
    global_bits: float | None
    measures: dict[str, float]


@torch.inference_mode()
def probe_associations(
    model: MemLMForCausalLM, task: Bigrams, length: int = 256, rows: int = 32, seed: int = 0
) -> AssociativeProbes:
    """All probes of a model on its own device; attention and losses on fresh rows of the task.

    Args:
        model: in evaluation mode, of at least two layers of plain attention; see `check_model`.
        task: what it was trained on.
        length: tokens of a row.
        rows: rows that are read.
        seed: of the rows.

    Raises:
        UserError: for another model or task, or one that the model has no tokens for.
    """
    check_model(model)
    task.check(length)
    if task.vocabulary > model.config.vocab_size:
        raise UserError(
            f"bigrams: has {task.vocabulary} tokens, the model knows {model.config.vocab_size}"
        )
    if rows < 1:
        raise UserError(f"rows: must be at least 1, got {rows}")
    shares, sums = _read_rows(model, task, length, rows, seed)
    embedded = model.model.embed_tokens.weight[: task.vocabulary]
    triggers = torch.from_numpy(task.trigger_tokens()).to(embedded.device)
    heads: list[HeadProbes] = []
    before: Tensor | None = None
    for layer, block in enumerate(model.model.layers):
        copies = _copies(block.mixer, embedded)
        recalled = _output_value(model, copies)
        found = None if before is None else _key_query(block, embedded, before, triggers, length)
        for head, value in enumerate(recalled.tolist()):
            key_query = [] if found is None else found[head].tolist()
            heads.append(HeadProbes(layer, head, *shares[layer][head], value, key_query))
        before = copies
    bigram, uniform = _bigram_divergence(model, task, embedded)
    in_context, outside = (
        sums[f"nats_{kind}"] / count / math.log(2) if (count := sums[f"count_{kind}"]) else None
        for kind in (IN_CONTEXT, GLOBAL)
    )
    measures = task.measures(sums)
    chance = 1 / task.vocabulary
    return AssociativeProbes(heads, chance, bigram, uniform, in_context, outside, measures)


def check_model(model: nn.Module) -> None:
    """Raise UserError unless a model is made of what the probes can follow.

    That is two layers or more of attention, full or sliding, without gate and convolution, with the
    norm before it, each with a SwiGLU or nothing behind, and no memory.
    """
    if not isinstance(model, MemLMForCausalLM):
        raise UserError(
            f"probes: need a model of memlm with plain attention, got a {type(model).__name__}"
        )
    plans = model.config.plan()
    if len(plans) < 2:
        raise UserError("probes: an induction head needs two layers, the model has one")
    if model.output_memory is not None:
        raise UserError("probes: the model has an output memory, they follow plain attention only")
    for index, plan in enumerate(plans):
        wrong = None
        mixer, spec = plan.mixer or (_NO_MIXER, None)
        if mixer not in ("attention", "sliding_attention"):
            wrong = f"the mixer {mixer}"
        elif spec.output_gate or spec.conv_size:
            wrong = "a gate of its output" if spec.output_gate else "a convolution"
        elif plan.memory is not None:
            wrong = f"the memory {plan.memory[0]}"
        elif plan.ffn is not None and plan.ffn[0] != "swiglu":
            wrong = f"the ffn {plan.ffn[0]}"
        elif plan.norm != "pre":
            wrong = f"norm: {plan.norm}"
        if wrong is not None:
            raise UserError(
                f"probes: layer {index} has {wrong}; valid are attention or sliding_attention "
                "without gate and convolution, swiglu or no ffn, norm: pre, and no memory"
            )


def attention_weights(attention: Attention, hidden: Tensor) -> Tensor:
    """What each token of a row attends to, [B, num_heads, T, T], computed as the module does.

    Args:
        attention: without a convolution.
        hidden: [B, T, hidden_size], what the module is given, from the start of a document on.
    """
    query, key, _ = attention._heads(hidden)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    if attention.rotary is not None:
        query, key = rotate_both(query, key, *attention.rotary.angles(places[None], hidden.dtype))
    key = key.repeat_interleave(attention.num_key_value_groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * attention.scaling
    distance = places[:, None] - places
    visible = distance >= 0
    if attention.window is not None:
        visible &= distance < attention.window
    return scores.masked_fill(~visible, -math.inf).softmax(-1)


def _read_rows(
    model: MemLMForCausalLM, task: Bigrams, length: int, rows: int, seed: int
) -> tuple[list[list[list[float]]], dict[str, float]]:
    """By layer and head, the four numbers of attention; and sums of the task's counts."""
    # A name keeps them apart from rows of training, which have the same seed.
    name = zlib.crc32(b"associative probes")
    examples = [task.example(length, np.random.default_rng([seed, i, name])) for i in range(rows)]
    totals: dict[int, Tensor] = {}
    sums: dict[str, float] = defaultdict(float)
    previous = repeated = 0
    for first in range(0, rows, _ROWS_AT_ONCE):
        batch = examples[first : first + _ROWS_AT_ONCE]
        ids, labels, kinds = (
            torch.from_numpy(np.stack(arrays)).to(model.device)
            for arrays in (
                [example.input_ids for example in batch],
                [example.labels for example in batch],
                [example.marks["kinds"] for example in batch],
            )
        )
        output = model(ids, output_hidden_states=True, use_cache=False)
        losses = nn.functional.cross_entropy(
            output.logits.float().flatten(0, 1), labels.flatten(), reduction="none"
        ).view(labels.shape)
        _add_counts(sums, task, batch, output.logits.argmax(-1), losses)
        # Position s is right for t where the token in front of it is the one at t.
        behind = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.bool, device=ids.device)
        behind[:, :, 1:] = ids[:, :, None] == ids[:, None, :-1]
        behind = behind.tril()
        asked = kinds == IN_CONTEXT
        previous += ids[:, 1:].numel()
        repeated += int(asked.sum())
        for layer, block in enumerate(model.model.layers):
            hidden = block.mixer.norm(output.hidden_states[layer])
            weights = attention_weights(block.mixer.module, hidden)
            found = _attention_sums(weights, behind, asked)
            totals[layer] = totals.get(layer, 0) + found
    counts = torch.tensor([previous, previous, repeated, repeated]).clamp(min=1)
    return [(totals[layer].cpu() / counts).tolist() for layer in sorted(totals)], sums


def _attention_sums(weights: Tensor, behind: Tensor, asked: Tensor) -> Tensor:
    """[num_heads, 4]: hits and weight of the token before, hits and weight of induction.

    Args:
        weights: [B, num_heads, T, T].
        behind: bool [B, T, T], the positions that induction has to find.
        asked: bool [B, T], the positions that look for them.
    """
    largest = weights.argmax(-1)
    places = torch.arange(weights.shape[-1], device=weights.device)
    hits = (largest[:, :, 1:] == places[:-1]).sum((0, 2))
    weight = weights.diagonal(-1, 2, 3).sum((0, 2))
    found = behind[:, None].expand_as(weights).gather(-1, largest[..., None])[..., 0]
    induction = (found & asked[:, None]).sum((0, 2))
    summed = ((weights * behind[:, None]).sum(-1) * asked[:, None]).sum((0, 2))
    return torch.stack([hits, weight, induction, summed], 1).double()


def _add_counts(
    sums: dict[str, float], task: Bigrams, batch: Sequence, guesses: Tensor, losses: Tensor
) -> None:
    """Add what the task counts of a batch, and the losses by kind."""
    for example, guess, loss in zip(
        batch, guesses.cpu().numpy(), losses.cpu().numpy(), strict=True
    ):
        counts = task.counts(example, guess) | task.loss_counts(example, loss)
        for kind in (IN_CONTEXT, GLOBAL):
            chosen = loss[example.marks["kinds"] == kind]
            counts |= {
                f"nats_{kind}": float(chosen.sum(dtype=np.float64)),
                f"count_{kind}": float(len(chosen)),
            }
        for name, count in counts.items():
            sums[name] += count


def _copies(branch: Branch, tokens: Tensor) -> Tensor:
    """What each head adds for attention to one token alone, [num_heads, tokens, hidden_size].

    tokens: [tokens, hidden_size], in front of the norm.
    """
    attention = branch.module
    values = attention._heads(branch.norm(tokens))[2]
    values = values.repeat_interleave(attention.num_key_value_groups, 1)
    columns = attention.o_proj.weight.unflatten(1, (attention.num_heads, attention.head_dim))
    return torch.einsum("nhd,ohd->hno", values, columns)


def _output_value(model: MemLMForCausalLM, copies: Tensor) -> Tensor:
    """Recall of each token by the head of the model, [num_heads]."""
    tokens = copies.shape[1]
    best = model.lm_head(model.model.norm(copies))[..., :tokens].argmax(-1)
    return (best == torch.arange(tokens, device=best.device)).double().mean(-1)


def _key_query(
    block: Block, embedded: Tensor, before: Tensor, triggers: Tensor, length: int
) -> Tensor:
    """Recall of each trigger by its query, [num_heads, heads of the layer before].

    Args:
        block: the layer.
        embedded: [tokens, hidden_size].
        before: copies of the layer before, [heads, tokens, hidden_size].
        triggers: int64 [K].
        length: tokens of a row.
    """
    attention, norm = block.mixer.module, block.mixer.norm
    query = attention._heads(norm(embedded[triggers]))[0]  # [K, num_heads, head_dim]
    key = attention._heads(norm(before))[1]  # [heads before, tokens, key heads, head_dim]
    if attention.rotary is not None:
        reach = min(length, attention.window or length)
        places = torch.arange(max(2, reach), device=query.device)
        cos, sin = attention.rotary.angles(places, query.dtype)
        # A rotation is linear in cosine and sine, so their means give the mean score.
        query = rotate(query, cos[1:].mean(0), sin[1:].mean(0))
        key = rotate(key, cos[0], sin[0])
    key = key.repeat_interleave(attention.num_key_value_groups, 2)
    best = torch.einsum("qhd,gjhd->hgqj", query, key).argmax(-1)
    return (best == triggers).double().mean(-1)


def _bigram_divergence(
    model: MemLMForCausalLM, task: Bigrams, embedded: Tensor
) -> tuple[float, float]:
    """`bigram_kl_bits` and `uniform_kl_bits`."""
    hidden = embedded[None]
    for block in model.model.layers:
        if block.ffn is not None:
            hidden = hidden + block.ffn.module(block.ffn.norm(hidden))
    logits = model.lm_head(model.model.norm(hidden))[0]
    logits = cap_logits(logits, model.config.final_logit_softcapping)
    guessed = logits.double().log_softmax(-1)[:, : task.vocabulary].cpu().numpy()
    chain, weights = task.chain, task.start.copy()
    if task.fixed_triggers:
        weights[task.trigger_tokens()] = 0
        if not weights.any():
            raise UserError("probes: every token that the chain visits is a trigger; take fewer")
    logs = np.log(chain, out=np.zeros_like(chain), where=chain > 0)
    uniform = np.full_like(guessed, -math.log(task.vocabulary))
    divergences = (
        np.average((chain * (logs - other)).sum(1), weights=weights) / math.log(2)
        for other in (guessed, uniform)
    )
    model_bits, uniform_bits = map(float, divergences)
    return model_bits, uniform_bits
