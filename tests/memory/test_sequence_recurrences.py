"""Linear recurrences whose rows 2 or 4 processes hold together: the numbers of one process."""

import pytest
import torch

from memlm.cuda import linear_recurrence
from tests.memory.processes import run_processes
from tests.memory.sequence_worker import Case, Rows, compare

DELTA = {"type": "gated_delta", "head_dim": 8, "num_heads": 1}
SPECS = {
    "gated delta": DELTA | {"num_v_heads": 2, "expand_v": 1.5},
    "no convolution": DELTA | {"conv_size": None, "use_gate": False, "allow_neg_eigval": True},
    "delta rule": DELTA | {"decay": False, "conv_size": 2, "beta_bias": 0.5},
    "retention": {"type": "retention", "num_heads": 2, "first_exponent": 2.0},
    "linear attention": {"type": "linear_attention", "num_heads": 2},
    "no normalizer": {"type": "linear_attention", "feature_map": "identity", "normalizer": False},
    "min_gru": {"type": "min_gru", "expansion": 1.5},
    "min_lstm": {"type": "min_lstm", "conv_size": None},
}
# Four processes have six columns each, two have twelve.
PACKED = Rows(
    (
        ".......abcdeabcdeabcdeab",  # nothing but padding on the first of four
        "abcdAbAbcdefAbcabcdefabc",  # documents start inside of columns and with them
        "Abcabcabca..............",  # padding behind
        "abcab......Abcdea.bcaAbc",  # columns with a single token, which starts a document
    ),
    first=3,
)
PLAIN = Rows(("abcdabcdabcd", "abcabcabcabc"), first=20)
BORDERS = Rows(("abcabcAbcabc", "AbcabcabcAbc"))  # documents start with columns
EMPTY = Rows(("......abcabc", "......abcabc"))  # the first of two processes has no tokens


SOME = {name: SPECS[name] for name in ("gated delta", "retention", "min_gru")}
TWICE = (PACKED, PACKED)  # the second call continues what the first left


def check(processes: int, cases: dict[str, Case]) -> None:
    """Raise AssertionError where a process's numbers differ from those of whole rows."""
    found = run_processes(processes, compare, cases)
    worst = {name: max(rank[name] for rank in found) for name in found[0]}
    assert len(worst) >= 10 * len(cases)
    wrong = {name: error for name, error in worst.items() if not error <= 1}
    assert not wrong


def test_two_processes_are_one():
    cases = {
        "packed": Case(SPECS, TWICE),
        "plain": Case(SOME, (PLAIN,)),
        "borders": Case(SOME, (BORDERS, BORDERS)),
        "empty": Case(SPECS, (EMPTY,)),
        "read only": Case(SPECS, (PACKED,), write=False),
        "single": Case(SOME, TWICE, "float32", 1e-5),
    }
    check(2, cases)


def test_four_processes_are_one():
    check(4, {"packed": Case(SOME, TWICE)})


@pytest.mark.slow
def test_four_processes_are_one_with_every_memory():
    one = torch.ones(1, 1, 1, 1)
    linear_recurrence(one, one, one, None, None)  # builds the library once, not in every process
    cases = {
        "packed": Case(SPECS, TWICE),
        "plain": Case(SPECS, (PLAIN,)),
        "borders": Case(SPECS, (BORDERS, BORDERS)),
        "read only": Case(SPECS, TWICE, write=False),
        "single": Case(SPECS, TWICE, "float32", 1e-5),
        "native": Case(SPECS, TWICE, "float32", 1e-5, implementation="auto"),
        "half": Case(SPECS, TWICE, "bfloat16", 3e-2),
    }
    check(4, cases)
