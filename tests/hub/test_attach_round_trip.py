"""A model goes to the Hub, a memory for it too, and both come back together bit for bit."""

import json
from pathlib import Path

from tests.hub.server import HubServer
from tests.hub.test_round_trip import run_with

PUSH = """
import sys
import torch
import memlm
from transformers import AutoModelForCausalLM, LlamaConfig

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
)
AutoModelForCausalLM.from_config(config).push_to_hub("someone/base")
model = AutoModelForCausalLM.from_pretrained("someone/base")
memory = {"type": "knn_cache", "segment": 4, "capacity": 16, "top_k": 3}
memlm.attach_memory(model, {"memory": memory})
with torch.no_grad():
    for parameter in model.memory.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
model.push_to_hub("someone/memory")
torch.save(model(torch.arange(1, 21)[None]).logits, sys.argv[1])
"""

PULL = """
import json, sys
import torch
import memlm
from memlm.errors import UserError
from transformers import AutoModelForCausalLM

ids = torch.arange(1, 21)[None]
model = memlm.load_attached("someone/memory")
same = torch.equal(model(ids).logits, torch.load(sys.argv[1]))
tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
base = AutoModelForCausalLM.from_pretrained("someone/base")
again = memlm.load_memory(base, "someone/memory", revision="main")
equal = torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False), tokens)
refused = []
for source in ("someone/absent", "someone/base"):
    try:
        memlm.load_attached(source)
    except UserError as error:
        refused.append(str(error))
layers = list(model.memory.layers)
print(json.dumps({"same": same, "equal": equal, "layers": layers, "refused": refused}))
"""


def test_a_memory_comes_back_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    logits = tmp_path / "logits.pt"
    run_with(hub, tmp_path / "pusher", PUSH, logits)
    pulled = json.loads(run_with(hub, tmp_path / "puller", PULL, logits))
    assert pulled["same"] and pulled["equal"]
    assert pulled["layers"] == ["3"]
    assert "no such memory was found on the Hub" in pulled["refused"][0]
    assert "no attached memory there (it has no memory_config.json)" in pulled["refused"][1]
