import pytest
import torch

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.evaluation.plots import draw_surprise
from memlm.memory.records import count_updates, record_surprise


def build(variant="lmm", **options):
    torch.manual_seed(0)
    mixer = {"type": "titans", "variant": variant, "num_heads": 2, "head_dim": 8, **options}
    if variant != "lmm":
        mixer |= {"window": 8, "segment": 5}
    layers = [{"repeat": 2, "mixer": mixer}]
    return MemLMForCausalLM(MemLMConfig(hidden_size=16, layers=layers)).double()


@torch.no_grad()
@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_surprise_of_every_token_wherever_the_calls_were_cut(variant):
    model = build(variant)
    ids = torch.randint(1, 40, (2, 17))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with record_surprise(model) as whole:
        model(ids, attention_mask=mask)
    states = None
    with record_surprise(model) as pieces:
        for tokens, valid in zip(ids.split([3, 9, 5], 1), mask.split([3, 9, 5], 1), strict=True):
            output = model(
                tokens, attention_mask=valid, memory_states=states, return_memory_states=True
            )
            states = output.memory_states
    assert len(whole) == 2
    for name, record in whole.items():
        surprise = record.joined()
        assert surprise.shape == (2, 17, 2)
        assert (surprise[mask.bool()] > 0).all() and not surprise[1, :4].any()
        torch.testing.assert_close(pieces[name].joined(), surprise)
    model(ids)
    assert len(record.calls) == 1  # nothing is recorded any more


@torch.no_grad()
def test_surprise_is_the_loss_of_the_first_token_at_the_initial_weights():
    model = build(depth=1, conv_size=None)
    ids = torch.randint(1, 40, (1, 3))
    with record_surprise(model) as records:
        model(ids)
    branch = model.model.layers[0].mixer
    x = branch.norm(model.model.embed_tokens(ids[:, 0]))
    v = torch.nn.functional.silu(branch.module.memory.v_proj(x)).view(2, 8)
    found = next(iter(records.values())).joined()
    torch.testing.assert_close(found[0, 0], v.square().sum(-1))  # the initial weights are zero


def test_surprise_can_be_drawn():
    picture = draw_surprise({"0.mixer": torch.rand(2, 50, 2), "1.mixer": torch.rand(2, 50, 2)})
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


@torch.no_grad()
def test_clipped_and_broken_updates_are_counted():
    model = build(depth=2, clip=1e-6)
    ids = torch.randint(1, 40, (2, 9))
    with count_updates(model) as counts:
        model(ids)
        first = counts["model.layers.0.mixer.module.memory"]
        assert first.read().tolist() == [36, 36, 0]
        assert first.read().tolist() == [0, 0, 0]
        model.model.layers[0].mixer.module.memory.initial_weights[1][0, 0, 0] = torch.inf
        model(ids)
    # 18 tokens read the broken head, whose two layers are broken in both rows; the next layer gets
    # what is not finite already and is not to blame.
    reads, _, broken = first.read().tolist()
    assert reads == 36 and broken >= 18
    assert counts["model.layers.1.mixer.module.memory"].read()[2] == 0
