"""The laws every memory obeys, as functions of a case (a memory at a site of a tiny model).

`LAWS` maps the name of a law to `law(case, data)`, where `data` draws splits, paddings and
packings from Hypothesis. test_laws.py runs every law on every case of `cases()`; a memory enters by
one line in `SPECS`.
"""

import copy
import dataclasses
import functools
import itertools
import os
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.memory import memory_names
from memlm.models.block import Branch

VOCABULARY = 40
LENGTH = 21
WINDOW = 6  # not below the segment of any spec
ATTENTION = {"type": "sliding_attention", "window": WINDOW, "num_heads": 2, "conv_size": 3}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclasses.dataclass(frozen=True)
class Spec:
    """One way to configure a memory for the laws.

    Attributes:
        sites: where it is tried: mixer, memory, parallel (the memory site beside the mixer), ffn.
        options: its entry in `layers`, without the type.
        label: tells several specs of one memory apart.
        without_gradient: fields of its state that take no gradient by design (stores).
        stable: further options in float32, for a memory that is chaotic with its usual ones.
    """

    sites: tuple[str, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""
    without_gradient: tuple[str, ...] = ()
    stable: dict[str, Any] = dataclasses.field(default_factory=dict)


# The only thing a new memory adds here.
EVERYWHERE = ("mixer", "memory", "parallel")
GATED_DELTA = {"num_heads": 2, "num_v_heads": 4, "head_dim": 8}
TITANS = {"num_heads": 2, "head_dim": 8, "expansion": 2, "chunk_size": 4}
PRODUCT_KEY = {"num_keys": 6, "num_heads": 2, "top_k": 3}
KNN_CACHE = {"capacity": 12, "segment": 4, "key_size": 8, "top_k": 3, "num_heads": 2}
SPECS: dict[str, list[Spec]] = {
    "gated_delta": [Spec(EVERYWHERE, GATED_DELTA)],
    "knn_cache": [
        Spec(("memory", "parallel"), KNN_CACHE),
        Spec(("memory", "parallel"), {**KNN_CACHE, "share": "store"}, "shared"),
    ],
    "product_key": [
        Spec(("ffn", "memory"), PRODUCT_KEY),
        Spec(("ffn",), {**PRODUCT_KEY, "share": "table"}, "shared"),
    ],
    "titans": [
        Spec(EVERYWHERE, {**TITANS, "depth": 1}, "depth1"),
        Spec(EVERYWHERE, {**TITANS, "depth": 2}, "depth2", stable={"theta_max": 1e-3}),
    ],
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A memory, one of its specs and a site."""

    memory: str
    site: str
    spec: Spec

    def __str__(self) -> str:
        return "-".join(filter(None, (self.memory, self.spec.label, self.site)))

    def entry(self, **options: Any) -> dict[str, Any]:
        """The value of the site in `layers`."""
        parallel = {"parallel": True} if self.site == "parallel" else {}
        return {"type": self.memory, **self.spec.options, **parallel, **options}

    def layers(self, with_memory: bool = True, **options: Any) -> list[dict[str, Any]]:
        """Two layers with the memory at its site, or with nothing there (the base model)."""
        pattern: dict[str, Any] = {"repeat": 2, "mixer": ATTENTION, "ffn": "swiglu"}
        site = "memory" if self.site == "parallel" else self.site
        pattern[site] = self.entry(**options) if with_memory else None
        return [pattern]


def cases() -> list[Case]:
    """Every registered memory at each of its sites."""
    return [
        Case(name, site, spec)
        for name in memory_names()
        for spec in SPECS.get(name, ())
        for site in spec.sites
    ]


def build_model(
    layers: list[dict[str, Any]], dtype: torch.dtype = torch.float64, seed: int = 0
) -> MemLMForCausalLM:
    """A tiny model whose every weight is far from its start value and from symmetry.

    In float32 the weights are smaller: deep memories that learn while they read are chaotic
    otherwise, and any two orders of summation drift apart.
    """
    torch.manual_seed(seed)
    spread = 0.1 if dtype == torch.float64 else 0.05
    config = MemLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        layers=layers,
        initializer_range=2 * spread,
        pad_token_id=0,
    )
    model = MemLMForCausalLM(config).to(dtype).eval()
    kept = {id(module.gate) for module in model.modules() if isinstance(module, Branch)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter += spread * torch.randn_like(parameter)
    return model


@functools.lru_cache(maxsize=4)
def model_of(case: Case, dtype: torch.dtype = torch.float64) -> MemLMForCausalLM:
    """The model of a case; laws that change it take a copy."""
    return build_model(case.layers(**(case.spec.stable if dtype == torch.float32 else {})), dtype)


def memory_states(model: MemLMForCausalLM, states: dict) -> dict:
    """Only the states that belong to memories."""
    return {name: states[name] for name in model.memory_state_names()}


def snapshot(states: dict) -> dict[str, dict[str, Tensor]]:
    """A deep copy of all tensors."""
    return {
        name: {key: tensor.detach().clone() for key, tensor in state.tensors().items()}
        for name, state in states.items()
    }


def assert_same_bits(states: dict, before: dict[str, dict[str, Tensor]]) -> None:
    """Raise AssertionError unless the states hold exactly the tensors of a snapshot."""
    assert states.keys() == before.keys()
    for name, state in states.items():
        tensors = state.tensors()
        assert tensors.keys() == before[name].keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == before[name][key].dtype
            assert torch.equal(tensor, before[name][key]), f"{name}.{key} changed"


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Raise AssertionError where two tensors differ by more than the dtype's tolerance.

    The tolerance is relative to the largest expected entry: logits are sums of large terms.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if actual.numel():
        tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
        error, scale = (actual - expected).abs().max(), expected.abs().max().clamp(min=1)
        assert error <= tolerance * scale, f"error {error:.2e} at scale {scale:.2e}"


def draw_ids(data, batch_size: int, length: int = LENGTH) -> Tensor:
    """Random tokens without the padding token."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="tokens"))
    return torch.randint(1, VOCABULARY, (batch_size, length), generator=generator)


def draw_cuts(data, length: int = LENGTH) -> list[int]:
    """Where to split `length` tokens: token by token, or at a few random places."""
    places = st.lists(st.integers(1, length - 1), min_size=1, max_size=6, unique=True)
    one_by_one = st.just(list(range(1, length)))
    return sorted(data.draw(st.one_of(places, places, one_by_one), label="cuts"))


def pieces(cuts: list[int], length: int = LENGTH) -> list[slice]:
    """The pieces between the cuts."""
    borders = [0, *cuts, length]
    return [slice(start, end) for start, end in itertools.pairwise(borders)]


def run(model: MemLMForCausalLM, ids: Tensor | None, states: dict | None = None, **kwargs: Any):
    """Logits and states of one call."""
    out = model(ids, memory_states=states, return_memory_states=True, **kwargs)
    return out.logits, out.memory_states


@torch.no_grad()
def chunk(case: Case, data) -> None:
    """Any split of a sequence, the state passed on, equals one call."""
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]), label="dtype")
    model = model_of(case, dtype)
    ids = draw_ids(data, 2)
    parts, states = [], None
    for piece in pieces(draw_cuts(data)):
        logits, states = run(model, ids[:, piece], states)
        parts.append(logits)
    assert_close(torch.cat(parts, 1), run(model, ids)[0])


