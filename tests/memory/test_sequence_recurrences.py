"""Linear recurrences whose rows 2 or 4 processes hold together: the numbers of one process."""

from tests.memory.processes import run_processes
from tests.memory.sequence_worker import Rows, compare

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


def check(found: list[dict[str, float]], tolerance: float) -> None:
    worst = {name: max(rank[name] for rank in found) for name in found[0]}
    assert len(worst) > 10
    wrong = {name: error for name, error in worst.items() if not error <= tolerance}
    assert not wrong


def test_two_processes_are_one():
    """Two calls, the second of which continues what the first left."""
    check(run_processes(2, compare, SPECS, (PACKED, PACKED), "float64"), 1e-9)
