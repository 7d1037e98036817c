"""What the processes of a run do as one: mistakes are said once, and no process is left waiting."""

import contextlib
import io
from unittest import mock

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import distributed as dist

from memlm.config import save_config
from memlm.errors import SharedError
from memlm.training.logs import METRICS_FILE
from memlm.training.main import main
from memlm.training.provenance import STARTS_FILE, read_starts
from memlm.training.run_lock import LOCK_FILE, RunLock
from memlm.training.together import on_each, on_main
from tests.memory.processes import run_processes
from tests.training.launching import set_environment


def _train(all_words: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and stderr of each run; RANK in a word becomes the number of the process."""
    set_environment()
    rank = str(dist.get_rank())
    found = []
    with mock.patch("memlm.gloo.stop_gloo"):  # here as well
        for words in all_words:
            AcceleratorState._reset_state(reset_partial_state=True)
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                code = main([word.replace("RANK", rank) for word in words])
            found.append((code, stderr.getvalue()))
    return found


def test_a_mistake_is_said_once_and_ends_all_processes(make_config, tmp_path):
    config, free = make_config("held", steps=1), make_config("free", steps=1)
    save_config(config, tmp_path / "run.yaml")
    words = ["--config", str(tmp_path / "run.yaml")]
    elsewhere = f"--train.output_dir={free.output_dir}"
    (tmp_path / "text_0.txt").write_text("the first process has its text " * 30)
    texts = f"{tmp_path}/text_RANK.txt"
    (linked := tmp_path / "linked").mkdir()
    (linked / STARTS_FILE).write_text("[]")  # as of a run that was killed
    (linked / METRICS_FILE).symlink_to(tmp_path / "gone" / METRICS_FILE)
    steep = ["--train.learning_rate=1e18", "--train.steps=3", "--train.max_skipped_steps=0"]
    cases = {
        "unknown key 'train.stepz'": [*words, "--train.stepz=1"],
        "another training is at work here": words,
        "no complete checkpoint": [*words, elsewhere, "--resume"],
        "'nowhere.txt' does not exist": [
            *words,
            elsewhere,
            "--data.sources=[{type: text, files: nowhere.txt}]",
        ],
        f"'{tmp_path}/text_1.txt' does not exist": [  # on the second one alone
            *words,
            elsewhere,
            f"--data.sources=[{{type: text, files: {texts}}}]",
        ],
        "the model has no product_key memory": [
            *words,
            elsewhere,
            "--train.reinit_keys_after=2",
        ],
        "and the gradient norm nan": [*words, f"--train.output_dir={tmp_path}/steep", *steep],
        f"{linked / METRICS_FILE}: could not be written": [  # the first one alone writes it
            *words,
            f"--train.output_dir={linked}",
            *("--resume", "auto"),
        ],
    }
    with RunLock(config.output_dir, Accelerator(cpu=True)):
        first, second = run_processes(2, _train, [*cases.values(), [*words, elsewhere]])
    for message, (code, line) in zip(cases, first[:-1], strict=True):
        assert code == 2
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        assert message in line
    assert second[:-1] == [(2, "")] * len(cases)

    assert first[-1][0] == second[-1][0] == 0
    (start,) = read_starts(free.output_dir)
    assert len(start["processes"]) == 2
    assert start["environment"]["WORLD_SIZE"] == "2"
    assert not (free.output_dir / LOCK_FILE).exists()


def _meet_a_bug() -> list[tuple[str, str]]:
    """What this process raises when another has a bug."""
    set_environment()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator()

    def fails_on(process: int) -> None:
        if accelerator.process_index == process:
            raise ZeroDivisionError("of a bug")

    found = []
    for call in (
        lambda: on_main(accelerator, lambda: fails_on(0)),
        lambda: on_each(accelerator, lambda: fails_on(1)),
    ):
        try:
            call()
        except (ZeroDivisionError, SharedError) as error:
            found.append((type(error).__name__, str(error)))
    return found


def test_a_bug_on_one_process_leaves_no_other_waiting():
    bug = ("ZeroDivisionError", "of a bug")
    told = ("SharedError", "another process failed (ZeroDivisionError: of a bug)")
    assert run_processes(2, _meet_a_bug) == [[bug, told], [told, bug]]