@torch.no_grad()
def isolation(case: Case, data) -> None:
    """Rows never mix; reset rows behave as new and leave the others alone."""
    model = model_of(case)
    ids = draw_ids(data, 3)
    cut = data.draw(st.integers(1, LENGTH - 1), label="cut")
    whole, _ = run(model, ids)
    for row in range(3):
        assert_close(whole[row : row + 1], run(model, ids[row : row + 1])[0])

    first, states = run(model, ids[:, :cut])
    assert_close(first, whole[:, :cut])
    rows = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3, max_size=3), label="reset"))
    states = {name: state.reset(rows) for name, state in states.items()}
    second, _ = run(model, ids[:, cut:], states)
    as_new, _ = run(model, ids[:, cut:])
    assert_close(second, torch.where(rows[:, None, None], as_new, whole[:, cut:]))
    everything = {name: state.reset() for name, state in states.items()}
    assert_close(run(model, ids[:, cut:], everything)[0], as_new)


@torch.no_grad()
def off(case: Case, data) -> None:
    """A gate of zero and use_memory=False both give the base model's logits, bit by bit."""
    ids = draw_ids(data, 2)
    cut = data.draw(st.integers(1, LENGTH - 1), label="cut")
    gated = build_model(case.layers(gate=0.0))
    base = build_model(case.layers(with_memory=False))
    assert not base.load_state_dict(gated.state_dict(), strict=False).missing_keys
    expected, _ = run(base, ids)
    expected_rest, _ = run(base, ids[:, cut:], run(base, ids[:, :cut])[1])
    for options in ({}, {"use_memory": False}):
        assert torch.equal(run(gated, ids, **options)[0], expected)
        _, states = run(gated, ids[:, :cut], **options)
        assert torch.equal(run(gated, ids[:, cut:], states, **options)[0], expected_rest)
    # With the gate open, use_memory=False still is the base.
    model = copy.deepcopy(model_of(case))
    assert not base.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert torch.equal(run(model, ids, use_memory=False)[0], run(base, ids)[0])


