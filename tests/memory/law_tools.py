"""What the laws are written with: cases, tiny models, random draws, comparisons."""

import dataclasses
import functools
import itertools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.memory.output_memory import OUTPUT
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
        sites: where it is tried: mixer, memory, parallel (the memory site beside the mixer), ffn,
            output.
        options: its entry in `layers` (or `output`), without the type.
        label: tells several specs of one memory apart.
        without_gradient: fields of its state that take no gradient by design (stores).
        stable: further options in float32, for a memory that is chaotic with its usual ones.
        examples: draws per law at the first site, the simplest one among several.
        slow: whether it is left to the slow tests.
    """

    sites: tuple[str, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""
    without_gradient: tuple[str, ...] = ()
    stable: dict[str, Any] = dataclasses.field(default_factory=dict)
    examples: int = 2
    slow: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A memory, one of its specs and a site."""

    memory: str
    site: str
    spec: Spec

    def __str__(self) -> str:
        return "-".join(filter(None, (self.memory, self.spec.label, self.site)))

    @property
    def examples(self) -> int:
        """Draws per law: one at the other sites of a spec, where the memory is the same."""
        return self.spec.examples if self.site == self.spec.sites[0] else 1

    @property
    def repeat(self) -> int:
        """Layers of its models: one beside the mixer, where two behind it are judged as well."""
        judged = self.site == "parallel" and "memory" in self.spec.sites
        return 1 if judged and "share" not in self.spec.options else 2

    def entry(self, **options: Any) -> dict[str, Any]:
        """The value of the site in `layers`."""
        parallel = {"parallel": True} if self.site == "parallel" else {}
        return {"type": self.memory, **self.spec.options, **parallel, **options}

    def layers(self, with_memory: bool = True, **options: Any) -> list[dict[str, Any]]:
        """Two layers with the memory at its site, or with nothing there (the base model)."""
        pattern: dict[str, Any] = {"repeat": 2, "mixer": ATTENTION, "ffn": "swiglu"}
        if self.site != OUTPUT:
            site = "memory" if self.site == "parallel" else self.site
            pattern[site] = self.entry(**options) if with_memory else None
        return [pattern]

    def build(
        self,
        dtype: torch.dtype = torch.float64,
        with_memory: bool = True,
        repeat: int = 2,
        **options: Any,
    ) -> MemLMForCausalLM:
        """A model of `repeat` layers with the memory at its site, or without (the base model)."""
        layers = [{**self.layers(with_memory, **options)[0], "repeat": repeat}]
        output = self.entry(**options) if self.site == OUTPUT and with_memory else None
        return build_model(layers, dtype, output=output)

    @property
    def closed(self) -> dict[str, float]:
        """Options with which the memory gives nothing."""
        return {"weight": 0.0} if self.site == OUTPUT else {"gate": 0.0}


def build_model(
    layers: list[dict[str, Any]],
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    output: dict[str, Any] | None = None,
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
        output=output,
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
    options = case.spec.stable if dtype == torch.float32 else {}
    return case.build(dtype, repeat=case.repeat, **options)


@functools.lru_cache(maxsize=4)
def variant_of(case: Case, with_memory: bool = True, repeat: int | None = None, **options: Any):
    """The model of a case with other options; every draw of a law shares it."""
    return case.build(with_memory=with_memory, repeat=repeat or case.repeat, **options)


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
