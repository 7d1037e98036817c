"""The comparison on a GPU, in small and on the CPU, where Triton's interpreter searches."""

import pytest
import torch

from benchmarks.retrieval import cuda
from memlm.cuda.dispatch import interpreting

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

SIZE = cuda.Size(6, 300, 16, torch.float16, 4)


def test_results_are_exact_and_judged_on_a_cpu(capsys):
    results, exact = cuda.compare("cpu", (SIZE,), repeats=1)
    assert exact
    rows = {row["name"]: row for row in results["searches"]}
    assert rows[cuda.TORCH]["memlm faster"].median > 0
    assert rows[cuda.OURS]["peak_bytes"] is None  # no GPU
    printed = capsys.readouterr().out
    assert "All are exact" in printed and "6 x 300 x 16 float16" in printed
    assert SIZE.matrix_bytes == 3600


@pytest.mark.parametrize("fault", ["score", "key", "twice"])
def test_a_wrong_result_is_not_exact(monkeypatch, fault):
    search = cuda.topk_search

    def wrong(queries, keys, k):
        scores, indices = search(queries, keys, k + 1)
        if fault == "score":
            return scores[..., :k] + 1e-3, indices[..., :k]
        if fault == "key":
            return scores[..., :k], indices[..., 1:]
        return scores[..., :k], torch.cat((indices[..., :1], indices[..., : k - 1]), -1)

    monkeypatch.setattr(cuda, "topk_search", wrong)
    assert cuda._error(SIZE, "cpu") > cuda.TOLERANCE