@torch.no_grad()
def causal(case: Case, data) -> None:
    """A token never changes an output before it."""
    model = model_of(case)
    ids = draw_ids(data, 2)
    place = data.draw(st.integers(1, LENGTH - 1), label="place")
    changed = ids.clone()
    changed[:, place:] = 1 + ids[:, place:] % (VOCABULARY - 1)
    before, after = run(model, ids)[0], run(model, changed)[0]
    assert_close(after[:, :place], before[:, :place])
    assert not torch.allclose(after[:, place:], before[:, place:])


@torch.no_grad()
def acts(case: Case, data) -> None:
    """The branch matters; a memory with a state hands tokens on beyond the attention's reach."""
    model = model_of(case)
    ids = draw_ids(data, 1)
    logits, _ = run(model, ids)
    assert (logits - run(model, ids, use_memory=False)[0]).abs().amax() > 1e-3
    if not model.memory_state_names():
        return
    alone = build_model([{**case.layers()[0], "repeat": 1}])
    changed = ids.clone()
    changed[0, :4] = 1 + ids[0, :4] % (VOCABULARY - 1)
    far = slice(4 + WINDOW + 2, None)  # past the window and the convolution of the one attention
    difference = run(alone, ids)[0] - run(alone, changed)[0]
    assert difference[:, far].abs().amax() > 1e-6


@torch.no_grad()
def fork(case: Case, data) -> None:
    """States can be cloned, repeated, reordered, selected, saved and loaded."""
    model = model_of(case)
    ids = draw_ids(data, 3)
    cut = data.draw(st.integers(1, LENGTH - 1), label="cut")
    _, states = run(model, ids[:, :cut])
    before = snapshot(states)
    rest = ids[:, cut:]
    expected, _ = run(model, rest, states)

    copies = {name: state.clone() for name, state in states.items()}
    run(model, rest.flip(0), copies)
    assert_same_bits(states, before)
    assert_same_bits({name: state.to("cpu").detach() for name, state in states.items()}, before)

    twice = {name: state.repeat(2) for name, state in states.items()}
    both, _ = run(model, torch.stack([rest, rest.roll(1, 0)], 1).flatten(0, 1), twice)
    assert_close(both[::2], expected)
    assert_close(both[1::2], run(model, rest.roll(1, 0), states)[0])

    order = torch.tensor(data.draw(st.permutations([0, 1, 2]), label="order"))
    for operation in ("select", "reorder"):
        moved = {name: getattr(state, operation)(order) for name, state in states.items()}
        assert_close(run(model, rest[order], moved)[0], expected[order])

    with tempfile.TemporaryDirectory() as folder:
        loaded = {}
        for name, state in states.items():
            file = os.path.join(folder, f"{name}.safetensors")
            save_file(state.state_dict(), file)
            loaded[name] = type(state).from_state_dict(load_file(file))
    assert_same_bits(loaded, before)
    assert torch.equal(run(model, rest, loaded)[0], expected)


