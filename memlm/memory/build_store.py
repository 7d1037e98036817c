"""The command `python -m memlm.memory.build_store`: what a model makes of a corpus, as a store."""

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from memlm.cli import Parser, run_entry_point
from memlm.cuda.topk_search import METRICS
from memlm.data.corpus import Corpus, build_corpus
from memlm.data.sources import text_documents
from memlm.data.tokenizers import load_tokenizer
from memlm.errors import UserError, nearest
from memlm.fingerprint import fingerprint
from memlm.memory.corpus_reading import CorpusReader, corpus_reader, entries_of
from memlm.retrieval.choice import ENGINES, choose_engine
from memlm.retrieval.corpus_layout import KeyType
from memlm.retrieval.corpus_store import CorpusStore
from memlm.retrieval.manifest import MANIFEST_FILE, Content
from memlm.retrieval.vector_store import ValueSpec

DESCRIPTION = """Read text with a model and keep, for every token that another one follows, the
hidden state before the head, the next token, the position and the document. Run the same command
again to go on after an interruption."""
VALUES = {
    "next_token": ValueSpec((), torch.int32),
    "position": ValueSpec((), torch.int64),
    "document": ValueSpec((), torch.int64),
}
CONTEXT = 512  # tokens read at a time where nothing else is said
COMMIT_BYTES = 1 << 28  # entries of so many bytes are committed, however few they are


def main(argv: Sequence[str] | None = None) -> int:
    """Build a store as the command line says; returns the exit code (2 for a user's mistake)."""
    return run_entry_point(lambda: _build(parse_arguments(sys.argv[1:] if argv is None else argv)))


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The options of the command line.

    Raises:
        UserError: for an unknown option, or a missing or wrong value.
    """
    parser = Parser(
        prog="python -m memlm.memory.build_store", description=DESCRIPTION, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub id of a causal language model")
    add("--text", required=True, nargs="+", metavar="FILE", help="files, folders or globs")
    add("--out", required=True, type=Path, help="folder of the store")
    add("--tokenizer", help="default: the one beside the model")
    add("--context", type=_count, help="tokens of a row that are read at a time (512, or fewer)")
    add("--batch-size", type=_count, default=8, help="rows that are read at a time (8)")
    add("--dtype", choices=get_args(KeyType), default="float16", help="of the keys (float16)")
    add("--metric", choices=METRICS, default="l2", help="the keys are searched with it (l2)")
    add("--commit-every", type=_count, default=131_072, help="entries between two commits (131072)")
    engines = ("auto", *ENGINES)
    add("--engine", choices=engines, default="exact", help="an index for later searches (exact)")
    options, unknown = parser.parse_known_args(list(words))
    if unknown:
        hint = nearest(unknown[0], parser._option_string_actions)
        raise UserError(f"unknown option {unknown[0]}{hint}")
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _build(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    corpus = build_corpus(text_documents(options.text), tokenizer, "train", fraction=0.0)
    model = _load_model(options.model)
    if int(corpus.tokens.max()) >= model.config.get_text_config().vocab_size:
        raise UserError("--tokenizer: has more tokens than the model; give the model's own")
    reader = corpus_reader(model)
    most, longest = reader.largest_piece, reader.longest_document
    options.context = options.context or min(CONTEXT, most or CONTEXT)
    if most is not None and options.context > most:
        raise UserError(f"--context is {options.context}, but the model reads at most {most}")
    if longest is not None and int(corpus.lengths.max()) - 1 > longest:
        raise UserError(
            f"--text: a document has {int(corpus.lengths.max())} tokens, but the model reads at "
            f"most {longest}"
        )
    try:
        _fill(options, reader, corpus)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{options.out}: cannot be written ({error})") from error


def _fill(options: argparse.Namespace, reader: CorpusReader, corpus: Corpus) -> None:
    """Bring the store to what the options ask for, and say what it is."""
    with _open(options, reader.model, corpus) as store:
        was_complete = store.progress.get("complete")
        if not was_complete:
            read_corpus(reader, corpus, store, _progress)
        engine = options.engine
        if engine == "auto":
            engine = choose_engine(len(store), static=True)
        if engine != "exact" and (store.index is None or store.index["engine"] != engine):
            store.build_index(engine)
        said = "is complete" if was_complete else "is written"
        print(
            f"{options.out} {said}: {len(store)} entries, {store.layout.bytes_per_entry} bytes each"
        )
        if store.index is not None:
            print(f"index: {store.index['engine']}, recall {store.index['recall']:.4f}")


def _load_model(source: str) -> nn.Module:
    """The model of a folder or a Hub id, in evaluation mode, on the GPU if there is one.

    Raises:
        UserError: when there is none, or its weights are missing or damaged.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model: {source!r} cannot be loaded ({reason})") from error
    if report["missing_keys"]:  # transformers starts them at random
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"--model: {source!r} lacks weights ({names})")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _open(options: argparse.Namespace, model: nn.Module, corpus: Corpus) -> CorpusStore:
    """The store of these options, new or to go on with.

    Raises:
        UserError: when the folder holds one of another model, text or option.
    """
    weights = fingerprint(model.state_dict())
    text = fingerprint(
        {
            "tokens": torch.from_numpy(corpus.tokens.astype("int32")),
            "starts": torch.from_numpy(corpus.starts),
        }
    )
    source: Content = {
        "text": text,
        "context": options.context,
        "batch_size": options.batch_size,
        "commit_every": options.commit_every,
    }
    if not (options.out / MANIFEST_FILE).exists():
        return CorpusStore.create(
            options.out,
            key_size=model.get_output_embeddings().weight.shape[1],
            metric=options.metric,
            projection=weights,
            values=VALUES,
            key_type=options.dtype,
            source=source,
        )
    store = CorpusStore.open(options.out, read_only=False)
    layout = store.layout
    theirs = {**layout.source, "metric": layout.metric, "dtype": layout.key_type}
    mine = {**source, "metric": options.metric, "dtype": options.dtype}
    reasons = []
    if theirs.keys() != mine.keys():
        reasons.append("it was not begun by this command")
    elif layout.projection != weights:
        reasons.append("--model has other weights")
    elif theirs["text"] != text:
        reasons.append("--text (or --tokenizer) gives other tokens")
    else:
        reasons += [
            f"--{name.replace('_', '-')} was {theirs[name]}, not {mine[name]}"
            for name in mine
            if theirs[name] != mine[name]
        ]
    if reasons:
        store.close()
        raise UserError(
            f"{options.out}: cannot go on with this store: {reasons[0]}; choose another --out"
        )
    return store


