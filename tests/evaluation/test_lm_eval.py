"""lm-evaluation-harness on a saved model, without a line of ours in between."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memlm.data import load_tokenizer
from memlm.data.train_tokenizer import main as train_tokenizer
from memlm.models import MemLMConfig, MemLMForCausalLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm_eval is not installed (pip install 'lm_eval[hf]')",
    ),
]

QUESTIONS = [
    ("The opposite of hot is", ["cold", "blue", "loud and clear", "<s>"]),
    ("import numpy as", ["np", "xyz", "", "é😀"]),
    (
        "A question that is so much longer that batches need padding: def",
        ["main():", "x", "(", ")"],
    ),
    ("", ["nothing before it", "a", "b", "c"]),
]
NEW_TOKENS = 12
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "continuations": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}?",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["no such words"], "max_gen_toks": NEW_TOKENS},
        "metric_list": [{"metric": "exact_match"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}.",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}
STARTS = {
    "module_beside_the_weights": (["-m", "lm_eval"], ",trust_remote_code=True"),
    "imported": (["-c", "import memlm; from lm_eval.__main__ import cli_evaluate as m; m()"], ""),
}


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, a tokenizer, tasks and their data."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "bytes":
        tokenizer = load_tokenizer("bytes")
    else:
        (root / "text.txt").write_text(Path(__file__).read_text())
        words = f"--text {root}/text.txt --vocab_size 450 --kind bpe --output {root}/tokenizer"
        assert train_tokenizer(words.split()) == 0
        tokenizer = load_tokenizer(str(root / "tokenizer"))
    torch.manual_seed(0)
    layers = [
        {"mixer": {"type": "gated_delta", "num_heads": 2, "head_dim": 8}, "ffn": "swiglu"},
        {"mixer": {"type": "attention", "window": 8}, "memory": "titans", "ffn": "swiglu"},
    ]
    config = MemLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        layers=layers,
        initializer_range=0.3,  # logits that differ
    )
    MemLMForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = [{"question": q, "choices": choices, "answer": 0} for q, choices in QUESTIONS]
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "tasks").mkdir()
    for name, task in TASKS.items():
        data = {"data_files": {"test": "questions.jsonl"}}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, **task}
        (root / "tasks" / f"{name}.yaml").write_text(json.dumps({**task, "test_split": "test"}))
    return root


def harness(folder: Path, output: str, start: str, batch_size: int) -> dict:
    """The logged samples of each task."""
    command, extra = STARTS[start]
    arguments = f"pretrained=model,max_length=512{extra}"
    words = [
        *("--model", "hf", "--model_args", arguments, "--tasks", ",".join(TASKS)),
        *("--include_path", "tasks", "--device", "cpu", "--batch_size", str(batch_size)),
        *("--log_samples", "--output_path", output),
    ]
    subprocess.run(
        [sys.executable, *command, *words],
        cwd=folder,
        check=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")},
    )
    files = {name: list((folder / output).rglob(f"samples_{name}_*.jsonl")) for name in TASKS}
    return {
        name: [json.loads(line) for line in file.read_text().splitlines()]
        for name, (file,) in files.items()
    }


def log_likelihood(model: MemLMForCausalLM, before: list[int], after: list[int]) -> float:
    """Of ids `after` behind ids `before`, by one forward pass, in nats."""
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(after)[:, None]).sum().item()


@pytest.mark.parametrize(
    ("start", "batch_size"), [("module_beside_the_weights", 1), ("imported", 4)]
)
def test_the_harness_reports_what_the_model_computes(
    folder: Path, start: str, batch_size: int
) -> None:
    samples = harness(folder, f"out_{start}", start, batch_size)
    model = MemLMForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = load_tokenizer(str(folder / "model"))
    for sample in samples["choices"]:
        for argument, (found, _) in zip(
            sample["arguments"].values(), sample["filtered_resps"], strict=True
        ):
            before = tokenizer(argument["arg_0"]).input_ids
            whole = tokenizer(argument["arg_0"] + argument["arg_1"]).input_ids
            if not before:
                before, whole = [tokenizer.bos_token_id], [tokenizer.bos_token_id, *whole]
            expected = log_likelihood(model, before, whole[len(before) :])
            assert float(found) == pytest.approx(expected, abs=1e-3, rel=1e-5)
    for sample in samples["texts"]:
        ids = tokenizer(sample["arguments"]["gen_args_0"]["arg_0"]).input_ids
        expected = log_likelihood(model, [tokenizer.bos_token_id], ids)
        assert float(sample["filtered_resps"][0]) == pytest.approx(expected, abs=1e-3, rel=1e-5)
    for sample in samples["continuations"]:
        ids = tokenizer(sample["arguments"]["gen_args_0"]["arg_0"]).input_ids
        before = len(ids)
        while len(ids) < before + NEW_TOKENS and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        greedy = tokenizer.decode(ids[before:], skip_special_tokens=True)
        assert sample["filtered_resps"] == [greedy]
