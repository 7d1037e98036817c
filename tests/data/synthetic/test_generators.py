"""What every synthetic task has to obey, and how a config makes one a source."""

import numpy as np
import pytest
import torch

from memlm.data import ByteTokenizer, DataConfig, PackedDataset, load_tokenizer
from memlm.data.config import SyntheticSource, parse_generator
from memlm.data.packing import _HELD_OUT_SEED
from memlm.data.synthetic import GENERATORS, generator_class
from memlm.data.synthetic.induction import Induction
from memlm.data.synthetic.parity import Parity
from memlm.errors import UserError


@pytest.mark.parametrize("length", [64, 127])
@pytest.mark.parametrize("name", GENERATORS)
def test_the_contract(name: str, length: int) -> None:
    task = parse_generator(name, {}, name)
    task.check(length)
    assert task.title
    assert task.description.endswith(".")
    for index in range(5):
        example, again = (task.example(length, np.random.default_rng([9, index])) for _ in range(2))
        size = len(example.input_ids)
        assert 1 <= size <= length
        asked = example.labels != -100
        assert asked.any()
        assert not asked[: example.context_length].any()
        for values in (example.input_ids, example.labels[asked]):
            assert 0 <= values.min() <= values.max() < task.vocabulary
        arrays = {"input_ids": example.input_ids, "labels": example.labels} | example.marks
        others = {"input_ids": again.input_ids, "labels": again.labels} | again.marks
        assert arrays.keys() == others.keys()
        for key, values in arrays.items():
            assert values.shape == (size,)
            assert values.dtype == np.int64
            assert (values == others[key]).all()
    other = task.example(length, np.random.default_rng(10))
    assert not np.array_equal(other.input_ids, example.input_ids)


@pytest.mark.parametrize("name", GENERATORS)
def test_no_length_is_told(name: str) -> None:
    with pytest.raises(UserError, match=r"^\S.*"):
        generator_class(name)().check(0)


def test_a_task_is_a_source() -> None:
    plain, other = DataConfig(
        sources=[
            {"type": "parity"},
            {"type": "induction", "tokens": 9, "lengths": [5, 20], "weight": 2},
        ]
    ).parsed_sources()
    assert plain == SyntheticSource(Parity())
    assert other == SyntheticSource(Induction(tokens=9), lengths=(5, 20), weight=2.0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"type": "paritty"}, r"unknown source type 'paritty'; did you mean 'parity'\?"),
        (
            {"type": "induction", "token": 4},
            r"\(induction\): unknown key 'token'; did you mean 'to",
        ),
        ({"type": "parity", "lenghts": [1, 2]}, "unknown key 'lenghts'; did you mean 'lengths'"),
        ({"type": "induction", "tokens": "9"}, r"sources\[0\].tokens: needs int, got '9'"),
        ({"type": "induction", "tokens": 9.5}, r"sources\[0\].tokens: needs int, got 9.5"),
        ({"type": "induction", "tokens": True}, r"sources\[0\].tokens: needs int, got True"),
        ({"type": "group_word_problem", "group": 5}, r"sources\[0\].group: needs str, got 5"),
        ({"type": "parity", "tokens": 3}, r"'tokens' \(valid: lengths, weight\)"),
        ({"type": "parity", "lengths": 8}, r"sources\[0\].lengths: needs a list of 2 values"),
        ({"type": "parity", "lengths": [8, 4]}, "lengths: needs 1 <= lowest <= highest"),
        ({"type": "parity", "lengths": [0, 4]}, "lengths: needs 1 <= lowest <= highest"),
        ({"type": "parity", "weight": 0}, "weight must be > 0"),
    ],
)
def test_sources_that_cannot_be(source: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(sources=[source])


def test_options_are_a_mapping() -> None:
    with pytest.raises(UserError, match="here: needs a mapping of options, got None"):
        parse_generator("parity", None, "here")


def packed(*sources: dict, split: str = "train", tokenizer: str = "integers:64", **values):
    config = DataConfig(sources=list(sources), tokenizer=tokenizer, **values)
    return PackedDataset(config, load_tokenizer(tokenizer), split, 32)


def test_ids_the_tokenizer_does_not_have() -> None:
    source = {"type": "associative_recall"}
    with pytest.raises(UserError) as caught:
        packed(source)
    assert str(caught.value) == (
        "data.sources: Associative recall needs 257 token ids, the tokenizer has 68; "
        "data.tokenizer: integers:257 has as many"
    )
    assert packed(source, tokenizer="integers:257").row(0)["input_ids"].max() < 257


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"type": "induction", "tokens": 1}, "induction: tokens must be >= 3, got 1"),
        ({"type": "group_word_problem", "group": "q"}, "group 'q': expected s, a or z"),
        ({"type": "parity", "lengths": [4, 33]}, r"\[4, 33\] do not fit rows of 32 tokens"),
    ],
)
def test_options_are_checked_first(source: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        packed(source)


def row_set(data: PackedDataset, rows: int = 300) -> set[bytes]:
    return {row.numpy().tobytes() for row in data.batch(range(rows))["input_ids"]}


@pytest.mark.parametrize(
    "source",
    [{"type": "parity"}, {"type": "induction", "lengths": [10, 20]}, {"type": "mqar", "pairs": 4}],
)
def test_held_out_rows_are_none_of_training(source: dict) -> None:
    held_out = row_set(packed(source, split="validation"))
    assert len(held_out) == 300
    for seed in (0, 1, 77):
        trained = row_set(packed(source, seed=seed))
        assert len(trained) == 300
        assert not trained & held_out
        assert row_set(packed(source, split="validation", seed=seed)) == held_out
    with pytest.raises(UserError, match="data.seed: 1000003 is that of held-out rows"):
        packed(source, seed=_HELD_OUT_SEED)


@pytest.mark.parametrize("kind", ["parity", "mqar", "passkey", "stories"])
def test_two_sources_of_a_task_have_rows_of_their_own(kind: str, tmp_path) -> None:
    tokenizer = "bytes" if kind in ("passkey", "stories") else "integers:64"
    length = 400 if tokenizer == "bytes" else 32
    source = {"type": kind}
    if kind == "passkey":
        (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(999)))
        source |= {"files": [str(tmp_path)]}

    def data(*sources: dict) -> PackedDataset:
        config = DataConfig(sources=list(sources), validation_fraction=0.0)
        return PackedDataset(config, load_tokenizer(tokenizer), "train", length)

    two, alone = data(source, source), data(source)
    assert len(row_set(two, 100)) == 100
    assert two.source_names == [kind, f"{kind}.2"]
    first = [index for index in range(100) if not int(two.sources_of([index])[0])]
    rows = two.batch(first)["input_ids"]
    assert torch.equal(rows, alone.batch(range(len(first)))["input_ids"])


def test_another_source_before_it_does_not_change_the_rows_of_mqar() -> None:
    alone, mixed = packed({"type": "mqar"}), packed({"type": "parity"}, {"type": "mqar"})
    second = [index for index in range(100) if int(mixed.sources_of([index])[0])]
    rows = mixed.batch(second)["input_ids"]
    assert torch.equal(rows, alone.batch(range(len(second)))["input_ids"])


def test_rows_are_mixed_with_text(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("words " * 400)
    sources = [{"type": "parity"}, {"type": "text", "files": [str(tmp_path)]}]
    data = PackedDataset(DataConfig(sources=sources), ByteTokenizer(), "train", 32)
    batch = data.batch(range(4096))
    answers = (batch["loss_groups"] == 1).any(dim=1)
    assert int(answers.sum()) == 2048
    assert torch.equal(answers, data.sources_of(range(4096)) == 0)