def _progress(total: int, done: int) -> Any:
    return tqdm(total=total, initial=done, unit="tok", unit_scale=True, dynamic_ncols=True)


def read_corpus(
    reader: CorpusReader,
    corpus: Corpus,
    store: CorpusStore,
    progress: Callable[[int, int], Any],
) -> None:
    """Add the entries of a corpus that `store` does not have yet.

    What is committed when is decided by the corpus and the store's source alone, and a state is
    always taken up as it was written: a run that was interrupted ends with the same bytes.

    Args:
        reader: of the model.
        corpus: the documents.
        store: open for writing.
        progress: given the entries in all and those that are there, a bar as in tqdm.
    """
    source = store.layout.source
    lengths = (corpus.lengths - 1).tolist()
    done = store.progress.get("steps", 0)
    steps = reader.steps(lengths, source["context"], source["batch_size"])
    enough = min(source["commit_every"], COMMIT_BYTES // store.layout.bytes_per_entry)
    waiting = 0
    reader.restore(store.progress_tensors)
    with progress(sum(lengths), len(store)) as bar:
        for step in islice(steps, done, None):
            keys, values = entries_of(corpus, step, reader.read(corpus, step))
            store.add(keys, values)
            waiting += len(keys)
            done += 1
            bar.update(len(keys))
            if waiting >= enough:
                state = reader.state()
                store.commit({"steps": done, "complete": False}, state)
                reader.restore(state)
                waiting = 0
    store.commit({"steps": done, "complete": True})


if __name__ == "__main__":
    sys.exit(main())