def reference(case: Case, data) -> None:
    """The reference implementation gives the eager one's logits and gradients."""
    model = copy.deepcopy(model_of(case))
    ids = draw_ids(data, 2)
    cut = data.draw(st.integers(1, LENGTH - 1), label="cut")
    results = {}
    for name in ("reference", "eager", "auto"):
        with mock.patch.dict(os.environ, MEMLM_KERNELS=name):
            model.zero_grad()
            first, states = run(model, ids[:, :cut])
            second, _ = run(model, ids[:, cut:], states)
            logits = torch.cat([first, second], 1)
            logits.square().mean().backward()
            gradients = {key: value.grad.clone() for key, value in parameters(model).items()}
            results[name] = (logits.detach(), gradients)
    for name in ("eager", "auto"):
        assert_close(results[name][0], results["reference"][0])
        for key, gradient in results[name][1].items():
            assert_close(gradient, results["reference"][1][key])


def parameters(model: MemLMForCausalLM) -> dict[str, Tensor]:
    """The parameters that took part in the last backward pass."""
    return {name: value for name, value in model.named_parameters() if value.grad is not None}


def read_only(case: Case, data) -> None:
    """No call changes the state it is given; without writing the same object comes back."""
    model = model_of(case)
    names = model.memory_state_names()
    ids = draw_ids(data, 2)
    cut = data.draw(st.integers(1, LENGTH - 1), label="cut")
    with torch.no_grad():
        _, states = run(model, ids[:, :cut])
    before = snapshot(states)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            run(model, ids[:, cut:], states)
            assert_same_bits(states, before)
            frozen, after = run(model, ids[:, cut:], states, write_memory=False)
            assert_same_bits(states, before)
            assert all(after[name] is states[name] for name in names)
            again, _ = run(model, ids[:, cut:], states, write_memory=False)
            assert torch.equal(frozen, again)
            _, after = run(model, ids[:, cut:], states, use_memory=False)
            assert_same_bits(states, before)
            assert all(after[name] is states[name] for name in names)


@torch.no_grad()
def bytes_(case: Case, data) -> None:
    """`nbytes` is what is allocated: no views into larger storages, nothing held twice."""
    model = model_of(case)
    ids = draw_ids(data, 2)
    states = model.init_states(2)
    valid = torch.ones_like(ids)
    valid[0, : data.draw(st.integers(0, 5), label="padding")] = 0
    for piece in pieces(draw_cuts(data)):
        for name, state in states.items():
            storages = {}
            for tensor in state.tensors().values():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr() if storage.nbytes() else id(tensor)] = storage.nbytes()
            held = sum(storages.values())
            assert state.nbytes == held, f"{name}: nbytes {state.nbytes}, allocated {held}"
        _, states = run(model, ids[:, piece], states, attention_mask=valid[:, piece])


def gradient(case: Case, data) -> None:
    """Gradients of input, parameters and incoming state are those of finite differences."""
    site = "memory" if case.site == "parallel" else case.site
    model = build_model([{site: case.entry()}])
    # Vectors of their own: equal tokens would tie in a search, and a tie has no gradient.
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="vectors"))
    embedded = torch.randn(2, 11, 32, generator=generator, dtype=torch.float64)
    cut = data.draw(st.integers(1, 6), label="cut")
    with torch.no_grad():
        _, states = run(model, None, inputs_embeds=embedded[:, :cut])
    names = list(parameters_of_interest(model))
    carried = [
        (name, key)
        for name, state in states.items()
        for key, tensor in state.tensors().items()
        if tensor.is_floating_point() and key.split(".")[0] not in case.spec.without_gradient
    ]

    def forward(embedded: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights = dict(zip(names, tensors, strict=False))
        given = {name: state.tensors() for name, state in states.items()}
        for (name, key), tensor in zip(carried, tensors[len(names) :], strict=True):
            given[name] = {**given[name], key: tensor}
        given = {name: type(states[name]).from_state_dict(given[name]) for name in given}
        out = torch.func.functional_call(
            model, weights, kwargs={"inputs_embeds": embedded, "memory_states": given}
        )
        after = [out.memory_states[name].tensors()[key] for name, key in carried]
        return (out.logits, *(tensor for tensor in after if tensor.requires_grad))

    inputs = [
        embedded[:, cut:],
        *(parameters_of_interest(model)[name] for name in names),
        *(states[name].tensors()[key] for name, key in carried),
    ]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True, eps=1e-6, atol=1e-6)


