"""What another process makes of the files on the Hub: one that knows nothing but their names.

It starts without memlm and loads through the module beside the weights; then it loads a model with
every memory, and its whole state is compared: weights and buffers, saved or not.
"""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from sentencepiece import SentencePieceTrainer
from torch import nn

import memlm
from memlm import MemLMConfig, MemLMForCausalLM
from memlm.data import load_tokenizer
from memlm.fingerprint import fingerprint
from memlm.memory import memory_names
from memlm.memory.output_memory import output_memory_names
from tests.hub.conftest import Client
from tests.hub.server import HubServer
from tests.hub.test_round_trip import run_with
from tests.memory.contract import cases
from tests.memory.test_knn_lm import CASE as KNN_LM
from tests.models.attach_tools import base_model, trained

# One of each memory, and one with statistics in buffers; a law has every spec in one process.
FIRST = {case.memory: case for case in reversed([*cases(), KNN_LM])}
PLAIN = next(case for case in cases() if case.spec.label == "plain")
FIRST_SITES = {str(case): case for case in [*FIRST.values(), PLAIN]}
LAYERS = {
    "attention": {"mixer": "attention", "ffn": "swiglu"},
    "sliding_attention": {"mixer": {"type": "sliding_attention", "window": 5}, "ffn": "moe"},
}
ATTACHED = ("gated_delta", "knn_cache", "titans")
NAMES = [*FIRST_SITES, *LAYERS, *(f"attached-{name}" for name in ATTACHED)]

FRESH = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

found = {"memlm first": "memlm" in sys.modules}
try:
    AutoConfig.from_pretrained("someone/bytes")
except ValueError as error:
    found["refused"] = str(error)
trusted = {"trust_remote_code": True}
for name in ("bytes", "pieces"):
    tokenizer = AutoTokenizer.from_pretrained(f"someone/{name}", **trusted)
    config = AutoConfig.from_pretrained(f"someone/{name}", **trusted)
    model = AutoModelForCausalLM.from_pretrained(f"someone/{name}", **trusted)
    text = tokenizer.decode(tokenizer("hello world").input_ids, skip_special_tokens=True)
    found[name] = [type(part).__module__ for part in (tokenizer, config, model)] + [text]
pipe = pipeline("text-generation", model="someone/bytes")
words = {"batch_size": 2, "max_new_tokens": 3, "do_sample": False, "return_full_text": False}
found["pipeline"] = [answer[0]["generated_text"] for answer in pipe(["hello", "hi"], **words)]
ids = pipe.tokenizer("hi", return_tensors="pt").input_ids
new = pipe.model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1]:]
found["generated"] = pipe.tokenizer.decode(new, skip_special_tokens=True)

import memlm
from memlm.fingerprint import fingerprint

def described(model):
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    return {name: fingerprint({name: tensor}) for name, tensor in tensors.items()}

found["states"] = {}
for name in json.loads(sys.argv[1]):
    if name.startswith("attached-"):
        model = memlm.load_attached(f"someone/{name}")
    else:
        model = AutoModelForCausalLM.from_pretrained("someone/every", subfolder=name)
    found["states"][name] = described(model)
print(f"\\n{json.dumps(found)}")
"""


def described(model: nn.Module) -> dict[str, str]:
    """A number for every weight and every buffer, saved or not."""
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    return {name: fingerprint({name: tensor}) for name, tensor in tensors.items()}


def changed(model: nn.Module) -> nn.Module:
    """The model with nothing saved at its start value."""
    torch.manual_seed(5)
    saved = model.state_dict().keys()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in saved and tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    return model


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in LAYERS:
        config = MemLMConfig(hidden_size=32, layers=[LAYERS[name]], tie_word_embeddings=False)
        return changed(MemLMForCausalLM(config))
    return changed(FIRST_SITES[name].build(torch.float32))


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, str]]:
    """What was pushed; filled by `found`."""
    return {}


@pytest.fixture(scope="module")
def found(hub: HubServer, states, tmp_path_factory) -> dict:
    """What the other process says."""
    folder = tmp_path_factory.mktemp("fresh")
    with pytest.MonkeyPatch.context() as monkeypatch:
        client = Client(hub, folder / "cache", monkeypatch)
        _push_all(folder, states)
        client.log_in(None)
    output = run_with(hub, folder / "home", FRESH, json.dumps(NAMES))
    return json.loads(output.splitlines()[-1])


def _push_all(folder: Path, states: dict[str, dict[str, str]]) -> None:
    for name in [*FIRST_SITES, *LAYERS]:
        model = build(name)
        states[name] = described(model)
        model.save_pretrained(folder / "every" / name)
    api = HfApi()
    api.create_repo("someone/every")
    api.upload_folder(repo_id="someone/every", folder_path=folder / "every")
    base_model("llama").push_to_hub("someone/base")
    for name in ATTACHED:
        model = type(base_model("llama")).from_pretrained("someone/base")
        trained(memlm.attach_memory(model, {"memory": name}))
        model.push_to_hub(f"someone/attached-{name}")
        states[f"attached-{name}"] = described(model)
    text = "\n".join(f"hello world number {number} of the text" for number in range(300))
    (folder / "text.txt").write_text(text)
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "pieces"),
        vocab_size=60,
        minloglevel=2,
    )
    for name, spec in (("bytes", "bytes"), ("pieces", str(folder / "pieces.model"))):
        tokenizer = load_tokenizer(spec)
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        layers = [{"mixer": "min_gru", "ffn": "swiglu"}]
        MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=layers, **ends)).push_to_hub(
            f"someone/{name}"
        )
        tokenizer.push_to_hub(f"someone/{name}")


def test_every_memory_is_there() -> None:
    named = {case.memory for case in FIRST_SITES.values()}
    assert named >= {*memory_names(), *output_memory_names()}


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_state_comes_back_bit_for_bit(name: str, found, states) -> None:
    assert found["states"][name] == states[name]


def test_without_memlm_the_module_beside_the_weights_is_asked_for(found) -> None:
    assert not found["memlm first"]
    assert "Please pass the argument `trust_remote_code=True`" in found["refused"]


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_with_trust_it_loads_the_installed_package(name: str, found) -> None:
    *modules, text = found[name]
    assert modules == [
        "memlm.data.tokenizers",
        "memlm.models.configuration",
        "memlm.models.modeling",
    ]
    assert text == "hello world"


def test_a_pipeline_generates_in_batches(found) -> None:
    assert len(found["pipeline"]) == 2 and found["pipeline"][1] == found["generated"]
