import itertools
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.data.tokenizers import ByteTokenizer
from memlm.errors import UserError
from memlm.fingerprint import fingerprint
from memlm.memory.build_store import main
from memlm.memory.corpus_reading import corpus_reader
from memlm.retrieval.corpus_store import CorpusStore
from tests.retrieval.killed import killed_at

TEXTS = ["To be, or not to be.", "x", "Brevity is the soul of wit. " * 6, "Words, words, words."]
ENTRIES = sum(len(text) - 1 for text in TEXTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models and texts."""
    folder = tmp_path_factory.mktemp("build_store")
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    vocabulary = len(tokenizer)
    llama = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=48,
    )
    sliding = {"type": "sliding_attention", "window": 8}
    memlm = MemLMConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        layers=[
            {"mixer": sliding, "memory": "gated_delta", "ffn": "swiglu"},
            {
                "mixer": sliding,
                "memory": {"type": "knn_cache", "capacity": 32, "segment": 8},
                "ffn": "swiglu",
            },
        ],
    )
    models = {
        "llama": LlamaForCausalLM(llama),
        "other": LlamaForCausalLM(llama),
        "memlm": MemLMForCausalLM(memlm),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return folder


def arguments(folder: Path, out: Path, **options) -> list[str]:
    """The command line."""
    values = {
        "model": folder / "llama",
        "text": [str(folder / f"{number}.txt") for number in range(len(TEXTS))],
        "out": out,
        "context": 10,
        "batch_size": 3,
        "commit_every": 40,
        "dtype": "float32",
        **options,
    }
    words = []
    for name, value in values.items():
        words.append(f"--{name.replace('_', '-')}")
        words += value if isinstance(value, list) else [str(value)]
    return words


def load(folder: Path, name: str) -> torch.nn.Module:
    classes = {"llama": LlamaForCausalLM, "memlm": MemLMForCausalLM}
    return classes[name].from_pretrained(folder / name).eval()


def by_place(store: CorpusStore) -> dict[tuple[int, int], int]:
    """Entry ids by (document, position)."""
    values = store.values
    pairs = zip(values["document"].tolist(), values["position"].tolist(), strict=True)
    return {pair: index for index, pair in enumerate(pairs)}


def keys_of(store: CorpusStore) -> torch.Tensor:
    return torch.cat([part.columns["keys"] for part in store._base])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["llama", "memlm"])
@torch.no_grad()
def test_entries_are_what_the_head_sees(folder, tmp_path, name):
    assert main(arguments(folder, tmp_path / "out", model=folder / name)) == 0
    model = load(folder, name)
    projection = fingerprint(model.state_dict())
    store = CorpusStore.open(tmp_path / "out", projection=projection, metric="l2", verify=True)
    assert len(store) == ENTRIES == len(by_place(store))
    assert store.layout.values["next_token"].dtype == torch.int32
    places, keys, next_tokens = by_place(store), keys_of(store), store.values["next_token"]
    for document, text in enumerate(TEXTS):
        tokens = torch.tensor([ByteTokenizer()(text)["input_ids"]])
        assert tokens.shape == (1, len(text))
        if name == "memlm":  # reads from end to end
            logits = model(input_ids=tokens).logits[0]
        else:  # sees its window alone
            logits = torch.cat([model(input_ids=part).logits[0] for part in tokens.split(10, 1)])
        for position in range(len(text) - 1):
            entry = places[document, position]
            assert next_tokens[entry] == tokens[0, position + 1]
            own = model.lm_head(keys[entry])
            torch.testing.assert_close(own, logits[position], atol=1e-5, rtol=1e-5)
    _, ids = store.search(keys, 1)  # entries of repeated text are all but the same
    torch.testing.assert_close(keys[ids[:, 0]], keys, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "memlm"])
def test_does_not_depend_on_the_batch(folder, tmp_path, name):
    stores = []
    for rows in (1, 3, 50):
        out = tmp_path / f"{rows}"
        assert main(arguments(folder, out, model=folder / name, batch_size=rows)) == 0
        stores.append(CorpusStore.open(out))
    places = [by_place(store) for store in stores]
    for other, store in zip(places[1:], stores[1:], strict=True):
        order = torch.tensor([other[place] for place in places[0]])
        torch.testing.assert_close(keys_of(store)[order], keys_of(stores[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, each", [("float32", 84), ("float16", 52), ("int8", 40)])
def test_dtypes(folder, tmp_path, dtype, each, capsys):
    assert main(arguments(folder, tmp_path, dtype=dtype)) == 0
    assert f"{ENTRIES} entries, {each} bytes each" in capsys.readouterr().out
    assert CorpusStore.open(tmp_path).layout.key_type == dtype


def test_a_complete_store_says_so(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "out")) == 0
    before = files(tmp_path / "out")
    capsys.readouterr()
    assert main(arguments(folder, tmp_path / "out")) == 0
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'out'} is complete: {ENTRIES} entries, 84 bytes each\n"
    )
    assert files(tmp_path / "out") == before


def test_an_index_can_be_asked_for(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path)) == 0
    assert main([*arguments(folder, tmp_path), "--engine", "auto"]) == 0
    assert CorpusStore.open(tmp_path).index is None  # few enough for exact search
    capsys.readouterr()
    assert main([*arguments(folder, tmp_path), "--engine", "faiss_flat"]) == 0
    assert capsys.readouterr().out.endswith("\nindex: faiss_flat, recall 1.0000\n")
    before = {path.name for path in tmp_path.iterdir()}
    assert CorpusStore.open(tmp_path, engine="auto").engine == "faiss_flat"
    assert main([*arguments(folder, tmp_path), "--engine", "faiss_flat"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == before
    assert main([*arguments(folder, tmp_path), "--engine", "faiss_flt"]) == 2


def build(words: list[str]) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    sys.exit(main(words))


@pytest.mark.parametrize("name", ["llama", "memlm"])
def test_killed_runs_end_with_the_same_bytes(folder, tmp_path, name):
    torch.set_num_threads(1)
    assert main(arguments(folder, tmp_path / "whole", model=folder / name)) == 0
    whole = files(tmp_path / "whole")
    out = tmp_path / "killed"
    words = arguments(folder, out, model=folder / name)
    lengths = []
    for moment in itertools.count(9, 2):
        if not killed_at(moment, out, build, words):
            break
        if (out / "manifest.json").exists():
            store = CorpusStore.open(out, verify=True)
            lengths.append(len(store))
            assert not store.progress.get("complete")
    assert len(lengths) >= 3 and lengths == sorted(lengths) and lengths[-1] > 0
    assert files(out) == whole


def test_the_command_shows_progress_and_speed(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build_store", *arguments(folder, tmp_path / "out")])
    monkeypatch.delitem(sys.modules, "memlm.memory.build_store")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("memlm.memory.build_store", run_name="__main__")
    assert end.value.code == 0
    shown = capsys.readouterr()
    assert "tok/s" in shown.err and "100%" in shown.err
    assert shown.out == f"{tmp_path / 'out'} is written: {ENTRIES} entries, 84 bytes each\n"


@pytest.fixture
def begun(folder, tmp_path) -> Path:
    """A store of which a part is there."""
    out = tmp_path / "begun"
    assert killed_at(20, out, build, arguments(folder, out))
    assert 0 < len(CorpusStore.open(out)) < ENTRIES
    return out


def test_another_model_text_or_option_is_refused(folder, begun, capsys):
    before = files(begun)
    (folder / "more.txt").write_text("More.")
    for options, message in (
        ({"model": folder / "other"}, "--model has other weights"),
        ({"text": [str(folder / "more.txt")]}, "--text (or --tokenizer) gives other tokens"),
        ({"context": 11}, "--context was 10, not 11"),
        ({"batch_size": 2}, "--batch-size was 3, not 2"),
        ({"commit_every": 41}, "--commit-every was 40, not 41"),
        ({"dtype": "float16"}, "--dtype was float32, not float16"),
        ({"metric": "dot"}, "--metric was l2, not dot"),
    ):
        assert main(arguments(folder, begun, **options)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        expected = f"error: {begun}: cannot go on with this store: {message}; choose another --out"
        assert error == expected
    assert files(begun) == before
    assert main(arguments(folder, begun)) == 0


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([*arguments(folder, out), "--contxt", "3"], "unknown option --contxt; did you mean '--co"),
        (arguments(folder, out)[2:], "the following arguments are required: --model"),
        (arguments(folder, out, context=0), "argument --context: '0' is not a positive whole num"),
        (arguments(folder, out, dtype="int4"), "argument --dtype: invalid choice: 'int4'"),
        (arguments(folder, out, context=49), "--context is 49, but the model reads at most 48"),
        (arguments(folder, out, text=[str(tmp_path / "none")]), "none' does not exist"),
        (arguments(folder, out, model=tmp_path / "empty", tokenizer="bytes"), "cannot be loaded"),
        (arguments(folder, out, model=tmp_path / "empty"), "could not be loaded"),
    ):
        assert main(words) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert not out.exists()


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path, capsys):
    config = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "small")
    words = arguments(folder, tmp_path / "out", model=tmp_path / "small", tokenizer="bytes")
    assert main(words) == 2
    assert "--tokenizer: has more tokens than the model" in capsys.readouterr().err


def test_a_damaged_model_is_refused(folder, tmp_path, capsys):
    LlamaForCausalLM.from_pretrained(folder / "llama").save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = arguments(folder, tmp_path / "out", model=tmp_path / "model", tokenizer="bytes")
    assert main(words) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_missing_weights_are_refused(folder, tmp_path, capsys):
    LlamaForCausalLM.from_pretrained(folder / "llama").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    words = arguments(folder, tmp_path / "out", model=tmp_path / "model", tokenizer="bytes")
    assert main(words) == 2
    assert "lacks weights (model.norm.weight)" in capsys.readouterr().err


def test_a_store_of_something_else_is_left_alone(folder, tmp_path, capsys):
    create = {"key_size": 16, "metric": "l2", "projection": "0" * 64, "values": {}}
    CorpusStore.create(tmp_path / "out", **create).close()
    assert main(arguments(folder, tmp_path / "out")) == 2
    assert "it was not begun by this command" in capsys.readouterr().err


def test_an_out_that_is_a_file_is_refused(folder, tmp_path, capsys):
    (tmp_path / "out").write_text("notes")
    assert main(arguments(folder, tmp_path / "out")) == 2
    assert "out: cannot be written (" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out").read_text() == "notes"


def test_a_head_that_sees_something_else_is_refused(folder):
    model = load(folder, "llama")
    corpus_reader(model)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 2,))
    with pytest.raises(UserError, match="a 'llama' model changes its last hidden states before"):
        corpus_reader(model)


def test_a_document_longer_than_the_model_reads_is_refused(folder, tmp_path, capsys):
    config = MemLMConfig(
        vocab_size=len(ByteTokenizer()),
        hidden_size=16,
        layers=[{"mixer": "attention", "ffn": "swiglu"}],
        max_position_embeddings=100,
    )
    MemLMForCausalLM(config).save_pretrained(tmp_path / "model")
    words = arguments(folder, tmp_path / "out", model=tmp_path / "model", tokenizer="bytes")
    assert main(words) == 2
    assert "a document has 168 tokens, but the model reads at most 100" in capsys.readouterr().err