def parameters_of_interest(model: MemLMForCausalLM) -> dict[str, Tensor]:
    """All parameters behind the embedding."""
    return {name: value for name, value in model.named_parameters() if "embed_tokens" not in name}


def gradient_checkpointing(case: Case, data) -> None:
    """Checkpointing changes neither gradients nor states: nothing is written twice."""
    ids = draw_ids(data, 2)
    cut = data.draw(st.integers(1, LENGTH - 1), label="cut")
    results = []
    for enabled in (False, True):
        model = copy.deepcopy(model_of(case)).train()
        if enabled:
            model.gradient_checkpointing_enable()
        first, states = run(model, ids[:, :cut])
        carried = {name: state.detach() for name, state in states.items()}
        second, states = run(model, ids[:, cut:], carried)
        before = snapshot(states)
        (first.square().mean() + second.square().mean()).backward()
        assert_same_bits(states, before)
        gradients = {name: value.grad for name, value in parameters(model).items()}
        results.append((second, before, gradients))
    (plain, plain_states, plain_gradients), (logits, states, gradients) = results
    assert torch.equal(logits, plain)
    for name, tensors in states.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, plain_states[name][key]), f"{name}.{key} differs"
    assert gradients.keys() == plain_gradients.keys()
    for name, value in gradients.items():
        assert_close(value, plain_gradients[name])


def autocast(case: Case, data) -> None:
    """In bf16 autocast memories keep the dtypes of their states; every weight is reached."""
    model = model_of(case, torch.float32)
    model.zero_grad()
    ids = draw_ids(data, 2)
    cut = data.draw(st.integers(9, LENGTH - 1), label="cut")  # a store has filled by then
    with torch.autocast("cpu", torch.bfloat16):
        first, states = run(model, ids[:, :cut])
        second, states = run(model, ids[:, cut:], states)
        (first.float().square().mean() + second.float().square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    before, after = (memory_states(model, x) for x in (model.init_states(2), states))
    for name, state in after.items():
        for key, tensor in state.tensors().items():
            assert tensor.dtype == before[name].tensors()[key].dtype, f"{name}.{key}"


@torch.no_grad()
def save_load(case: Case, data) -> None:
    """A saved model comes back bit by bit; loaded as bf16 it keeps fp32 decay parameters."""
    model = model_of(case, torch.float32)
    ids = draw_ids(data, 2)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), f"{name} differs after loading"
    assert torch.equal(run(loaded, ids)[0], run(model, ids)[0])

    kept = model._keep_in_fp32_modules_strict
    for name, parameter in half.named_parameters():
        wanted = torch.float32 if name.split(".")[-1] in kept else torch.bfloat16
        assert parameter.dtype == wanted, f"{name} is {parameter.dtype}"
        assert torch.equal(parameter, tensors[name].to(wanted))
    first, states = run(half, ids[:, :9])
    second, _ = run(half, ids[:, 9:], states)
    assert first.dtype == second.dtype == torch.bfloat16
    assert first.isfinite().all() and second.isfinite().all()


def generate(model: MemLMForCausalLM, ids: Tensor, new_tokens: int = 6, **kwargs: Any):
    """Sequences, per-step logits and beam scores of `new_tokens` new tokens."""
    kwargs.setdefault("attention_mask", (ids != 0).long())
    return model.generate(
        ids,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **kwargs},
    )


@torch.no_grad()
def generation_cache(case: Case, data) -> None:
    """Generating with the cache equals recomputing everything at every step."""
    model = model_of(case)
    ids = draw_ids(data, 2, data.draw(st.integers(1, 12), label="prompt"))
    chunk_size = data.draw(st.sampled_from([None, 1, 5]), label="prefill_chunk_size")
    cached = generate(model, ids, prefill_chunk_size=chunk_size)
    full = generate(model, ids, use_cache=False)
    assert torch.equal(cached.sequences, full.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(full.logits))


