"""Bad input in texts, shards, checkpoints, run folders and models."""

from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
from safetensors.torch import load_file, save_file

from memlm.training.manifest import write_manifest
from tests.training.bad_input import case, nothing, remove, source, text, write

HIDDEN = "--model.hidden_size"
FIRST, NEWEST = "run/checkpoints/step_000001", "run/checkpoints/step_000002"
RESUME = ("--train.output_dir=run", "--resume")
SHARDS = ("--data.shards=shards",)


def truncate(pattern: str) -> Callable[[], None]:
    """Cuts the end off a file."""

    def make() -> None:
        path = next(Path().glob(pattern))
        path.write_bytes(path.read_bytes()[:-5])

    return make


def flip(pattern: str) -> Callable[[], None]:
    """Changes one bit of a file."""

    def make() -> None:
        path = next(Path().glob(pattern))
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        path.write_bytes(content)

    return make


def blank(path: str) -> None:
    """Overwrites the first page of a parquet file."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:4] + bytes(60) + content[64:])


def altered(path: str, change: Callable[[Path], None]) -> Callable[[], None]:
    """Changes a file of both checkpoints and makes their checksums right again."""

    def make() -> None:
        for checkpoint in (FIRST, NEWEST):
            change(Path(checkpoint) / path)
            write_manifest(Path(checkpoint))

    return make


def parquet(**columns: list) -> Callable[[], None]:
    """Makes corpus.parquet."""
    return lambda: pyarrow.parquet.write_table(pyarrow.table(columns), "corpus.parquet")


def other_tokenizer() -> None:
    """A tokenizer of as many tokens as bytes has, with other ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(256 - i) if i < 256 else f"<{i}>": i for i in range(259)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<256>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<256>", eos_token="<257>", pad_token="<258>"
    ).save_pretrained("tokenizer")


