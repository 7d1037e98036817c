"""The loss that the model makes without logits: the same as of logits, and none of them made."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from memlm import MemLMConfig, MemLMForCausalLM, UserError
from memlm.memory.output_memory import OUTPUT
from memlm.training.loss import RowLoss
from memlm.training.replay import ReplayedRows, WholeRows
from tests.training.replay_tools import gradient_error

VOCABULARY = 48
LAYERS = [{"mixer": {"type": "attention", "num_heads": 2}, "memory": "min_gru", "ffn": "swiglu"}]


def build(dtype=torch.float64, **values):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24}
    config = MemLMConfig(**sizes, layers=LAYERS, **values)
    model = MemLMForCausalLM(config).to(dtype).train()
    with torch.no_grad():  # else all tokens are nearly as likely
        model.lm_head.weight *= 40
    return model


def draw(rows=2, length=11):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels = ids.roll(-1, 1)
    labels[0, 2:5] = -100
    return ids, labels, torch.rand(rows, length, generator=generator)


def expected(model, ids, targets, weights, z_loss):
    """The formula, of the logits."""
    logits = model(ids, skip_logits=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    penalties = z_loss * logits.logsumexp(-1).square() * (targets != -100)
    return ((losses.view(targets.shape) + penalties) * weights).sum(), losses.view(targets.shape)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(actual, wanted, tolerance=1e-10):
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (3.0, 0.0), (None, 0.1), (3.0, 0.1)])
def test_loss_and_gradients_are_those_of_logits(tied, softcap, z_loss):
    model = build(tie_word_embeddings=tied, final_logit_softcapping=softcap)
    ids, targets, weights = draw()
    loss, losses = expected(model, ids, targets, weights, z_loss)
    wanted = gradients(model, loss)
    arguments = {"shift_labels": targets, "token_weights": weights, "z_loss": z_loss}
    output = model(ids, **arguments)
    assert output.logits is None and not output.token_losses.requires_grad
    assert_close(output.loss, loss)
    assert_close(output.token_losses, losses)
    assert_close(gradients(model, output.loss), wanted)
    # The same arguments mean the same where there are logits.
    output = model(ids, **arguments, skip_logits=False)
    assert output.token_losses is None
    assert_close(output.loss, loss)
    assert_close(gradients(model, output.loss), wanted)


def test_labels_count_as_in_transformers():
    model = build(torch.float32)
    ids, labels, _ = draw()
    items = torch.tensor(7)
    calls = [
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": items},
        {"labels": labels.masked_fill(labels == -100, 5), "ignore_index": 5},
        {"labels": None, "shift_labels": labels},
        {"labels": labels, "shift_labels": ids, "num_items_in_batch": 3},
    ]
    for arguments in calls:
        logits = model(ids, skip_logits=False).logits
        vocabulary = model.config.vocab_size
        wanted = model.loss_function(logits=logits, vocab_size=vocabulary, **arguments)
        output = model(ids, **arguments)
        assert output.logits is None and len(output.to_tuple()) == 2
        assert_close(output.loss, wanted, 1e-6)
        wanted = gradients(model, wanted)
        assert gradient_error(gradients(model, output.loss), wanted) < 1e-6
        assert_close(model(ids, **arguments, skip_logits=False).loss, output.loss, 1e-6)


def test_rounded_products_are_as_near_as_those_of_logits():
    model = build(torch.float32)
    ids, targets, weights = draw()
    loss, _ = expected(model, ids, targets, weights, 0.0)
    exact = gradients(model, loss)["model.embed_tokens.weight"]
    errors = []
    for skip in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(ids, shift_labels=targets, token_weights=weights, skip_logits=skip)
        assert output.loss.dtype == torch.float32
        found = gradients(model, output.loss)["model.embed_tokens.weight"]
        errors.append(((found - exact).norm() / exact.norm()).item())
        assert output.loss.item() == pytest.approx(loss.item(), rel=0.02)
    assert errors[0] < 1.2 * errors[1] < 0.1


def test_where_logits_stay():
    model = build()
    ids, labels, _ = draw()
    logits = model(ids).logits
    assert model(ids, labels=labels, logits_to_keep=11).logits is not None
    model.eval()
    with torch.no_grad():
        shown = model(ids, labels=labels)
        assert_close(shown.logits, logits)
        hidden = model(ids, labels=labels, skip_logits=True)
    assert hidden.logits is None
    assert_close(hidden.loss.float(), shown.loss, 1e-6)
    model.train()
    model.loss_function = lambda logits, labels, *args, **kwargs: logits.sum() * 0 + 5
    assert model(ids, labels=labels).loss == 5
    del model._loss_function

    class Adapted(nn.Linear):
        """A head that adds something to what its weight gives."""

        def forward(self, hidden):
            return super().forward(hidden) + 1

    plain, adapted = model.lm_head, Adapted(16, VOCABULARY, bias=False)
    adapted.weight = plain.weight
    model.lm_head = adapted
    assert_close(model(ids, labels=labels).logits, logits + 1)
    with pytest.raises(UserError, match="skip_logits: the head is more than its weight"):
        model(ids, labels=labels, skip_logits=True)
    model.lm_head = plain
    handle = plain.register_forward_hook(lambda *call: call[2] + 1)
    assert_close(model(ids, labels=labels).logits, logits + 1)
    handle.remove()
    for arguments, named in (
        ({}, "there are no labels"),
        ({"labels": labels, "logits_to_keep": 1}, "logits_to_keep asks for logits"),
    ):
        with pytest.raises(UserError, match=f"skip_logits: {named}; leave it unset"):
            model(ids, **arguments, skip_logits=True)


def test_an_output_memory_needs_logits():
    model = build(output="neural_cache", final_logit_softcapping=3.0)
    ids, labels, _ = draw()
    assert model(ids, labels=labels).logits is not None
    with pytest.raises(UserError, match="skip_logits: the output memory changes logits"):
        model(ids, labels=labels, skip_logits=True)
    # What it is given is bounded.
    seen = []
    model.memories()[OUTPUT].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    mixed = model(ids).logits
    plain = build(final_logit_softcapping=3.0)(ids).logits
    assert_close(seen[0], plain)
    assert 2 < plain.abs().max() < 3 and not torch.equal(mixed, plain)


def test_logits_are_bounded_wherever_they_are_made():
    free, capped = build().eval(), build(final_logit_softcapping=3.0).eval()
    ids, labels, _ = draw()
    wanted = 3 * torch.tanh(free(ids).logits / 3)
    found = capped(ids, labels=labels)
    assert_close(found.logits, wanted)
    mean = F.cross_entropy(wanted[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(found.loss.double(), mean, 1e-6)
    generated = capped.generate(
        ids, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert_close(generated.logits[0], wanted[:, -1].float(), 1e-6)
    assert capped.flops(11) == free.flops(11)


# --- nothing as large as the logits ---

ROWS, LENGTH, LARGE = 4, 512, 8192


def largest(function):
    """Numbers in the largest piece of memory that an operation takes, those within ours too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    taken = [e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(taken) / 4


def test_neither_a_step_nor_an_evaluation_makes_logits():
    layers = [{"mixer": "min_gru", "ffn": "swiglu"}]
    sizes = {"vocab_size": LARGE, "hidden_size": 16, "intermediate_size": 24}
    model = MemLMForCausalLM(MemLMConfig(**sizes, layers=layers, final_logit_softcapping=9.0))
    ids = torch.randint(0, LARGE, (ROWS, LENGTH))
    ones = torch.ones_like(ids)
    batch = {"input_ids": ids, "segment_ids": ones, "position_ids": ones.cumsum(1) - 1}
    batch |= {"labels": ids.roll(-1, 1), "loss_groups": ones - 1}
    accelerator, row_loss = Accelerator(cpu=True), RowLoss(model, z_loss=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(passes):
        passes.forward(batch, None, torch.ones(2))
        passes.backward()
        optimizer.step()
        optimizer.zero_grad()

    few, logits = 0.05 * ids.numel() * LARGE, ids.numel() * LARGE
    model.train()
    assert largest(lambda: step(WholeRows(accelerator, row_loss, False))) < few
    assert largest(lambda: step(ReplayedRows(accelerator, row_loss, False, 256))) < few
    model.eval()
    with torch.no_grad():
        assert largest(lambda: row_loss(batch)) < few
        assert largest(lambda: model(ids, labels=ids)) >= logits  # so it would be seen
