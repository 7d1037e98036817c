"""Checkpoints of four processes go on in two and in one, and become a model folder, bit by bit."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.data import ByteTokenizer
from memlm.models.modeling import PARTS_FOLDER
from memlm.training import Trainer, consolidate
from memlm.training.checkpoint import RunState, whole_weights, write_state
from memlm.training.fully_sharded import shard_by_blocks
from memlm.training.manifest import write_manifest
from memlm.training.retention import checkpoint_path
from memlm.training.sharded import WEIGHTS, first_names, read_weights, write_parts
from tests.memory.processes import run_processes
from tests.training.launching import Job, save_base, train_in
from tests.training.test_processes import final

LAYERS = [
    {
        "mixer": {"type": "gated_delta", "num_heads": 2, "head_dim": 8},
        "memory": {"type": "knn_cache", "capacity": 12, "segment": 4, "key_size": 8, "top_k": 3},
        "ffn": "swiglu",
    },
    {
        "mixer": {"type": "titans", "num_heads": 2, "head_dim": 8, "chunk_size": 16},
        "ffn": {"type": "product_key", "num_keys": 7, "num_heads": 2, "top_k": 4, "share": "table"},
    },
    {
        "mixer": {"type": "sliding_attention", "window": 16, "num_heads": 2},
        "ffn": {"type": "product_key", "num_keys": 7, "num_heads": 2, "top_k": 4, "share": "table"},
    },
]
# Nothing that four can share equally.
MODEL = {"hidden_size": 20, "intermediate_size": 33, "layers": LAYERS}
OPTIONS = {"model": MODEL, "steps": 1, "save_every": 1}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def run_tool(*words):
    return consolidate.main([str(word) for word in words])


def sharded(seed):
    """A model of `MODEL`, its blocks sharded over the processes."""
    torch.manual_seed(seed)
    model = MemLMForCausalLM(MemLMConfig(vocab_size=259, **MODEL))
    shard_by_blocks(model, model.model.layers)
    return model


def save(folder):
    folder.mkdir(exist_ok=True)
    write_parts(folder, {WEIGHTS: first_names(sharded(0))})


def read(checkpoint):
    """The weights of a checkpoint, by way of shards that held others."""
    model = sharded(1)
    read_weights(checkpoint, model)
    return whole_weights(model)


def test_parts_of_four_processes_in_two_in_one_and_in_a_model_folder(tmp_path):
    torch.manual_seed(0)
    config = MemLMConfig(vocab_size=259, **MODEL)
    model = MemLMForCausalLM(config)
    checkpoint = tmp_path / "checkpoint"
    for writer in (config, ByteTokenizer()):
        writer.save_pretrained(checkpoint)
    run_processes(4, save, checkpoint / PARTS_FOLDER)
    write_state(checkpoint, RunState(1, 4, 0, [], None, 1.0, {}))
    write_manifest(checkpoint)
    assert len([*(checkpoint / PARTS_FOLDER).glob("*.distcp")]) == 4
    for found in run_processes(2, read, checkpoint):
        assert_equal(found, model.state_dict())
    alone = MemLMForCausalLM(config)
    read_weights(checkpoint, alone)
    assert_equal(alone.state_dict(), model.state_dict())
    assert run_tool(checkpoint, tmp_path / "whole") == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert_equal(loaded.state_dict(), model.state_dict())


@pytest.mark.slow
def test_a_run_of_four_processes_in_two_in_one_and_in_a_model_folder(
    make_config, tmp_path, monkeypatch, capsys
):
    four, two, one = (make_config(name, **OPTIONS) for name in ("four", "two", "one"))
    train_in(4, Job(four, sharded=True))
    checkpoint, expected = checkpoint_path(four.output_dir, 1), final(four)
    assert len([*(checkpoint / "parts").glob("*.distcp")]) == 4
    # No step is left for them: they save what they have read.
    train_in(2, Job(two, checkpoint, sharded=True))
    assert_equal(final(two), expected)
    Trainer(one, resume=checkpoint).run()
    assert_equal(final(one), expected)

    whole = tmp_path / "whole"
    assert run_tool(checkpoint, whole) == 0
    assert (
        f"{whole}: {len(expected)} tensors of {checkpoint}, made whole" in capsys.readouterr().out
    )
    assert_equal(load_file(whole / "model.safetensors"), expected)
    # The same files as transformers writes.
    MemLMForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "again")
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names <= {path.name for path in whole.iterdir()}
    settings = [(folder / "config.json").read_text() for folder in (whole, tmp_path / "again")]
    assert settings[0] == settings[1]

    # In several files; of a run folder the newest checkpoint.
    monkeypatch.setattr(consolidate, "FILE_BYTES", 20_000)
    several = tmp_path / "several"
    assert run_tool(four.output_dir, several) == 0
    assert len([*several.glob("model-*.safetensors")]) > 2
    found = [
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (four.output_dir, several)
    ]
    assert_equal(found[1], found[0])

    # A part that is damaged is found first.
    part = checkpoint / "parts" / "__2_0.distcp"
    part.write_bytes(part.read_bytes()[:-1])
    assert run_tool(checkpoint, tmp_path / "damaged") == 2
    assert f"error: {part}: damaged" in capsys.readouterr().err
    assert not (tmp_path / "damaged").exists()


def test_weights_that_are_whole_are_copied(make_config, tmp_path, capsys):
    one = make_config("one", steps=1, save_every=1)
    Trainer(one).run()
    checkpoint, folder = checkpoint_path(one.output_dir, 1), tmp_path / "copy"
    assert run_tool(checkpoint, folder) == 0
    assert "whose weights were whole" in capsys.readouterr().out
    assert not [path for path in folder.iterdir() if "state" in path.name or "opt" in path.name]
    assert_equal(load_file(folder / "model.safetensors"), final(one))
    AutoModelForCausalLM.from_pretrained(folder)

    attached = make_config("attached", steps=1)
    layer = {"memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 8}, "layers": [1]}
    attached.model = {"pretrained": str(save_base(tmp_path / "base")), "attach": layer}
    Trainer(attached).run()
    folder = tmp_path / "memory"
    assert run_tool(attached.output_dir, folder) == 0
    saved = load_file(attached.output_dir / "memory.safetensors")
    assert_equal(load_file(folder / "memory.safetensors"), saved)


def test_what_cannot_be_consolidated(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for words, message in (
        ((tmp_path, tmp_path / "full"), f"{tmp_path / 'full'}: not an empty folder"),
        ((tmp_path, tmp_path / "full" / "file"), "not an empty folder"),
        ((tmp_path / "none", "."), ".: not an empty folder; name a new one"),
        ((tmp_path / "none", tmp_path / "new"), f"{tmp_path / 'none'}: no complete checkpoint"),
        ((tmp_path,), "the following arguments are required: FOLDER"),
    ):
        assert run_tool(*words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
