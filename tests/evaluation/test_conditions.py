import pytest
import torch

from memlm.evaluation.conditions import attention_reach, make_plan

CONTROLS = ("changed", "absent")


def _states(model, rows=3, length=30):
    with torch.no_grad():
        tokens = torch.randint(0, 256, (rows, length))
        return model(tokens, return_memory_states=True).memory_states


def test_reset_and_swapped_touch_memories_only(gated_delta):
    plan, states = make_plan(gated_delta), _states(gated_delta)
    fresh = gated_delta.model.init_states(3)
    names = set(plan.memory_names)
    assert names and names < set(states)
    reset, swapped = plan.ablate(states, "reset"), plan.ablate(states, "swapped")
    for name, state in states.items():
        for field, value in state.tensors().items():
            if name not in names:
                assert torch.equal(reset[name].tensors()[field], value)
                assert torch.equal(swapped[name].tensors()[field], value)
                continue
            assert torch.equal(reset[name].tensors()[field], fresh[name].tensors()[field])
            assert torch.equal(swapped[name].tensors()[field], value.roll(1, 0))
            assert not torch.equal(swapped[name].tensors()[field], value)


def test_a_single_row_cannot_be_swapped(gated_delta):
    with pytest.raises(ValueError, match="two rows"):
        make_plan(gated_delta).ablate(_states(gated_delta, rows=1), "swapped")


def test_a_table_of_values_is_zeroed(tiny_model):
    model = tiny_model(ffn={"type": "product_key", "num_keys": 8, "num_heads": 1, "top_k": 2})
    plan = make_plan(model)
    assert plan.conditions == ("on", "off", "zeroed", *CONTROLS)
    assert "do not apply" in plan.notes[0]
    tokens = torch.randint(0, 256, (2, 12))
    with torch.no_grad():
        found = {}
        for one in plan.passes[:3]:
            with one.ablation():
                found[one.conditions[0]] = model(tokens, use_memory=one.use_memory).logits
        assert torch.equal(model(tokens).logits, found["on"])
    assert not torch.allclose(found["on"], found["zeroed"])


def test_a_table_beside_a_memory_keeps_all_conditions(tiny_model):
    model = tiny_model(
        memory="gated_delta", ffn={"type": "product_key", "num_keys": 8, "num_heads": 1, "top_k": 2}
    )
    every = ("on", "off", "reset", "swapped", "zeroed", *CONTROLS)
    assert make_plan(model).conditions == every


def test_output_memories(tiny_model):
    model = tiny_model()
    model.set_output_memory({"type": "neural_cache", "capacity": 8})
    assert make_plan(model).conditions == ("on", "off", "reset", "swapped", *CONTROLS)
    # A corpus is neither a state nor values that could be zeroed.
    model.set_output_memory({"type": "knn_lm", "store": "somewhere"})
    plan = make_plan(model)
    assert plan.conditions == ("on", "off", *CONTROLS) and not plan.notes


def test_without_memory_there_is_nothing_to_take_away(tiny_model):
    plan = make_plan(tiny_model())
    assert plan.conditions == ("on", *CONTROLS)
    assert "no memory" in plan.notes[0]


def test_attention_reach(tiny_model):
    assert attention_reach(tiny_model(memory="gated_delta")) == 2 * (16 - 1 + 3)
    assert attention_reach(tiny_model(mixer="attention")) is None


def test_full_attention_is_said_to_look_back(tiny_model):
    plan = make_plan(tiny_model(mixer="attention", memory="gated_delta"))
    assert any("look back" in note for note in plan.notes)


def test_nothing_outside_the_reach_is_seen(tiny_model):
    """The reach is a bound: with the memory off, a token further away changes nothing."""
    model = tiny_model(memory="gated_delta")
    reach = attention_reach(model)
    tokens = torch.randint(0, 256, (1, reach + 12))
    other = tokens.clone()
    other[0, 3] = (other[0, 3] + 1) % 256
    with torch.no_grad():
        before, after = (model(t, use_memory=False).logits[0] for t in (tokens, other))
    changed = (before != after).any(-1).nonzero().flatten().tolist()
    assert max(changed) == 3 + reach


def test_only_what_is_wanted_is_planned(gated_delta):
    plan = make_plan(gated_delta, ["reset", "absent"])
    assert plan.conditions == ("on", "reset", "absent") and not plan.swaps
    assert [one.variant for one in plan.passes] == ["plain", "absent"]
    assert make_plan(gated_delta, ["off"]).conditions == ("on", "off")
