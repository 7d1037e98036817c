"""Whatever a user gets wrong is one line on stderr and exit code 2, before a prompt is read."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memlm.data import ByteTokenizer
from memlm.evaluation.main import main
from memlm.evaluation.subject import Subject


@pytest.fixture
def place(tiny_model, tmp_path, monkeypatch):
    """A folder with models, texts and damaged files, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_model(memory="gated_delta").save_pretrained("model")
    ByteTokenizer().save_pretrained("model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes, **heads)).save_pretrained("llama")
    ByteTokenizer().save_pretrained("llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes, **heads)).save_pretrained("small")
    LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes, **heads)).save_pretrained("bare")
    BertConfig(**sizes).save_pretrained("bert")
    core = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained("words")
    Path("text.txt").write_text("A quiet line. Another sentence here.\n" * 400)
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    Path("empty.txt").write_text(" \n")
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("field.jsonl").write_text('{"content": "a"}\n')
    Path("list.json").write_text("[1, 2]")
    Path("squad.json").write_text(json.dumps({"data": [{"title": "x"}]}))
    Path("broken.json").write_text("{")
    Path("folder").mkdir()
    Path("stories").mkdir()
    Path("stories/qa1_single-supporting-fact_test.txt").write_text("no number\n")
    Path("file").write_text("x")
    Path("taken").mkdir()
    Path("taken/results.json").write_text("{}")
    Path("other").mkdir()
    Path("other/evaluation.json").write_text('{"config": "another"}')
    Path("list").mkdir()
    Path("list/evaluation.json").write_text("[]")
    Path("filed").mkdir()
    Path("filed/records").write_text("x")
    Path("damaged").mkdir()
    Path("damaged/evaluation.json").write_text("{")
    return tmp_path