@torch.no_grad()
def left_padding(case: Case, data) -> None:
    """Padding anywhere changes nothing: in one call, in several, and left of a prompt."""
    model = model_of(case)
    lengths = [data.draw(st.integers(1, 12), label="length") for _ in range(2)]
    ids = draw_ids(data, 2, 12)
    rows = [ids[row, :length] for row, length in enumerate(lengths)]
    padded = torch.stack([torch.nn.functional.pad(row, (14 - len(row), 0)) for row in rows])
    together = generate(model, padded)
    for index, row in enumerate(rows):
        alone = generate(model, row[None])
        assert torch.equal(together.sequences[index, 14:], alone.sequences[0, len(row) :])
        assert_close(torch.stack(together.logits)[:, index], torch.stack(alone.logits)[:, 0])

    # Holes anywhere, and calls cut anywhere: rows then pass segment boundaries at different times.
    ids = draw_ids(data, 2)
    flags = st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH)
    mask = torch.tensor([data.draw(flags, label="mask") for _ in range(2)])
    mask[:, data.draw(st.integers(0, LENGTH - 1), label="valid")] = True
    parts, states = [], None
    for piece in pieces(draw_cuts(data)):
        logits, states = run(model, ids[:, piece], states, attention_mask=mask[:, piece].long())
        parts.append(logits)
    whole, _ = run(model, ids, attention_mask=mask.long())
    for row in range(2):
        expected = run(model, ids[row, mask[row]][None])[0][0]
        assert_close(whole[row, mask[row]], expected)
        assert_close(torch.cat(parts, 1)[row, mask[row]], expected)


@torch.no_grad()
def beams(case: Case, data) -> None:
    """Beam search with the cache equals beam search without it, and prompts stay apart."""
    model = model_of(case)
    ids = draw_ids(data, 2, 9)
    ids[0, : data.draw(st.integers(0, 6), label="padding")] = 0
    options = {"num_beams": 3, "num_return_sequences": 2, "new_tokens": 5}
    cached = generate(model, ids, output_scores=True, **options)
    full = generate(model, ids, output_scores=True, use_cache=False, **options)
    assert torch.equal(cached.sequences, full.sequences)
    assert_close(cached.sequences_scores, full.sequences_scores)
    assert torch.equal(cached.beam_indices, full.beam_indices)


@torch.no_grad()
def packed(case: Case, data) -> None:
    """Documents packed in a row are as if each were alone, also with a split anywhere."""
    model = model_of(case)
    ids = draw_ids(data, 2)
    segments = torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    documents = []
    for row in range(2):
        start = 0
        for label in range(1, 5):
            start += data.draw(st.sampled_from([0, 0, 1, 3]), label="gap")
            end = min(LENGTH, start + data.draw(st.integers(1, 11), label="document"))
            if start >= end:
                break
            segments[row, start:end] = label
            positions[row, start:end] = torch.arange(end - start)
            documents.append((row, start, end))
            start = end
    parts, states = [], None
    for piece in pieces(draw_cuts(data)):
        logits, states = run(
            model,
            ids[:, piece],
            states,
            segment_ids=segments[:, piece],
            position_ids=positions[:, piece],
        )
        parts.append(logits)
    split = torch.cat(parts, 1)
    whole, _ = run(model, ids, segment_ids=segments, position_ids=positions)
    bare, _ = run(model, ids, segment_ids=segments)
    for row, start, end in documents:
        expected, _ = run(model, ids[row : row + 1, start:end])
        for logits in (whole, bare, split):
            assert_close(logits[row, start:end], expected[0])


LAWS: dict[str, Callable[[Case, Any], None]] = {
    "chunk": chunk,
    "isolation": isolation,
    "off": off,
    "causal": causal,
    "acts": acts,
    "fork": fork,
    "reference": reference,
    "read-only": read_only,
    "bytes": bytes_,
    "gradient": gradient,
    "checkpointing": gradient_checkpointing,
    "autocast": autocast,
    "save/load": save_load,
    "cache": generation_cache,
    "padding": left_padding,
    "beams": beams,
    "packed": packed,
}
