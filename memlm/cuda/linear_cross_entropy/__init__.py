"""The cross-entropy of a linear head, without its logits.

Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009.
"""

from torch import Tensor

from memlm.cuda.dispatch import choose_name
from memlm.cuda.linear_cross_entropy import operator
from memlm.cuda.linear_cross_entropy.inputs import Inputs

__all__ = ["linear_cross_entropy"]

IGNORED = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    *,
    ignore_index: int = IGNORED,
    softcap: float | None = None,
    z_loss: float = 0.0,
    shift: bool = False,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the tokens' losses.

    With the logits ``x = weight @ hidden_i``, or ``softcap tanh(x / softcap)``, and the logarithm
    ``lse_i`` of the sum of their exponentials, token i has the negative log-likelihood
    ``lse_i - x[target_i]``, and the loss is the sum of
    ``token_weight_i (lse_i - x[target_i] + z_loss lse_i^2)``. Logits and all sums are
    float32 (float64 of float64) where the operands of the products are shorter or autocast shortens
    them. Gradients may be made along with the loss, so only one backward pass is possible.

    Args:
        hidden: ``[..., D]``, the outputs of the last layer.
        weight: ``[V, D]``, of the head.
        targets: int64 ``[...]``, the next token of each, `ignore_index` where there is none.
        token_weights: float32 ``[...]``, not differentiated; None = 1 for every token.
        ignore_index: the target of a token that does not count, whatever its weight.
        softcap: bound of the logits, of either sign; None = none.
        z_loss: weight of the squared logarithm.
        shift: the targets are the tokens themselves, and each predicts the one behind it along the
            last dimension; the last one has no target.

    Returns:
        The loss, a float32 scalar (float64 of float64 inputs) with gradients for hidden and weight,
        and the negative log-likelihoods in nats, shaped as `targets` and in the loss's type,
        without gradient, 0 where there is no target.

    Raises:
        ValueError: shapes or values that do not fit together. That a target is neither a row of the
            weight nor `ignore_index` is seen on the CPU alone, where it costs no waiting; on a GPU
            the result is undefined.
        RuntimeError: in a second backward pass through one loss.
    """
    inputs = Inputs.of_call(
        hidden, weight, targets, token_weights, ignore_index, softcap, z_loss, shift
    )
    name = choose_name("linear_cross_entropy", operator.refusals(inputs), hidden.device)
    loss, losses = operator.run(name, inputs)
    return loss, losses.view(targets.shape)