NEEDLE = "--model model --output out --tasks needle --lengths 200 --trials 4 --haystack text.txt"
CASES = {
    # the words themselves
    "no model": ("--output out", "--model is needed"),
    "no output": ("--model model", "--output is needed"),
    "unknown option": (f"{NEEDLE} --lenght 3", "unknown option --lenght; did you mean 'lengths'?"),
    "no value": (f"{NEEDLE} --seed", "--seed needs a value"),
    "stray word": (f"{NEEDLE} needle", "unexpected argument 'needle'"),
    "same model twice": ("--model model,model --output out", "--model names 'model' twice"),
    "text for a number": (f"{NEEDLE} --trials many", "--trials"),
    # tasks and sizes
    "unknown task": ("--model model --output out --tasks nedle", "did you mean 'needle'?"),
    "unknown RULER task": ("--model m --output o --tasks niah_singel_1", "'niah_single_1'?"),
    "no tasks": ("--model model --output out --tasks []", "tasks: empty"),
    "unknown condition": (f"{NEEDLE} --conditions on,zerod", "did you mean 'zeroed'?"),
    "no length": (f"{NEEDLE} --lengths 4q", "'4q' is no length; valid are 4096, 4k"),
    "range backwards": (f"{NEEDLE} --lengths 8k..4k", "ends below its start"),
    "length too small": (f"{NEEDLE} --lengths 8", "lengths: 8 is too small"),
    "length below the task": (f"{NEEDLE} --lengths 64", "64 tokens are too short for a needle"),
    "one trial": (f"{NEEDLE} --trials 1", "trials: 1 is too small; the least is 2"),
    "one row": (f"{NEEDLE} --batch_size 1", "batch_size: 1 is too small"),
    "no segment": (f"{NEEDLE} --segment 0", "segment: 0 is too small"),
    "negative seed": (f"{NEEDLE} --seed -1", "seed: -1 is too small"),
    "no depths": (f"{NEEDLE} --needle.depths 0", "needle.depths: 0 is too small"),
    "pairs beyond the row": (
        "--model model --output out --tasks mqar --mqar.length 20 --mqar.pairs 6",
        "mqar.length: 20 is too small; the least is 24",
    ),
    "pairs beyond the vocabulary": (
        "--model model --output out --tasks mqar --mqar.length 800 --mqar.pairs 200",
        "200 pairs need a vocabulary of 402",
    ),
    "ruler too short": (
        "--model model --output out --tasks cwe --lengths 200 --trials 2",
        "cwe",
    ),
    # the context of a model
    "longer than attention": (
        "--model llama --output out --tasks needle --lengths 1k --haystack text.txt",
        "a prompt of 1024 tokens is longer than the full attention of llama allows (512)",
    ),
    "one model too short": (
        "--model model,llama --output out --tasks needle --lengths 1k --haystack text.txt",
        "longer than the full attention of llama allows (512)",
    ),
    # corpora
    "missing haystack": (f"{NEEDLE} --haystack no.txt", "file 'no.txt' does not exist"),
    "haystack without text": (f"{NEEDLE} --haystack empty.txt", "is empty"),
    "haystack is binary": (f"{NEEDLE} --haystack binary.txt", "not UTF-8"),
    "folder without text": (f"{NEEDLE} --haystack folder", "folder 'folder' holds no"),
    "glob without files": (f"{NEEDLE} --haystack *.rst", "no file matches '*.rst'"),
    "malformed jsonl": (f"{NEEDLE} --haystack bad.jsonl", "bad.jsonl:2 is not JSON"),
    "jsonl without text": (f"{NEEDLE} --haystack field.jsonl", "has no field 'text'"),
    "json without text": (f"{NEEDLE} --haystack list.json", "has no field 'text'"),
    "missing SQuAD": (f"{NEEDLE} --tasks qa_1 --ruler.squad no.json", "no.json"),
    "broken SQuAD": (f"{NEEDLE} --tasks qa_1 --ruler.squad broken.json", "broken.json"),
    "SQuAD without paragraphs": (f"{NEEDLE} --tasks qa_1 --ruler.squad squad.json", "squad.json"),
    "missing HotpotQA": (f"{NEEDLE} --tasks qa_2 --ruler.hotpotqa no.json", "no.json"),
    "HotpotQA of another layout": (
        f"{NEEDLE} --tasks qa_2 --ruler.hotpotqa list.json",
        "list.json",
    ),
    "missing facts": (f"{NEEDLE} --tasks retention --retention.facts no.json", "no.json"),
    "missing stories": (f"{NEEDLE} --tasks babilong_qa1 --babilong.stories nowhere", "nowhere"),
    "stories of another layout": (
        f"{NEEDLE} --tasks babilong_qa1 --lengths 4k --babilong.stories stories",
        "qa1",
    ),
    "one document": (
        "--model model --output out --tasks perplexity --perplexity.files text.txt",
        "perplexity.files: 1 document with text",
    ),
    # models and tokenizers
    "no such model": (f"{NEEDLE} --model nowhere", "nowhere"),
    "a file": (f"{NEEDLE} --model file", "model: 'file'"),
    "an empty folder": (f"{NEEDLE} --model folder", "no config.json"),
    "not causal": (f"{NEEDLE} --model bert", "bert"),
    "weights are missing": (f"{NEEDLE} --model weightless", "weights"),
    "no tokenizer": (f"{NEEDLE} --model bare", "tokenizer"),
    "tokenizer of another model": (f"{NEEDLE} --model small --tokenizer bytes", "259 tokens"),
    "tokenizer without digits": (f"{NEEDLE} --tokenizer words", "no token for the digit"),
    "missing tokenizer": (f"{NEEDLE} --tokenizer no.model", "no.model"),
    # the output folder
    "finished before": (f"{NEEDLE} --output taken", "taken already holds results.json"),
    "another evaluation": (f"{NEEDLE} --output other", "records of another evaluation"),
    "damaged records": (f"{NEEDLE} --output damaged", "damaged"),
    "records are a list": (f"{NEEDLE} --output list", "damaged"),
    "records are a file": (f"{NEEDLE} --output filed", "filed/records cannot be written"),
    "output is a file": (f"{NEEDLE} --output file/out", "cannot be written"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(case, place, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words, message = CASES[case]
    if "weightless" in words:
        os.makedirs("weightless")
        Path("weightless/config.json").write_text(Path("llama/config.json").read_text())
    asked = []
    monkeypatch.setattr(Subject, "read_contexts", lambda *args, **rest: asked.append(args))
    assert main(_last_wins(words.split())) == 2
    found = capsys.readouterr()
    (line,) = [line for line in found.err.splitlines() if line.startswith("error: ")]
    assert found.err.strip().endswith(line) and "Traceback" not in found.err
    assert message in line and not found.out
    assert not asked, "a prompt was read"
    assert not Path("out/results.json").exists()


def _last_wins(words: list[str]) -> list[str]:
    """The words with an option that is given twice only where it comes last."""
    options: dict[str, list[str]] = {}
    current = ""
    for word in words:
        if word.startswith("--"):
            current = word
            options[current] = []
        options.setdefault(current, [])
        if word != current:
            options[current].append(word)
    return [word for key, values in options.items() for word in ([key] if key else []) + values]


def test_there_are_enough_cases():
    assert len(CASES) >= 40
