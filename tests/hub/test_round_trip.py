"""A checkpoint goes to the Hub and comes back bit for bit.

What is sent has a process and an HF_HOME of its own, so nothing comes from a cache;
test_fresh_process.py has what is fetched, test_stream_log.py the data sets.
"""

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
