"""What the entry points share."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from memlm.errors import SharedError, UserError


class Parser(argparse.ArgumentParser):
    """argparse's, whose mistakes are told in one line, as all are: they raise UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see {self.prog} --help")


def run_entry_point(function: Callable[[], int | None]) -> int:
    """Call `function` and return the exit code.

    A UserError prints `error: ...` on stderr and gives 2 (one that all processes of a run raise is
    printed by the first of each machine), Ctrl-C gives 130, a reader of stdout that
    has seen enough (`| head`) 141; other exceptions are bugs and keep their traceback.
    """
    try:
        code = function() or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        if not isinstance(error, SharedError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What is still to be written at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from memlm.gloo import stop_gloo

            stop_gloo()


def folders_and_output(words: Sequence[str], usage: str) -> tuple[list[Path], Path | None]:
    """The folders that a command line names, and its `--output`: None where it has none.

    Raises:
        UserError: for another option, or one without its value; it tells the `usage`.
    """
    folders, output = [], None
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if key == "--output":
            if not equals:
                if not rest:
                    raise UserError(f"--output needs a value; usage: {usage}")
                value = rest.pop(0)
            output = Path(value)
        elif word.startswith("-"):
            raise UserError(f"unknown option {word}; usage: {usage}")
        else:
            folders.append(Path(word))
    return folders, output
