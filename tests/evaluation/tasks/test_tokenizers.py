"""What holds for every task that hides something in a prompt, with unusual tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from memlm.data.synthetic import GENERATORS
from memlm.errors import UserError
from memlm.evaluation.config import (
    RetentionOptions,
    RulerOptions,
    ScbenchOptions,
    StoriesOptions,
)
from memlm.evaluation.tasks import GROUPS, TASKS, make_task
from memlm.evaluation.tasks.base import PromptTask, Tools

# Tasks of token ids, and those that read whole prompts from published rows.
OTHERS = ("mqar", "mqar_overwrite", "perplexity", *GENERATORS, *GROUPS["recall_completion"])
PROMPTS = [name for name in TASKS if name not in OTHERS and not name.startswith("longbench")]
# One of each family; the others differ in the words only.
FAMILIES = {"babilong": ("babilong_qa3",), "scbench": GROUPS["scbench"]}
SOME = [name for name in PROMPTS if name in FAMILIES.get(name.partition("_")[0], PROMPTS)]


@pytest.fixture
def files(tmp_path: Path) -> dict:
    """Options of tasks: files of 40 articles of one paragraph, and as many pairs; one question
    per context, and lengths for settings."""
    texts = [
        f"The keeper of inn {number} is called Keeper{number}. " + 9 * "It is a quiet house. "
        for number in range(40)
    ]
    squad = [
        {
            "title": str(number),
            "paragraphs": [
                {
                    "context": text,
                    "qas": [
                        {
                            "question": f"Who keeps inn {number}?",
                            "is_impossible": False,
                            "answers": [{"text": f"Keeper{number}"}],
                        }
                    ],
                }
            ],
        }
        for number, text in enumerate(texts)
    ]
    hotpotqa = [
        {
            "question": f"Who keeps inn {number}?",
            "answer": f"Keeper{number}",
            "context": [[f"Inn {number}", [text]]],
        }
        for number, text in enumerate(texts)
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": squad}))
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpotqa))
    path = str(tmp_path / "squad.json")
    return {
        "ruler": RulerOptions(path, str(tmp_path / "hotpotqa.json")),
        "retention": RetentionOptions(path),
        "scbench": ScbenchOptions(turns=1),
        "stories": StoriesOptions([8], haystack=True),
    }


def with_bos() -> PreTrainedTokenizerFast:
    """Characters as in Llama's: a bos, a space before what starts a text, bytes for the rest."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *map(chr, range(33, 127))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("name", SOME)
def test_a_bos_starts_every_prompt(
    name: str, files: dict, make_tools: Callable[..., Tools]
) -> None:
    tokenizer = with_bos()
    task = make_task(name, make_tools({"lengths": [4096], "trials": 4, **files}, tokenizer, 100))
    assert isinstance(task, PromptTask)
    for index in range(3):
        for variant in ("plain", *task.variants):
            trial = task.trial(4096, index, variant)
            ids = trial.context.read(0, len(trial.context))
            (question,) = trial.questions
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.bos_token_id not in question.token_ids
            assert len(ids) + len(question.token_ids) + question.new_tokens <= 4096
            # The question goes on where the context ends.
            assert tokenizer.decode(question.token_ids[:1]) == "\n"


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_a_tokenizer_that_cannot_write_the_answers(
    name: str, words: bool, files: dict, make_tools: Callable[..., Tools]
) -> None:
    """Of all words, or of whole texts, it knows "a" alone."""
    core = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    if words:
        core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    with pytest.raises(UserError, match="the tokenizer (cannot write|has no token)") as error:
        make_task(name, make_tools({"lengths": [4096], "trials": 4, **files}, tokenizer))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["niah", "niah_single_2", "qa_1", "retention"])
def test_half_a_surrogate_pair(
    name: str, files: dict, make_tools: Callable[..., Tools], tmp_path: Path
) -> None:
    """JSON may hold it as an escape; no tokenizer takes it."""
    squad = Path(files["ruler"].squad)
    squad.write_text(squad.read_text().replace("quiet", "\\ud83d"))
    essay = tmp_path / "essay.json"
    essay.write_text(json.dumps({"text": "An end \ud83d here. " * 400}))
    options = {"lengths": [2048], "trials": 4, "haystack": [str(essay)], **files}
    tokenizer = with_bos()
    trial = make_task(name, make_tools(options, tokenizer)).trial(2048, 0)
    context = tokenizer.decode(trial.context.read(0, len(trial.context)).tolist())
    assert "a ? house" in context or "An end ? here." in context
