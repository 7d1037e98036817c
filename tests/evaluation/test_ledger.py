"""Nothing runs twice and nothing is lost, wherever an evaluation stops."""

import json
import multiprocessing
import time
from unittest import mock

import pytest

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation import EvaluationConfig, evaluate
from memlm.evaluation.config import MqarOptions, NeedleOptions
from memlm.evaluation.ledger import Batch, Done, Ledger, read_records
from memlm.evaluation.main import main
from memlm.evaluation.show_prompt import main as show_prompt
from memlm.evaluation.tasks.base import Record

MEASURED = {"seconds", "cost", "peak_memory_bytes"}


def _config(text_file, **options) -> EvaluationConfig:
    values = {
        "tasks": ["needle", "mqar"],
        "lengths": [150, 300],
        "trials": 6,
        "needle": NeedleOptions(depths=2, distance=45),
        "mqar": MqarOptions(length=24, pairs=[3], rows=4),
        "haystack": [str(text_file)],
        "batch_size": 2,
        "segment": 64,
    }
    return EvaluationConfig(**(values | options))


def _without_times(value):
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in MEASURED}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _done(number: int) -> Done:
    record = Record("150", number, "on", 1.0, [{"prediction": "ü\u2028", "references": ["ü"]}])
    return Done(Batch(0, "needle", "150", number, number + 1), [record], {"tokens": {"read": 3}})


def test_what_was_added_is_found_again(tmp_path):
    ledger = Ledger(tmp_path, {"seed": 0})
    for number in range(3):
        ledger.add(_done(number))
    ledger.close()
    again = Ledger(tmp_path, {"seed": 0})
    assert again.done == ledger.done and len(again.done) == 3
    again.close()


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_an_unfinished_line_is_dropped(tmp_path, cut):
    ledger = Ledger(tmp_path, {})
    for number in range(3):
        ledger.add(_done(number))
    ledger.close()
    (path,) = (tmp_path / "records").glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-cut])
    again = Ledger(tmp_path, {})
    assert list(again.done) == [_done(0).batch.key, _done(1).batch.key]
    again.add(_done(2))
    again.close()
    assert [done.batch.first for done in read_records(tmp_path)] == [0, 1, 2]


def test_damage_before_the_end_is_refused(tmp_path):
    ledger = Ledger(tmp_path, {})
    ledger.add(_done(0))
    ledger.close()
    (path,) = (tmp_path / "records").glob("*.jsonl")
    path.write_bytes(b'{"no": 1}\n' + path.read_bytes())
    with pytest.raises(UserError, match=r"0\.jsonl:1 is damaged"):
        Ledger(tmp_path, {})
    path.write_bytes(b'{"no": "\xff"}\n' + path.read_bytes())
    with pytest.raises(UserError, match=r"0\.jsonl:1 is damaged"):
        Ledger(tmp_path, {})


def test_half_a_surrogate_pair_is_kept(tmp_path):
    """As in a reference of a SQuAD file; UTF-8 has no such thing."""
    ledger, done = Ledger(tmp_path, {}), _done(0)
    done.records[0].answers[0]["prediction"] = "\ud800"
    ledger.add(done)
    ledger.close()
    assert list(read_records(tmp_path)) == [done]


def test_records_of_another_evaluation_are_refused(tmp_path):
    Ledger(tmp_path, {"config": 1, "models": 2}).close()
    with pytest.raises(UserError, match=r"records of another evaluation \(models differ\)"):
        Ledger(tmp_path, {"config": 1, "models": 3})
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Ledger(tmp_path, {"config": 1, "models": 2})


def test_a_folder_belongs_to_one_evaluation_at_a_time(tmp_path):
    first = Ledger(tmp_path, {})
    with pytest.raises(UserError, match="another evaluation is writing into"):
        Ledger(tmp_path, {})
    # One that is refused leaves no trace, even if both began at once.
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(UserError, match="another evaluation is writing into"):
        Ledger(tmp_path, {"config": 2})
    assert not (tmp_path / "evaluation.json").exists()
    first.close()
    Ledger(tmp_path, {}).close()
    with pytest.raises(UserError, match="records of another"):
        Ledger(tmp_path, {"config": 2})
    Ledger(tmp_path, {}).close()


@pytest.fixture
def no_report(monkeypatch):
    """Records and returned numbers are looked at, not the pictures."""
    monkeypatch.setattr("memlm.evaluation.runner.write_results", lambda results, folder: None)


class Stopped(Exception):
    pass


@pytest.mark.usefixtures("no_report")
def test_a_stopped_evaluation_goes_on(gated_delta, tokenizer, text_file, tmp_path, monkeypatch):
    config = _config(text_file)
    whole = evaluate(gated_delta, tokenizer, config, tmp_path / "whole", progress=False)
    asked = []
    run = "memlm.evaluation.tasks.base.PromptTask.run"
    from memlm.evaluation.tasks.base import PromptTask

    original = PromptTask.run

    def counted(self, setting, trials, subject, meter):
        if len(asked) == 4:
            raise Stopped
        asked.append((setting.label, trials))
        return original(self, setting, trials, subject, meter)

    monkeypatch.setattr(run, counted)
    with pytest.raises(Stopped):
        evaluate(gated_delta, tokenizer, config, tmp_path / "cut", progress=False)
    assert not (tmp_path / "cut" / "results.json").exists()
    before = list(asked)
    monkeypatch.setattr(
        run,
        lambda self, setting, trials, *rest: (
            asked.append((setting.label, trials)) or original(self, setting, trials, *rest)
        ),
    )
    found = evaluate(gated_delta, tokenizer, config, tmp_path / "cut", progress=False)
    assert before == asked[:4] and len(set(asked)) == len(asked) == 6
    assert _without_times(found) == _without_times(whole)


