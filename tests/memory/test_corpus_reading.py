import random
from itertools import pairwise

import pytest
import torch

from memlm.memory.corpus_reading import Step, stream_steps, window_steps

LENGTHS = [5, 0, 17, 1, 1, 8, 0, 3, 30, 4]


def spans(steps: list[Step]) -> dict[int, list[tuple[int, int]]]:
    """The pieces of each document, in the order in which they are read."""
    found: dict[int, list[tuple[int, int]]] = {}
    for step in steps:
        for piece in step.pieces:
            found.setdefault(piece.document, []).append((piece.start, piece.stop))
    return found


def check_covers(steps: list[Step], lengths: list[int]) -> None:
    """Every token once, those of a document in their order."""
    found = spans(steps)
    assert sorted(found) == [document for document, length in enumerate(lengths) if length]
    for document, pieces in found.items():
        places = [token for start, stop in pieces for token in range(start, stop)]
        assert places == list(range(lengths[document]))


def check_rows(steps: list[Step], size: int, rows: int) -> None:
    """Pieces of a row lie side by side from the left, as far as there are tokens."""
    for step in steps:
        height, width = step.shape
        assert 1 <= height <= rows and 1 <= width <= size
        for row in range(height):
            pieces = [piece for piece in step.pieces if piece.row == row]
            assert pieces[0].column == 0
            for one, other in pairwise(pieces):
                assert one.columns.stop == other.column
                assert other.start == 0 and one.document != other.document


@pytest.mark.parametrize("make", [window_steps, stream_steps])
def test_every_token_is_read_once(make):
    draw = random.Random(0)
    for _ in range(60):
        lengths = [draw.choice([0, 1, 2, 7, 8, 9, 40]) for _ in range(draw.randrange(1, 12))]
        size, rows = draw.randrange(1, 12), draw.randrange(1, 6)
        steps = list(make(lengths, size, rows))
        check_covers(steps, lengths)
        check_rows(steps, size, rows)
    assert list(make([0, 0], 4, 2)) == []


def test_windows_fill_batches():
    steps = list(window_steps(LENGTHS, 8, 3))
    assert [step.shape[0] for step in steps] == [3, 3, 3, 3, 1]
    assert spans(steps)[8] == [(0, 8), (8, 16), (16, 24), (24, 30)]


def test_streams_go_on_in_their_row():
    for size, rows in ((8, 3), (4, 2), (7, 20), (100, 2)):
        places: list[tuple[int, int] | None] = []
        for step in stream_steps(LENGTHS, size, rows):
            # A row that goes on starts with the token after the last one that it read, or a new
            # document when the last one was complete.
            carried = [places[row] for row in step.continued] if places else []
            height, _ = step.shape
            assert len(carried) in (0, height)
            for row in range(height):
                pieces = [piece for piece in step.pieces if piece.row == row]
                if carried:
                    document, stop = carried[row]
                    complete = stop == LENGTHS[document]
                    expected = (document, stop) if not complete else (pieces[0].document, 0)
                    assert (pieces[0].document, pieces[0].start) == expected
                assert all(piece.start == 0 for piece in pieces[1:])
            last = [[p for p in step.pieces if p.row == row][-1] for row in range(height)]
            places = [(piece.document, piece.stop) for piece in last]


def test_streams_leave_no_row_idle():
    """A row is dropped rather than padded when there is nothing left to read."""
    for step in stream_steps([100, 3, 3], 10, 8):
        assert {piece.row for piece in step.pieces} == set(range(step.shape[0]))
    steps = list(stream_steps([100, 3, 3], 10, 8))
    assert [step.shape[0] for step in steps] == [3] + [1] * 9
    assert torch.tensor([step.continued for step in steps[1:]]).tolist() == [[0]] * 9
