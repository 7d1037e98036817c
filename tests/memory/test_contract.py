"""The laws catch memories that break them: one fault at a time, and one draw of each law."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from transformers import initialization as init

from memlm.memory import base
from memlm.memory.base import MemoryConfig, MemoryModule, MemoryState, register
from tests.memory.contract import LAWS, Case, Spec
from tests.memory.test_laws import check


@dataclasses.dataclass(kw_only=True)
class RunningSumConfig(MemoryConfig):
    fault: str = ""


@dataclasses.dataclass
class RunningSumState(MemoryState):
    total: Tensor

    def reset(self, rows=None):
        if rows is None:
            return RunningSumState(torch.zeros_like(self.total))
        return RunningSumState(self.total.masked_fill(rows[:, None], 0))


class KeptTotal(RunningSumState):
    def reset(self, rows=None):
        return self


class RunningSum(MemoryModule):
    """out_t = W (sum of tanh(V x) up to t), document by document."""

    def __init__(self, config, hidden_size, norm_eps=1e-6):
        super().__init__(config, hidden_size, norm_eps)
        self.v_proj = nn.Linear(hidden_size, 4)
        self.o_proj = nn.Linear(4, hidden_size, bias=False)
        self.scale = nn.Parameter(torch.empty(4))
        if config.fault == "buffer":
            self.register_buffer("noise", torch.randn(4), persistent=False)
        self.init_weights()

    def init_weights(self):
        init.uniform_(self.scale, 0.5, 1.5)

    def init_state(self, batch_size, device=None, dtype=None):
        kind = KeptTotal if self.config.fault == "reset" else RunningSumState
        return kind(torch.zeros(batch_size, 4, device=device, dtype=dtype))

    def forward(self, hidden, state, context):
        fault, layout = self.config.fault, context.layout
        values = torch.tanh(self.v_proj(hidden)) * self.scale
        if fault == "buffer":
            values = values * self.noise.to(values.dtype)
        if fault != "padding":
            values = values * layout.valid[..., None]
        if fault == "constant":
            return 0 * hidden, state
        if fault == "rows":
            values = values + 0.1 * values.mean(0, keepdim=True)
        if fault == "future":
            values = values + 0.1 * values.mean(1, keepdim=True)
        document = layout.document.clamp(min=0)
        same = document[:, :, None] == document[:, None, :]
        if fault == "packing":
            same = torch.ones_like(same)
        weights = same.to(values.dtype).tril()
        if not context.write and fault != "writes":
            weights = 0 * weights
        total = state.total
        if fault == "detached":
            total = total.detach()
        if fault == "forgets" and hidden.shape[1] < 4:
            total = 0 * total
        carried = (layout.document == 0).to(values.dtype)[..., None] * total[:, None]
        sums = weights @ values + carried
        if fault == "double gradient":
            sums = sums + (values - values.detach())
        output = self.o_proj(sums)
        if fault == "in place":
            state.total.add_(0.1)
        if not context.write:
            return output, state.clone() if fault == "copies" else state
        last = torch.where(layout.valid, torch.arange(hidden.shape[1]), -1).amax(1)
        new = sums[torch.arange(len(last)), last.clamp(min=0)]
        new = torch.where((last >= 0)[:, None], new, state.total)
        if fault == "view":
            new = torch.cat([new, new])[: len(new)]
        return output, type(state)(new)

    def flops(self, tokens):
        return 0


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(base, "_MEMORIES", dict(base._MEMORIES))
    register("running_sum", RunningSumConfig)(RunningSum)


def obeys(law, fault):
    case = Case("running_sum", "memory", Spec(("memory",), {"fault": fault}, examples=1))
    check(law, case, [], case.examples)


@pytest.mark.parametrize("law", LAWS)
def test_a_sound_memory_obeys(law):
    obeys(law, "")


FAULTS = [
    ("chunk", "forgets"),
    ("isolation", "rows"),
    ("isolation", "reset"),
    ("causal", "future"),
    ("acts", "constant"),
    ("read-only", "in place"),
    ("read-only", "copies"),
    ("fork", "in place"),
    ("bytes", "view"),
    ("gradient", "detached"),
    ("gradient", "double gradient"),
    ("save/load", "buffer"),
    ("cache", "forgets"),
    ("padding", "padding"),
    ("beams", "forgets"),
    ("packed", "packing"),
    ("checkpointing", "in place"),
]


@pytest.mark.parametrize(("law", "fault"), FAULTS)
def test_a_fault_is_caught(law, fault):
    with pytest.raises(AssertionError):
        obeys(law, fault)
