"""Tasks for lm-evaluation-harness, with the prompts and scores of eval.py.

python -m memlm.evaluation.export --tasks needle,ruler --lengths 1k,4k --trials 50 --tokenizer RUN
--output DIR

DIR gets one JSONL file of documents and one YAML file for each task and length, and a Python file
with scores. Every option of eval.py that says what is asked is one here too. The conditions of a
memory (off, reset, swapped) and changed prompts stay behind.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from memlm.cli import run_entry_point
from memlm.data.tokenizers import load_tokenizer
from memlm.errors import UserError
from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.export import answer_scores
from memlm.evaluation.export.documents import make_documents
from memlm.evaluation.export.task_files import SCORES_MODULE, find_score, task_yaml
from memlm.evaluation.loading import load_subject
from memlm.evaluation.main import parse_arguments
from memlm.evaluation.tasks import expand_tasks, make_task
from memlm.evaluation.tasks.base import PromptTask, Tools
from memlm.files import write_folder

USAGE = (
    "python -m memlm.evaluation.export --tasks needle,ruler --lengths 1k,4k --trials 50 "
    "--tokenizer RUN --output DIR"
)
_OUT_OF_REACH = ("needle", "retention")  # hide things further away than attention looks


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _export(list(sys.argv[1:] if argv is None else argv)))


def _export(words: list[str]) -> None:
    if "--help" in words or "-h" in words:
        print(__doc__)
        return
    if any(word.partition("=")[0] == "--model" for word in words):
        raise UserError(f"--model is no option of the export; usage: {USAGE}")
    options, config = parse_arguments([*words, "--model=tokenizer"])
    if options["tokenizer"] is None:
        raise UserError(f"--tokenizer is needed: a run folder or a Hub id; usage: {USAGE}")
    config.validate()
    names = expand_tasks(config.tasks)
    for name in names:
        find_score(name)
    folder = Path(options["output"]).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output: {folder} is not empty; choose a new folder")
    files, longest = export_files(options["tokenizer"], config, folder)

    def write(target: Path) -> None:
        for file, text in files.items():
            (target / file).write_text(text, encoding="utf-8")

    write_folder(folder, write, "choose another --output")
    made = [file.removesuffix(".yaml") for file in files if file.endswith(".yaml")]
    print(
        f"{len(made)} tasks in {folder}:\n\nlm_eval --model hf --model_args "
        f"pretrained={options['tokenizer']},trust_remote_code=True,max_length={longest} "
        f"--include_path {folder} --tasks {','.join(made)}"
    )


def export_files(source: str, config: EvaluationConfig, folder: Path) -> tuple[dict[str, str], int]:
    """The texts of all files by name, and the tokens that the longest prompt and answer take.

    Args:
        source: folder or Hub id of the tokenizer. Where the folder holds a model and a task hides
            things out of attention's reach, that is the model's.
        config: of the evaluation.
        folder: where the files will lie.

    Raises:
        UserError: for what makes tasks fail, and for prompts that are other tokens as text.
    """
    names = expand_tasks(config.tasks)
    distance = _distance(source, config) if set(names) & set(_OUT_OF_REACH) else 0
    tools = Tools(config, load_tokenizer(source), distance)
    files, longest = {}, 0
    for name in names:
        task, score = make_task(name, tools), find_score(name)
        assert isinstance(task, PromptTask)
        for setting in task.settings():
            documents = make_documents(task, setting)
            longest = max(longest, documents.tokens + documents.new_tokens)
            stem = f"memlm_{name}_{setting.label}"
            least, most = documents.least_new_tokens, documents.new_tokens
            if least < most:
                print(
                    f"{stem}: answers have at most {least} to {most} tokens in eval.py, each "
                    f"question its own number; the harness gives all of them {most}",
                    file=sys.stderr,
                )
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in documents.rows]
            files[f"{stem}.jsonl"] = "".join(lines)
            about = {"seed": config.seed, "setting": int(setting.label), "distance": distance}
            files[f"{stem}.yaml"] = task_yaml(
                stem,
                f"{task.title}, {task.axis}: {setting.label}",
                score,
                folder / f"{stem}.jsonl",
                most,
                about,
            )
    files[f"{SCORES_MODULE}.py"] = Path(answer_scores.__file__).read_text(encoding="utf-8")
    return files, longest


def _distance(source: str, config: EvaluationConfig) -> int:
    """How far the attention of the model beside a tokenizer looks back; 0 without a model."""
    if not (Path(source) / "config.json").is_file():
        return 0
    return load_subject(source, None, config, "cpu").plan.attention_reach or 0


if __name__ == "__main__":
    sys.exit(main())
