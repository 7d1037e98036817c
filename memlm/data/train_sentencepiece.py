"""SentencePiece models that encode every text without loss, and the same in `tokenizers`."""

import json
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from memlm.errors import UserError

KINDS = ("unigram", "bpe")
SPECIAL_TOKENS = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
}
# The letters of special tokens and of bytes: their names in a text can be spelled.
_LETTERS = "".join(sorted(set("".join(SPECIAL_TOKENS.values()) + "<0xABCDEF123456789>")))
_SENTENCE_BYTES = 1 << 20  # the trainer drops longer ones without a word

_OPTIONS = {
    "byte_fallback": True,
    # The text as it is.
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    # Indentation: a run of spaces can be one piece.
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "required_chars": _LETTERS,
    "max_sentence_length": _SENTENCE_BYTES,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
    # Sums of floats depend on the number of threads: the same on every machine.
    "num_threads": 16,
}
# The score in `tokenizers` of what no text may become. Lower than any word spelled in letters.
_NEVER = -10000.0


def train_sentencepiece(sentences: Sequence[str], kind: str, vocab_size: int) -> bytes:
    """A SentencePiece model of `vocab_size` pieces, special tokens and bytes among them.

    Every text is encoded and decoded without loss. The same sentences give the same bytes. A bar on
    a terminal shows what the trainer is doing.

    Args:
        sentences: texts of up to 256 Ki characters.
        kind: "unigram" or "bpe".
        vocab_size: number of pieces.

    Returns:
        The content of a `.model` file. Its pieces are written with spaces, not with U+2581.

    Raises:
        UserError: for a `vocab_size` that does not suit the text, no text, or too little memory.
    """
    with tempfile.TemporaryDirectory(prefix="memlm-tokenizer-") as name:
        sample, model = Path(name, "sample.jsonl"), Path(name, "trained.model")
        with sample.open("w") as file:
            file.writelines(f"{json.dumps(sentence)}\n" for sentence in sentences)
        options = json.dumps({**_OPTIONS, "model_type": kind, "vocab_size": vocab_size})
        worker = str(Path(__file__).with_name("sentencepiece_worker.py"))
        # -P: this folder's modules are not to be taken for the standard library's.
        command = [sys.executable, "-P", worker, options, str(sample), str(model)]
        code, message = _run_worker(command, vocab_size)
        if code:
            raise UserError(_explain(code, message, vocab_size))
        return model.read_bytes()


def _run_worker(command: list[str], vocab_size: int) -> tuple[int, str]:
    """Exit code, and what it printed on stdout, or else the end of its stderr."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        last: deque[str] = deque(maxlen=3)
        with tqdm(bar_format="{desc} [{elapsed}]", disable=None) as bar:
            for line in _lines_or_pauses(process):
                if line is not None:
                    last.append(line.strip())
                    if phase := _phase(line, vocab_size):
                        bar.set_description_str(phase, refresh=False)
                bar.refresh()  # the seconds go on
        output = process.stdout.read().strip()
        return process.wait(), output or " ".join(last)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            pipe.close()


def _lines_or_pauses(process: subprocess.Popen) -> Iterator[str | None]:
    """The lines of a process's stderr, and None for each half second without one."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stderr:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def _phase(line: str, vocab_size: int) -> str | None:
    """What a line of the trainer's log says of its progress."""
    if found := re.search(r"EM sub_iter=\d+ size=(\d+)", line):
        return f"training: {int(found[1]):,} pieces, to become {vocab_size:,}"
    if found := re.search(r"merges=(\d+)", line):
        return f"training: {int(found[1]):,} merges of about {vocab_size:,}"
    for sign, phase in (
        ("Starts training", "training: reading the sample"),
        ("Extracting seed", "training: counting frequent substrings"),
        ("Tokenizing input sentences", "training: counting words"),
    ):
        if sign in line:
            return phase
    return None


def _explain(code: int, message: str, vocab_size: int) -> str:
    if found := re.search(r"too high \(\d+\).*<= (\d+)", message):
        return f"vocab_size {vocab_size} is too large for this text: at most {found[1]}"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small: the special tokens, the 256 bytes and the "
            f"characters of this text need at least {found[1]}"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "the texts to train a tokenizer on are empty"
    if message.startswith("protobuf: "):
        return f"sentencepiece needs protobuf ({message[10:]}); run: pip install -U protobuf"
    if code < 0:
        return (
            f"the process that trains the tokenizer was killed by signal {-code} (is there too "
            "little memory?); try a lower --max_bytes"
        )
    return f"sentencepiece could not train a tokenizer: {message}"


def fast_tokenizer(model: bytes, kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of the `tokenizers` library with the ids of a `train_sentencepiece` model.

    As in SentencePiece, names of special tokens in a text stay text, and none is added.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(number) for number in range(len(processor))]
    scores = {
        piece: processor.get_score(number)
        for number, piece in enumerate(pieces)
        if not any(
            is_kind(number)
            for is_kind in (processor.is_byte, processor.is_control, processor.is_unknown)
        )
    }
    if kind == "unigram":
        core = models.Unigram(
            [(piece, scores.get(piece, _NEVER)) for piece in pieces],
            unk_id=processor.unk_id(),
            byte_fallback=True,
        )
    else:
        core = models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=_merges(scores),
            unk_token=SPECIAL_TOKENS["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
    tokenizer = Tokenizer(core)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, those of the best piece first."""
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, cut, left, right))
    return [(left, right) for _, _, left, right in sorted(found)]
