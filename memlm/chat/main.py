"""The command line of the chat: `memlm-chat`, or `python -m memlm.chat`."""

import argparse
import sys
from collections.abc import Sequence

import torch
from transformers.utils import logging

from memlm.chat.conversation import Conversation, Sampling
from memlm.chat.terminal import Chat, dim, parse_temperature, show, status
from memlm.cli import Parser, run_entry_point
from memlm.data.tokenizers import load_tokenizer
from memlm.errors import UserError, nearest
from memlm.evaluation.loading import check_sizes, load_model

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def main(argv: Sequence[str] | None = None) -> int:
    """Talk to a model; returns the exit code (2 for a mistake of the user)."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_entry_point(lambda: _chat(_parser().parse_args(words)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m memlm.chat",
        description="Talk to a model with a memory; /help lists the commands. With --prompt, or "
        "text piped in, it answers once.",
    )
    parser.add_argument("--model", required=True, help="run folder, saved memory or Hub id")
    parser.add_argument("--tokenizer", help="default: the one beside the model")
    parser.add_argument("--prompt", help="answer this and leave")
    parser.add_argument("--state", metavar="PATH", help="a saved memory state to go on from")
    parser.add_argument("--temperature", default="0.8", help="0 = the most probable token")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answers")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--dtype", default="auto", help=", ".join(DTYPES))
    return parser


def _chat(options: argparse.Namespace) -> None:
    sampling = _sampling(options)
    conversation = load_conversation(
        options.model, options.tokenizer, options.device, options.dtype, sampling
    )
    if options.state is not None:
        conversation.load(options.state)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    if options.prompt is not None or not sys.stdin.isatty():
        _once(conversation, _piped() if options.prompt is None else options.prompt)
        return
    print(dim(f"{options.model}: {len(conversation.model.memories())} memories; /help"))
    Chat(conversation).run()


def _piped() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} ({error.reason})") from error


def _once(conversation: Conversation, text: str) -> None:
    turn = conversation.answer(text, show)
    print(flush=True)
    print(status(conversation, turn), file=sys.stderr)


def _sampling(options: argparse.Namespace) -> Sampling:
    temperature = parse_temperature(options.temperature, "--temperature")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top_p is {options.top_p}; it must be above 0 and at most 1")
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise UserError(f"--seed is {options.seed}; it must be between 0 and 2^63 - 1")
    if options.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {options.max_new_tokens}; it must be at least 1")
    return Sampling(temperature, options.top_p, options.max_new_tokens)


def load_conversation(
    source: str, tokenizer: str | None, device: str | None, dtype: str, sampling: Sampling
) -> Conversation:
    """A model with its tokenizer, nothing read yet.

    Args:
        source: a run folder, a saved memory or a Hub id.
        tokenizer: as for `load_tokenizer`; None = the one beside the model.
        device: None = a GPU if there is one.
        dtype: one of `DTYPES`.
        sampling: how it answers.

    Raises:
        UserError: when there is no such model, tokenizer or device, or the model has no memory.
    """
    if dtype not in DTYPES:
        raise UserError(
            f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}"
        )
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {place!r} cannot be used ({reason})") from error
    logging.set_verbosity_error()  # warnings would stand in the middle of an answer
    logging.disable_progress_bar()
    model = load_model(source, dtype if dtype == "auto" else getattr(torch, dtype))
    if not hasattr(model, "load_memory_state"):
        raise UserError(
            f"--model {source!r} is a {type(model).__name__} without a memory; attach one with "
            "memlm.attach_memory"
        )
    found = load_tokenizer(source if tokenizer is None else tokenizer)
    check_sizes(model, found)
    return Conversation(model.to(place), found, sampling)
