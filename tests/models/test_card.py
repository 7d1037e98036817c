"""Model cards: what they say of a model and its run, and whose cards stay."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from memlm import MemLMConfig, MemLMForCausalLM, UserError, attach_memory
from memlm.models.card import MARK, card_config, write_card, write_run_card
from memlm.models.run_facts import find_run, read_run
from tests.models.attach_tools import base_model

WINDOW = {"type": "sliding_attention", "window": 8}
LAYERS = [
    {"repeat": 2, "mixer": WINDOW, "memory": {"type": "gated_delta", "num_heads": 2}, "ffn": None},
    {"mixer": "titans", "ffn": "swiglu"},
]
PICTURE = b"\x89PNG a picture"


def score(value, low, high):
    return {"value": value, "low": low, "high": high, "count": 8}


RESULTS = {
    "runs": [
        {
            "model": {"name": "run", "source": None},
            "tasks": {
                "needle": {
                    "title": "Needle in real text",
                    "description": "A key is hidden.",
                    "metric": "recall (%)",
                    "kind": "hits",
                    "scores": {
                        "512": {"on": score(0.875, 0.5, 0.98), "off": score(0.0, 0.0, 0.3)},
                        "1024": {"on": score(0.5, 0.2, 0.8)},
                    },
                },
                "perplexity": {
                    "title": "Loss by position",
                    "description": "The loss.",
                    "metric": "bits per byte",
                    "kind": "losses",
                    "scores": {
                        "all": {"on": score(1.25, 1.2, None)},
                        "infinite": {"on": score(None, None, None)},
                    },
                },
            },
        }
    ],
    "confidence": 0.95,
}
CONFIG = {
    "data": {
        "tokenizer": "bytes",
        "sources": [
            {"type": "hub", "dataset": "someone/text", "split": "train"},
            {"type": "hub", "dataset": "/home/user/texts"},
            {"type": "passkey", "digits": [5, 5]},
        ],
    },
    "train": {"steps": 1000, "tokens_per_step": 8192},
}
START = {
    "command": "/home/user/venv/bin/python /home/user/train.py --config=/home/user/mine.yaml --a b",
    "base": {"name": "/home/user/models/llama", "revision": None},
    "directory": "/home/user/code",
    "host": "secret-machine",
    "code": {"revision": "abc123", "dirty": True},
    "versions": {"memlm": "0.1.0", "torch": "2.13.0"},
    "processes": [{"host": "secret-machine", "name": "NVIDIA H100"}] * 2,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, as training and evaluation leave it."""
    folder = tmp_path / "runs" / "mine"
    torch.manual_seed(0)
    model = MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=LAYERS))
    model.save_pretrained(folder)
    RESULTS["runs"][0]["model"]["fingerprint"] = model.weights_fingerprint()[:16]
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "run.json").write_text(json.dumps([{**START, "command": "python old.py"}, START]))
    losses = {"evaluation": True, "bits": 1.5, "bits_per_byte": 1.5, "bits_per_byte_off": 2.25}
    records = [{"step": 0, **losses}, {"step": 1000, **losses, "answer_bits": None}, {"step": 999}]
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 10')
    (folder / "training.png").write_bytes(PICTURE)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "results.json").write_text(json.dumps(RESULTS))
    for name in ("needle_curves.png", "needle_depths_1.png", "perplexity_losses.png"):
        (folder / "evaluation" / name).write_bytes(PICTURE + name.encode())
    return folder


def test_a_card_tells_what_the_run_folder_knows(run, tmp_path):
    config = card_config(run)
    assert write_card(tmp_path, config, run, "someone/mine", "apache-2.0", ["mine"])
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "text-generation",
    )
    assert data.tags == ["memlm", "gated_delta", "titans", "mine"]
    assert data.datasets == ["someone/text"] and data.base_model is None
    found = {(r.dataset_type, r.dataset_config): r.metric_value for r in data.eval_results}
    assert found == {
        ("memlm-needle", "512"): 87.5,
        ("memlm-needle", "1024"): 50.0,
        ("memlm-perplexity", "all"): 1.25,
    }
    text = card.content
    for words in (
        "| 0 to 1 | `sliding_attention` (window 8) | `gated_delta` (num_heads 2) | – |",
        "| 2 | `titans` | – | `swiglu` |",
        'AutoModelForCausalLM.from_pretrained("someone/mine")',
        "1,000 steps of 8,192 tokens, tokenizer `bytes`",
        "- `passkey` (digits [5, 5])",
        "| held-out rows, after step 1,000 | |\n|---|---|\n| bits per byte | 1.5000 |",
        "| bits per byte, memories off | 2.2500 |",
        "tokens_per_step: 8192",
        "| 512 | 87.5 [50.0, 98.0] | 0.0 [0.0, 30.0] |\n| 1024 | 50.0 [20.0, 80.0] | – |",
        "| all | 1.250 [1.200, ?] |",
        "![Needle in real text](needle_depths_1.png)",
        "![Loss by position](perplexity_losses.png)",
        "tokenizer `bytes`, from the weights of `llama`, on:",
        "python train.py --config=mine.yaml --a b",
        "torch 2.13.0; revision `abc123`, changed. Processes: 2 (NVIDIA H100).",
    ):
        assert words in text, words
    for words in ("secret-machine", "/home/user/m", "/home/user/v", "old.py", "answers"):
        assert words not in text
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["needle_depths_1.png", "perplexity_losses.png", "training.png"]
    assert (tmp_path / "needle_depths_1.png").read_bytes() == PICTURE + b"needle_depths_1.png"


