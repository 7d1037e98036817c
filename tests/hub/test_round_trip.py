"""A checkpoint goes to the Hub and comes back bit for bit; a data set streams from it.

What is sent, and the data set, have a process and an HF_HOME of their own, so nothing comes from a
cache; test_fresh_process.py has what is fetched.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from memlm import MemLMForCausalLM
from tests.hub.conftest import Client
from tests.hub.server import HubServer

PUSH = """
import sys
import torch
import memlm
from memlm.data import load_tokenizer

torch.manual_seed(0)
layers = [
    {"mixer": {"type": "sliding_attention", "window": 8}, "memory": "gated_delta", "ffn": "swiglu"},
    {"mixer": "attention", "ffn": "swiglu"},
]
config = memlm.MemLMConfig(hidden_size=32, layers=layers, max_position_embeddings=64)
model = memlm.MemLMForCausalLM(config)
# Off the initial values, so that weights which are initialised anew on loading differ.
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
model.push_to_hub("someone/tiny")
load_tokenizer("bytes").push_to_hub("someone/tiny")
model.save_pretrained(sys.argv[1])
"""

STREAM = """
import json
from huggingface_hub import create_repo, upload_file
from memlm.data.config import HubSource
from memlm.data.hub import hub_documents
from memlm.errors import UserError

create_repo("someone/text", repo_type="dataset")
rows = "".join(json.dumps({"text": f"document {number}"}) + "\\n" for number in range(3))
upload_file(
    path_or_fileobj=rows.encode(),
    path_in_repo="data/train.jsonl",
    repo_id="someone/text",
    repo_type="dataset",
)
documents = list(hub_documents(HubSource("someone/text"), seed=0))
try:
    list(hub_documents(HubSource("someone/absent"), seed=0))
except UserError as error:
    missing = str(error)
print(json.dumps({"documents": documents, "missing": missing}))
"""


def run_with(hub: HubServer, home: Path, script: str, *arguments: Path) -> str:
    """Standard output of a fresh Python that knows no Hub but `hub`."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_any",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_a_checkpoint_comes_back_bit_for_bit(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    run_with(hub, tmp_path / "pusher", PUSH, tmp_path / "pushed")
    model = AutoModelForCausalLM.from_pretrained("someone/tiny")
    tokenizer = AutoTokenizer.from_pretrained("someone/tiny")
    assert isinstance(model, MemLMForCausalLM)
    stored = load_file(tmp_path / "pushed" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            assert torch.equal(tensor, stored[name]), name
    ids = tokenizer("Hub", return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist()
    assert len(tokens) == len("Hub") + 4 and tokens[:3] == list(b"Hub")
    assert hub.asked("GET", "resolve", "config.json") and hub.asked("GET /objects/")


def test_a_data_set_streams_and_a_missing_one_is_named(hub: HubServer, tmp_path: Path) -> None:
    result = json.loads(run_with(hub, tmp_path / "home", STREAM))

    assert result["documents"] == ["document 0", "document 1", "document 2"]
    assert "someone/absent" in result["missing"]
