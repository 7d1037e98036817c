import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from memlm.data import ByteTokenizer, load_tokenizer
from memlm.errors import UserError
from memlm.evaluation.costs import Meter, PeakMemory, StateBytes
from memlm.evaluation.haystack import Haystack
from memlm.evaluation.lengths import format_length, parse_length, parse_lengths
from memlm.evaluation.prompts import Context, encode_prompt, split_prompt, text_trial

BYTES = ByteTokenizer()
TEXT = "".join(f"Sentence {i} of a text about lakes and hills.\n" for i in range(300))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece tokenizer that starts texts with a bos and merges across words."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "pieces"),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return load_tokenizer(str(folder / "pieces.model"))


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(0, 40), st.integers(0, 40))
def test_a_context_reads_across_its_pieces(sizes, start, length):
    rows = [np.arange(size) + 100 * number for number, size in enumerate(sizes)]
    context = Context(rows)
    whole = np.concatenate([np.empty(0, dtype=np.int64), *rows])
    assert len(context) == len(whole)
    assert np.array_equal(context.read(start, start + length), whole[start : start + length])


def test_fingerprints_depend_on_the_ids_alone():
    whole = np.arange(200_000)
    cut = Context([whole[:70_001], whole[70_001:]])
    assert cut.fingerprint() == Context([whole.astype(np.int32)]).fingerprint()
    assert cut.fingerprint() != Context([whole[::-1]]).fingerprint()
    assert cut.fingerprint(np.array([1])) != cut.fingerprint(np.array([2])) != cut.fingerprint()


@pytest.mark.parametrize("name", ["bytes", "pieces"])
@pytest.mark.parametrize(
    "question", ["\nWhat is it? It is", " lakes?", "s", "Sentence 4", ".", " \u00fcber"]
)
def test_context_and_question_are_the_whole_text(name, question, request):
    tokenizer = BYTES if name == "bytes" else request.getfixturevalue("pieces")
    for context in (TEXT[:500], "A short lake", "hills and hill"):
        ids, (asked, other) = split_prompt(tokenizer, context, [question, "\nOther?"])
        assert len(ids) and len(asked)
        whole = encode_prompt(tokenizer, context + question)
        assert np.array_equal(np.concatenate([ids, asked]), whole)
        whole = encode_prompt(tokenizer, context + "\nOther?")
        assert np.array_equal(np.concatenate([ids, other]), whole)


def test_prompts_of_no_text_are_refused():
    with pytest.raises(ValueError, match="needs a context and a question"):
        split_prompt(BYTES, "", ["what?"])


def test_trials_from_text():
    trial = text_trial(BYTES, "context", [(" a?", ["x"]), (" b?", ["y", "z"])], 4, {"depth": 0.5})
    assert BYTES.decode(trial.context.read(0, 99).tolist()) == "context"
    assert [question.references for question in trial.questions] == [("x",), ("y", "z")]
    assert trial.fingerprint() != text_trial(BYTES, "context", [(" a?", ["x"])], 4).fingerprint()


def test_a_haystack_is_the_documents_back_to_back(tmp_path, pieces):
    for name, text in (("a.txt", TEXT), ("b.txt", "second"), ("c.json", '{"text": "third"}')):
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.json")]
    haystack = Haystack(BYTES, files)
    whole = (TEXT + "second" + "third").encode()
    assert len(haystack) == len(whole)
    assert bytes(haystack.read(0, len(whole)).tolist()) == whole
    around = haystack.piece(len(whole) - 3, 3 + 2 * len(whole) + 4)
    assert bytes(around.read(0, 5).tolist()) == whole[-3:] + whole[:2]
    assert bytes(around.read(len(around) - 4, len(around)).tolist()) == whole[:4]
    assert len(haystack.read(7, 7)) == 0
    assert len(Haystack(pieces, files)) < len(whole)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"[1]", "no field 'text'"),
        ("a.jsonl", b'{"text": 1}\n', "is not a string"),
        ("a.jsonl", b'{"text": "x"\n', "a.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"txt": "x"}\n', "no field 'text'"),
    ],
)
def test_haystacks_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Haystack(BYTES, [str(tmp_path / name)])


def test_lengths():
    assert parse_lengths(["4k..64k", 100, "1M"], "lengths") == [
        100, 4096, 8192, 16384, 32768, 65536, 1048576,
    ]  # fmt: skip
    assert parse_lengths(["3k..10k"], "lengths") == [3072, 6144, 10240]
    assert parse_length("2m", "x") == 1 << 21
    assert [format_length(n) for n in (100, 4096, 5000, 1 << 20, 3 << 19)] == [
        "100", "4k", "5000", "1M", "1536k",
    ]  # fmt: skip
    for wrong in ("", "k", "-4", "4.5k", "0", "4k...8k"):
        with pytest.raises(UserError, match="is no length"):
            parse_lengths([wrong], "lengths")


def test_meters_add_up_and_keep_the_largest_states():
    meter = Meter()
    for _ in range(2):
        with meter.measure("read", 10):
            pass
    meter.saw(StateBytes(1, 2, 3))
    meter.saw(StateBytes(0, 0, 0))
    costs = meter.costs()
    assert costs["tokens"] == {"read": 20} and costs["seconds"]["read"] > 0
    assert (costs["memory_state_bytes"], costs["key_value_bytes"], costs["state_bytes"]) == (
        1,
        2,
        3,
    )


def test_the_peak_is_that_of_the_time_since():
    import torch

    held = np.ones(200 << 20, dtype=np.uint8)
    with_array = PeakMemory(torch.device("cpu")).bytes()
    del held
    without = PeakMemory(torch.device("cpu")).bytes()
    if with_array is None:
        pytest.skip("this system keeps no peak of the resident memory")
    assert with_array - without > 150 << 20