def test_the_state_of_the_memories_is_counted(run, tmp_path):
    write_card(tmp_path, card_config(run), run)
    model = MemLMForCausalLM.from_pretrained(run)
    states = model.init_states(1)
    total = sum(states[name].nbytes for name in model.memory_state_names())
    assert f"keep {total:,} bytes of a sequence" in (tmp_path / "README.md").read_text()


def test_a_card_is_written_anew_unless_a_user_wrote_it(run, tmp_path):
    assert write_run_card(run)
    assert "# mine" in (run / "README.md").read_text()
    (run / "README.md").write_text((run / "README.md").read_text() + "more")
    assert write_run_card(run)
    assert not (run / "README.md").read_text().endswith("more")
    own = (run / "README.md").read_text().replace(MARK, "By me.")
    (run / "README.md").write_text(own)
    assert not write_run_card(run)
    # The user's card of the run goes where its model goes.
    assert not write_card(tmp_path, card_config(run), run)
    assert (run / "README.md").read_text() == (tmp_path / "README.md").read_text() == own


def test_a_model_of_a_run_is_saved_with_its_card(run, tmp_path):
    model = MemLMForCausalLM.from_pretrained(run)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "1,000 steps" in text and "87.5" in text
    assert find_run(tmp_path) is None and find_run("") is None
    # Training saves without a card, and a model that was trained on is not the run's.
    model.save_pretrained(run / "checkpoints" / "step_1000")
    assert not (run / "checkpoints" / "step_1000" / "README.md").exists()
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / "README.md").exists()


def test_a_checkpoint_is_not_the_end_of_its_run(run, tmp_path):
    checkpoint = run / "checkpoints" / "step_0"
    torch.manual_seed(9)
    MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=LAYERS)).save_pretrained(checkpoint)
    (checkpoint / "state.json").write_text('{"step": 0}')
    MemLMForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Step 0 of a run of 1,000 steps" in text and "after step 0 |" in text
    assert "Recall" not in text
    (checkpoint / "state.json").write_text('{"step": 7}')
    write_card(tmp_path, card_config(checkpoint), checkpoint)
    text = (tmp_path / "README.md").read_text()
    assert "Step 7 of a run" in text and "held-out" not in text


def test_a_model_without_a_run_has_a_card_too(tmp_path):
    config = MemLMConfig(hidden_size=32, layers=LAYERS[:1], output="neural_cache")
    write_card(tmp_path, config)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None and card.data.eval_results is None
    assert "| output | – | `neural_cache` | – | |" in card.content
    assert "## Training" not in card.content
    plain = MemLMConfig(hidden_size=32, layers=[{"mixer": "attention", "ffn": "swiglu"}])
    write_card(tmp_path, plain)
    assert "A causal language model with no memory" in (tmp_path / "README.md").read_text()


def test_the_card_of_an_attached_memory_names_its_model(tmp_path):
    model = base_model("llama")
    model.name_or_path = model.config._name_or_path = "someone/llama"
    attach_memory(model, {"memory": "gated_delta", "layers": [1], "output": "neural_cache"})
    model.save_pretrained(tmp_path)
    write_card(tmp_path, card_config(tmp_path), repo_id="someone/memory")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/llama"
    assert card.data.tags == ["memlm", "gated_delta", "neural_cache"]
    assert 'memlm.load_attached("someone/memory")' in card.content
    assert "memory `gated_delta` and output memory `neural_cache` in layers 1" in card.content


def test_scores_of_other_weights_are_left_out(run):
    results = json.loads(json.dumps(RESULTS))
    other = json.loads(json.dumps(results["runs"][0]))
    other["model"]["fingerprint"] = "0" * 16
    results["runs"] = [other, results["runs"][0]]
    (run / "evaluation" / "needle_depths_2.png").write_bytes(PICTURE)
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    assert read_run(run).tasks[0].picture.name == "needle_depths_2.png"
    (run / "other").mkdir()
    (run / "other" / "results.json").write_text("[]")
    assert len(read_run(run).tasks) == 2
    results["runs"] = [other]
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    assert read_run(run).tasks == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "[", "run.json: damaged: it is no JSON"),
        ("config.yaml", "a: [", "config.yaml: damaged: it is no YAML"),
        ("config.json", "{", "config.json is missing or damaged"),
        ("model.safetensors", "no", "the weights are damaged"),
    ],
)
def test_damaged_files_are_named(run, name, content, message):
    (run / name).write_text(content)
    with pytest.raises(UserError, match=message):
        write_run_card(run)


def test_a_model_of_another_library_has_no_card(tmp_path):
    base_model("llama").save_pretrained(tmp_path)
    assert card_config(tmp_path) is None
    assert not write_run_card(tmp_path)
