"""A model of another library is read from the Hub: its shapes alone, then as a model of memlm."""

import hashlib
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.hub.server import HubServer, Repository
from tests.hub.test_round_trip import run_with

CONVERT = """
import json, sys
from pathlib import Path
import torch
from memlm import MemLMForCausalLM
from memlm.models.convert import main

def cached():
    return [path.name for path in Path(sys.argv[1]).rglob("*.safetensors")]

target = sys.argv[2]
codes = [main(["someone/llama", target, "--dry_run", "--revision", sys.argv[3]])]
before = cached()
model = MemLMForCausalLM.from_pretrained("someone/llama", revision=sys.argv[3])
codes.append(main(["someone/llama", target, "--revision", sys.argv[3]]))
same = MemLMForCausalLM.from_pretrained(target)
ids = torch.arange(9)[None]
equal = torch.equal(model(ids).logits, same(ids).logits)
codes.append(main(["someone/absent", target + "-2"]))
files = sorted(path.name for path in Path(target).iterdir())
print(json.dumps({"codes": codes, "before": before, "after": len(cached()), "equal": equal,
                  "files": files, "logits": model(ids).logits.tolist()}))
"""


def test_a_model_of_another_library_comes_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    llama = LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path / "llama", max_shard_size="4KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "llama").iterdir()}
    repository = Repository()
    revision = repository.commit(files | {"tokenizer.json": b"{}"})
    repository.commit({"README.md": b"emptied since"})
    hub.repositories["models", "someone/llama"] = repository
    weights = [content for name, content in files.items() if name.endswith(".safetensors")]
    hub.objects |= {hashlib.sha256(content).hexdigest(): content for content in weights}

    home = tmp_path / "home"
    arguments = (home, tmp_path / "ours", revision)
    found = json.loads(run_with(hub, home, CONVERT, *arguments).splitlines()[-1])
    assert found["codes"] == [0, 0, 2]
    assert found["before"] == []  # a dry run reads the heads of the files
    assert found["after"] == len(weights) > 2
    assert found["equal"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["files"])
    expected = llama(torch.arange(9)[None]).logits
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=1e-5, rtol=1e-5)
