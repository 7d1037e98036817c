"""The laws of memories hold for memories attached to pretrained models."""

import pytest

from tests.memory import generation_laws, state_laws, training_laws
from tests.memory.test_laws import check
from tests.models.attach_tools import FAMILIES, MEMORIES, attached

LAWS = {
    "chunk": state_laws.chunk,
    "isolation": state_laws.isolation,
    "packed": state_laws.packed,
    "causal": state_laws.causal,
    "fork": state_laws.fork,
    "read-only": state_laws.read_only,
    "bytes": state_laws.bytes_,
    "checkpointing": training_laws.gradient_checkpointing,
    "cache": generation_laws.generation_cache,
    "padding": generation_laws.left_padding,
    "beams": generation_laws.beams,
}


def cases():
    """(law, (family, memory, window, share)); all but a few are left to the slow tests."""
    found = []
    for law in LAWS:
        for family in FAMILIES:
            for memory in MEMORIES:
                for window in (None, 5):
                    plain = memory == "knn_cache" and window is None
                    quick = plain and (family == "llama" or law in ("chunk", "packed", "beams"))
                    quick |= (family, memory, window, law) == ("gemma3", "titans", 5, "chunk")
                    marks = [] if quick else [pytest.mark.slow]
                    name = "-".join([law, family, memory, *(["window"] if window else [])])
                    case = (family, memory, window, None)
                    found.append(pytest.param(law, case, marks=marks, id=name))
        shared = ("llama", "knn_cache", None, "store")
        marks = [] if law in ("chunk", "checkpointing") else [pytest.mark.slow]
        found.append(pytest.param(law, shared, marks=marks, id=f"{law}-llama-knn_cache-shared"))
    return found


@pytest.mark.parametrize(("law", "case"), cases())
def test_law(law, case, monkeypatch):
    for module in (state_laws, training_laws, generation_laws):
        # In float32 whatever is asked: transformers computes norms and rotary angles in it.
        monkeypatch.setattr(module, "model_of", lambda case, dtype=None: attached(*case))
    check(LAWS[law], case, [], 2 if case[0] == "llama" else 1)