def test_other_options_need_another_folder(gated_delta, tokenizer, text_file, tmp_path):
    Ledger(tmp_path, {"config": "another"}).close()
    with pytest.raises(UserError, match="config"):
        evaluate(gated_delta, tokenizer, _config(text_file), tmp_path, progress=False)


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path):
    path = tmp_path / "model"
    tiny_model(memory="gated_delta").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _words(folder, text_file, output) -> list[str]:
    words = f"--model {folder} --tasks needle --lengths 150..600 --trials 12 --batch_size 2"
    words += f" --needle.distance 45 --needle.depths 2 --haystack {text_file} --output {output}"
    return words.split()


def _evaluate_slowly(words: list[str]) -> None:
    """In a process of its own, which does not end before it is killed."""
    add = Ledger.add

    def slow(ledger: Ledger, done: Done) -> None:
        add(ledger, done)
        time.sleep(0.1)

    with mock.patch.object(Ledger, "add", slow):
        main(words)
    time.sleep(120)


@pytest.mark.usefixtures("no_pictures")
def test_killed_at_any_moment(folder, text_file, tmp_path):
    """kill -9 while it writes its records; the numbers are those of a run in one go."""
    output = tmp_path / "killed"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memlm.evaluation.main"])
    words = _words(folder, text_file, output)
    process = context.Process(target=_evaluate_slowly, args=(words,))
    process.start()
    records = output / "records" / "0.jsonl"
    deadline = time.monotonic() + 120
    while not (records.exists() and records.read_bytes().count(b"\n") >= 3):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    finished = records.read_bytes()
    finished = finished[: finished.rfind(b"\n") + 1]
    assert finished.count(b"\n") < 18 and not (output / "results.json").exists()
    assert main(words) == 0
    assert main(_words(folder, text_file, tmp_path / "whole")) == 0
    assert records.read_bytes().startswith(finished)
    keys = [done.batch.key for done in read_records(output)]
    assert len(keys) == len(set(keys)) == 18
    killed, whole = (
        json.loads((path / "results.json").read_text()) for path in (output, tmp_path / "whole")
    )
    assert _without_times(killed["runs"]) == _without_times(whole["runs"])


@pytest.fixture(scope="module")
def evaluated(tiny_model, tmp_path_factory):
    """The folder of an evaluation whose prompts are asked for; nothing writes into it."""
    folder = tmp_path_factory.mktemp("evaluated")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} of a quiet text without keys\n" for i in range(160)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memlm.evaluation.runner.write_results", lambda results, folder: None)
        model = tiny_model(memory="gated_delta")
        evaluate(model, ByteTokenizer(), _config(text), folder / "out", progress=False)
    return folder / "out"


def test_any_prompt_can_be_made_again(evaluated, capsys):
    words = [str(evaluated), "--task", "needle", "--setting", "300", "--trial", "5"]
    for variant in ("plain", "changed", "absent"):
        assert show_prompt([*words, "--variant", variant, "--tokenizer", "bytes"]) == 0
        found = capsys.readouterr()
        about = json.loads(found.err.splitlines()[-1])
        assert about["checked"] is True
        ((key,),) = about["references"]
        assert (f"# The pass key is {key}.\n" in found.out) == (variant != "absent")
        assert found.out.endswith("# The pass key is \n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--setting", "301"], "--setting: '301' is none of 150, 300"),
        (["--setting", "150", "--trial", "6"], "--trial: 6 is not in 0 .. 5"),
        (["--task", "mqr", "--setting", "3"], "'mqr' is not in this evaluation; did you mean"),
        (["--task", "mqar", "--setting", "3"], "mqar asks for every token"),
        (["--setting", "150", "--model", "mode"], "'mode' is none of model; did you mean"),
    ],
)
def test_prompts_that_are_not_there(evaluated, capsys, words, message):
    start = [str(evaluated), "--tokenizer", "bytes", "--task", "needle"]
    assert show_prompt([*start, *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("no_report")
def test_a_prompt_whose_text_has_changed(gated_delta, tokenizer, text_file, tmp_path, capsys):
    evaluate(gated_delta, tokenizer, _config(text_file), tmp_path / "out", progress=False)
    words = [str(tmp_path / "out"), "--task", "needle", "--setting", "150"]
    assert show_prompt(words) == 2
    assert "--tokenizer is needed" in capsys.readouterr().err
    text_file.write_text(text_file.read_text().upper())
    assert show_prompt([*words, "--tokenizer", "bytes"]) == 2
    assert "its texts or its tokenizer have changed" in capsys.readouterr().err
    assert show_prompt([str(tmp_path), *words[1:]]) == 2
    assert "holds no evaluation" in capsys.readouterr().err
    for content in ("{}", "[]", '{"config": {"new": 1}}'):
        (tmp_path / "evaluation.json").write_text(content)
        assert show_prompt([str(tmp_path), *words[1:]]) == 2
        assert "is not of an evaluation of this version" in capsys.readouterr().err
