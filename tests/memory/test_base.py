"""The table of memories and the strictness of their configs."""

import dataclasses

import pytest

from memlm import MemLMConfig, UserError
from memlm.memory import base, memory_class, memory_config, memory_names
from memlm.memory.base import MemoryConfig, MemoryModule, register


def test_names_are_sorted_and_lead_to_their_class():
    assert memory_names() == sorted(memory_names())
    for name in memory_names():
        found = memory_class(name)
        assert issubclass(found, MemoryModule) and found.name == name
        assert issubclass(found.config_class, MemoryConfig)
        assert memory_config({"type": name}) == found.config_class()


def test_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match="layers.3: unknown memory 'titan'; did you mean 'titans'"):
        memory_class("titan", "layers.3")


def test_values_are_checked():
    with pytest.raises(UserError, match="memory: unknown key 'gat'; did you mean 'gate'"):
        memory_config({"type": "gated_delta", "gat": 0.0})
    with pytest.raises(UserError, match="parallel"):
        memory_config({"type": "gated_delta", "parallel": "yes"})
    assert memory_config({"type": "gated_delta", "gate": 1}).gate == 1.0


def test_spec_is_left_as_it_was():
    spec = {"type": "gated_delta", "gate": 0.0}
    memory_config(spec)
    assert spec == {"type": "gated_delta", "gate": 0.0}


def test_a_registered_memory_is_a_valid_site_at_once(monkeypatch):
    monkeypatch.setattr(base, "_MEMORIES", dict(base._MEMORIES))

    @dataclasses.dataclass(kw_only=True)
    class NotesConfig(MemoryConfig):
        pages: int = 3

        def check_sizes(self, hidden_size):
            if self.pages > hidden_size:
                raise UserError("too many pages")

    @register("notes", NotesConfig)
    class Notes(MemoryModule):
        def init_state(self, batch_size, device=None, dtype=None):
            return None

        def forward(self, hidden, state, context):
            return hidden, state

        def init_weights(self):
            pass

        def flops(self, tokens):
            return 0

    plan = MemLMConfig(layers=[{"memory": {"type": "notes", "pages": 2}}]).plan()
    assert plan[0].memory[1].pages == 2
    assert Notes.build_shared(NotesConfig(), 8) is None
    with pytest.raises(UserError, match="too many pages"):
        Notes(NotesConfig(pages=9), 8)
    with pytest.raises(UserError, match="layers.0.memory: too many pages"):
        MemLMConfig.from_mapping(
            {"hidden_size": 8, "layers": [{"memory": {"type": "notes", "pages": 9}}]}
        )