def small_tokenizer() -> None:
    """A tokenizer of three tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<eos>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained("small")


def rename_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors["other"] = tensors.pop(next(iter(tensors)))
    save_file(tensors, path, {"format": "pt"})


CASES = [
    # texts
    case("text-missing", text("nowhere.txt"), "'nowhere.txt' does not exist"),
    case("text-glob", text("*.nothing"), "no file matches '*.nothing'"),
    case("text-empty", text("a.txt"), "'a.txt' is empty", make=write("a.txt", "")),
    case("text-blank", text("a.txt"), "'a.txt' is empty", make=write("a.txt", " \n ")),
    case("text-binary", text("a.txt"), "a.txt", "is binary", make=write("a.txt", b"a\0b")),
    case("text-utf8", text("a.txt"), "a.txt", "not UTF-8", make=write("a.txt", b"caf\xe9 au")),
    case("folder-without-text", text("a"), "folder 'a' holds no .txt", make=write("a/b.png", "x")),
    case(
        "jsonl-broken",
        text("a.jsonl"),
        "a.jsonl:2 is not JSON",
        make=write("a.jsonl", '{"text": "a"}\n{"te\n'),
    ),
    case(
        "jsonl-column",
        text("a.jsonl"),
        "a.jsonl:1 has no field 'text'",
        "'txt'",
        make=write("a.jsonl", '{"txt": "a"}\n'),
    ),
    case(
        "jsonl-number",
        text("a.jsonl"),
        "a.jsonl:1",
        "not a string",
        make=write("a.jsonl", '{"text": 3}\n'),
    ),
    case("jsonl-deep", text("a.jsonl"), "a.jsonl:1", "JSON", make=write("a.jsonl", "[" * 100_000)),
    case(
        "parquet-truncated",
        text("corpus.parquet"),
        "'corpus.parquet' is not a parquet file",
        make=lambda: (parquet(text=["a"])(), truncate("corpus.parquet")()),
    ),
    case(
        "parquet-damaged",
        text("corpus.parquet"),
        "'corpus.parquet'",
        make=lambda: (parquet(text=["memory " * 500])(), blank("corpus.parquet")),
    ),
    case(
        "parquet-column",
        text("corpus.parquet"),
        "no column 'text'",
        "'txt'",
        make=parquet(txt=["a"]),
    ),
    case(
        "parquet-numbers",
        text("corpus.parquet"),
        "'corpus.parquet'",
        "text",
        make=parquet(text=[1, 2]),
    ),
    case("validation-empty", (text("a.txt"),), "validation", make=write("a.txt", "a")),
    case("validation-zero", "--data.validation_fraction=0", "validation_fraction is 0"),
    case("passkey-short", source("passkey", files=["corpus"]), "32 tokens are too short", "need"),
    case("passkey-digits", source("passkey", digits=[9, 5]), "digits", "[9, 5]"),
    case("mqar-pairs", source("mqar", pairs=30), "30 pairs need 120 tokens"),
    case("mqar-vocabulary", source("mqar", vocab_size=9999), "vocab_size 9999", "259"),
    case("hub-missing", source("hub", dataset="no/where"), "no/where"),
    case("carry", "--data.carry=true", "data.carry", "train.carry_state: true"),
    # shards
    case(
        "shards-truncated", SHARDS, "shards/", "truncated", make=truncate("shards/*/*.safetensors")
    ),
    case("shards-flipped", SHARDS, "shards/", "altered", make=flip("shards/*/*.safetensors")),
    case("shards-manifest-flipped", SHARDS, "manifest.json", make=flip("shards/*/manifest.json")),
    case(
        "shards-other-tokenizer",
        (*SHARDS, "--data.tokenizer=tokenizer"),
        "another tokenizer",
        "data.shards",
        make=other_tokenizer,
    ),
    case(
        "shards-other-fraction",
        (*SHARDS, "--data.validation_fraction=0.2"),
        "validation_fraction 0.05, not 0.2",
    ),
    case(
        "shards-other-texts",
        SHARDS,
        "another source",
        "changed",
        make=write("corpus/0.txt", "other"),
    ),
    case("shards-file", ("--data.shards=file",), "data.shards", "file", make=write("file", "mine")),
    # checkpoints
    case(
        "weights-truncated",
        (*RESUME, NEWEST),
        "model.safetensors: damaged",
        "bytes where",
        make=truncate(f"{NEWEST}/model.safetensors"),
    ),
    case(
        "weights-flipped",
        (*RESUME, NEWEST),
        "model.safetensors: damaged",
        "content changed",
        make=flip(f"{NEWEST}/model.safetensors"),
    ),
    case(
        "weights-missing",
        (*RESUME, NEWEST),
        "model.safetensors: missing",
        make=remove(f"{NEWEST}/model.safetensors"),
    ),
    case(
        "optimizer-missing",
        (*RESUME, NEWEST),
        "optimizer.safetensors: missing",
        make=remove(f"{NEWEST}/optimizer.safetensors"),
    ),
    case(
        "checksums-missing",
        (*RESUME, NEWEST),
        "manifest.json: missing",
        make=remove(f"{NEWEST}/manifest.json"),
    ),
    case(
        "checksums-flipped",
        (*RESUME, NEWEST),
        "manifest.json",
        make=flip(f"{NEWEST}/manifest.json"),
    ),
    case(
        "state-missing",
        (*RESUME, NEWEST),
        "state.json: missing",
        make=remove(f"{NEWEST}/state.json"),
    ),
    case(
        "state-altered",
        RESUME,
        "state.json is not the state of a run",
        make=altered("state.json", lambda p: p.write_text('{"step": 1}')),
    ),
    case(
        "state-list",
        RESUME,
        "state.json is not the state of a run",
        make=altered("state.json", lambda p: p.write_text("[]")),
    ),
    case(
        "state-words",
        RESUME,
        "state.json is not the state of a run",
        make=altered(
            "state.json",
            lambda p: p.write_text(p.read_text().replace('"step": ', '"step": "2", "stage": ')),
        ),
    ),
    case(
        "config-broken",
        RESUME,
        "config.json",
        make=altered("config.json", lambda p: p.write_text("{")),
    ),
    case(
        "weights-other",
        RESUME,
        NEWEST,
        "its weights are not those of its config",
        make=altered("model.safetensors", rename_tensor),
    ),
    case(
        "optimizer-other",
        RESUME,
        NEWEST,
        "other parameters ('other')",
        make=altered("optimizer.safetensors", rename_tensor),
    ),
    case("other-size", (*RESUME, HIDDEN, "32"), "hidden_size is 16 there and 32 in the config"),
    case(
        "other-mixer",
        (*RESUME, "--model.layers.0.mixer=attention"),
        "another architecture",
        "layers.0.mixer",
    ),
    case(
        "other-vocabulary", (*RESUME, "--model.vocab_size=300"), "vocab_size is 259 there and 300"
    ),
    case(
        "other-tokenizer",
        (*RESUME, "--data.tokenizer=tokenizer"),
        "data.tokenizer: 'tokenizer'",
        "trained with",
        make=other_tokenizer,
    ),
    case(
        "smaller-tokenizer",
        (*RESUME, "--data.tokenizer=small"),
        "vocab_size is 259 there and 3",
        make=small_tokenizer,
    ),
    case(
        "other-optimizer",
        (*RESUME, "--train.optimizer=muon"),
        "saved with another optimizer",
        "train.optimizer",
    ),
    case(
        "fewer-steps", (*RESUME, "--train.steps=1"), "train.steps: 1", f"{NEWEST} has 2 behind it"
    ),
    case("resume-nothing", "--resume", "new: no complete checkpoint"),
    case("resume-nowhere", ("--resume", "nowhere"), "nowhere: no complete checkpoint"),
    case(
        "resume-no-step",
        ("--resume", "run/checkpoints/step_000009"),
        "step_000009: there is no such checkpoint",
    ),
    case("resume-file", ("--resume", "run.yaml"), "run.yaml", "checkpoint"),
    case(
        "resume-into-files",
        ("--train.output_dir=corpus", "--resume", "run"),
        "corpus: the run folder is not empty",
        "another run",
    ),
    case(
        "resume-none-whole",
        RESUME,
        "none of its 2 checkpoints is whole",
        make=lambda: (flip(f"{FIRST}/model.safetensors")(), flip(f"{NEWEST}/state.json")()),
    ),
    # the run folder
    case("folder-in-use", "--train.output_dir=run", "run: the run folder is not empty", "--resume"),
    case("folder-of-others", "--train.output_dir=corpus", "not empty", "--train.output_dir"),
    case("folder-is-file", "--train.output_dir=run.yaml", "run.yaml: the run folder is a file"),
    case("folder-below-file", "--train.output_dir=run.yaml/x", "run.yaml/x", "cannot be written"),
    case("starts-damaged", RESUME, "run/run.json: not the list", make=write("run/run.json", "{")),
    case(
        "metrics-damaged",
        RESUME,
        "metrics.jsonl: line 1 is no record",
        make=write("run/metrics.jsonl", "x\ny\n"),
    ),
    # pretrained models
    case(
        "pretrained-missing",
        "--model={pretrained: nowhere, attach: {memory: titans}}",
        "'nowhere'",
        make=nothing,
    ),
    case(
        "pretrained-no-model", "--model={pretrained: corpus, attach: {memory: titans}}", "'corpus'"
    ),
    case(
        "pretrained-broken",
        ("--model={pretrained: base, attach: {memory: titans}}", "--data.tokenizer=bytes"),
        "model.pretrained: 'base'",
        make=lambda: (
            write("base/config.json", '{"model_type": "llama"}')(),
            write("base/model.safetensors", "x")(),
        ),
    ),
    case("pretrained-and-sizes", "--model.pretrained=corpus", "model.hidden_size", "model.attach"),
    case(
        "pretrained-alone", "--model={pretrained: corpus}", "tokenizer 'corpus' could not be loaded"
    ),
]
