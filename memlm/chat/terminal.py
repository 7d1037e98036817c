"""The chat in a terminal: prompts, commands, and what a turn has cost."""

import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

from memlm.chat.conversation import Conversation, Turn
from memlm.errors import UserError, nearest
from memlm.evaluation.report.numbers import bytes_text, rate_text

HELP = """/save PATH      keep what has been read in a file
/load PATH      go on from a file
/wipe           forget everything
/memory         the memories of the model and their sizes
/off, /on       without the memories, and with them again
/temperature X  0 = the most probable token
/help           this list
/quit           leave, as the end of file does; Ctrl-C stops an answer"""
PROMPT = "> "
LOWEST_TEMPERATURE = 0.001


class Quit(Exception):
    """The chat is over."""


class Chat:
    """Turns and commands from standard input until its end; answers on standard output.

    Args:
        conversation: what is talked to.
    """

    def __init__(self, conversation: Conversation):
        self.conversation = conversation
        self.commands: dict[str, Callable[[str], None]] = {
            "save": self.save,
            "load": self.load,
            "wipe": self.wipe,
            "memory": self.memory,
            "off": lambda _: self.switch(False),
            "on": lambda _: self.switch(True),
            "temperature": self.temperature,
            "help": lambda _: print(HELP),
            "quit": self.quit,
        }

    def run(self) -> None:
        """Read lines until the end of file or /quit."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() edits lines and keeps a history with it)
        while True:
            try:
                line = input(PROMPT).strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n/quit or the end of file (Ctrl-D) leaves")
                continue
            except UnicodeDecodeError as error:
                print(f"error: the line is not {error.encoding} ({error.reason})")
                continue
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.turn(line)
            except Quit:
                return
            except UserError as error:
                print(f"error: {error}")

    def turn(self, text: str) -> None:
        """Answer a line and say what it has cost."""
        shown: list[str] = []

        def write(piece: str) -> None:
            shown.append(piece)
            show(piece)

        try:
            turn = self.conversation.answer(text, write)
        finally:
            if shown:  # also the answer that a limit of the context cuts off is a line
                print()
        print(dim(status(self.conversation, turn)))

    def command(self, line: str) -> None:
        """Run a command.

        Raises:
            UserError: for an unknown one, or an argument that it cannot have.
            Quit: after /quit.
        """
        name, _, argument = line[1:].partition(" ")
        if name not in self.commands:
            raise UserError(f"unknown command /{name}{nearest(name, self.commands)}; see /help")
        self.commands[name](argument.strip())

    def save(self, argument: str) -> None:
        """/save PATH."""
        path = _path(argument, "/save")
        self.conversation.save(path)
        size, tokens = bytes_text(path.stat().st_size), self.conversation.tokens
        print(dim(f"{tokens} tokens kept in {path} ({size})"))

    def load(self, argument: str) -> None:
        """/load PATH."""
        path = _path(argument, "/load")
        self.conversation.load(path)
        print(dim(f"{self.conversation.tokens} tokens remembered from {path}"))

    def wipe(self, argument: str) -> None:
        """/wipe."""
        self.conversation.wipe()
        print(dim("everything is forgotten"))

    def memory(self, argument: str) -> None:
        """/memory."""
        for line in describe_memories(self.conversation):
            print(line)

    def switch(self, on: bool) -> None:
        """/on and /off."""
        self.conversation.use_memory = on
        print(dim("the memories are " + ("on" if on else "off: neither read nor written")))

    def temperature(self, argument: str) -> None:
        """/temperature X."""
        self.conversation.sampling.temperature = parse_temperature(argument, "/temperature")

    def quit(self, argument: str) -> None:
        """/quit."""
        raise Quit


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise UserError(f"{command} needs a file, as in {command} memory.safetensors")
    return Path(argument).expanduser()


def parse_temperature(text: str, what: str) -> float:
    """A temperature; raises UserError, which begins with `what`, for what is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    # Below, logits by the temperature are no finite numbers any more.
    if value != 0 and not LOWEST_TEMPERATURE <= value < math.inf:
        raise UserError(f"{what} is {text!r}; it must be 0, or at least {LOWEST_TEMPERATURE}")
    return value


def show(text: str) -> None:
    """Put a piece of an answer on the screen now."""
    print(text, end="", flush=True)


def dim(text: str) -> str:
    """The text in a fainter colour where standard output is a terminal."""
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text


def status(conversation: Conversation, turn: Turn) -> str:
    """One line: state size, tokens read so far and the speeds of a turn."""
    parts = [
        f"state {bytes_text(conversation.nbytes)}",
        f"{conversation.tokens} tokens seen",
        f"read {_speed(turn.read, turn.reading)}",
    ]
    if turn.written > 1:
        parts.append(f"wrote {_speed(turn.written - 1, turn.writing)}")
    if turn.stopped:
        parts.append("stopped")
    if not conversation.use_memory:
        parts.append("memory off")
    return f"[{', '.join(parts)}]"


def _speed(tokens: int, seconds: float) -> str:
    return f"{rate_text(tokens / max(seconds, 1e-9))} tokens/s"


def describe_memories(conversation: Conversation) -> list[str]:
    """One line for every memory, and one for what is carried beside them."""
    model, states = conversation.model, conversation.states
    states = model.init_states(1) if states is None else states
    lines, counted = [], set()
    for name, module in model.memories().items():
        weights = sum(parameter.numel() for parameter in module.parameters())
        state = "no state of its own"
        if name in states:
            state = f"state {bytes_text(states[name].nbytes)}"
            counted.add(name)
        lines.append(f"{name:<12} {module.name:<20} {weights:>12,} weights, {state}")
    rest = sum(state.nbytes for name, state in states.items() if name not in counted)
    return [*lines, f"{'beside them':<12} {'attention, position':<20} {bytes_text(rest)}"]
