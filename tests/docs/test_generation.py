"""docs/generation.md: its code runs as it stands there."""

import re
from pathlib import Path

import torch

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.data.tokenizers import ByteTokenizer

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "generation.md"


def test_the_code_of_the_document_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    layers = [
        {
            "mixer": {"type": "sliding_attention", "window": 8, "num_heads": 2},
            "memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 8},
            "ffn": "swiglu",
        }
    ]
    config = MemLMConfig(vocab_size=259, hidden_size=32, intermediate_size=48, layers=layers)
    model = MemLMForCausalLM(config).eval()
    model.save_pretrained("runs/demo")
    ByteTokenizer().save_pretrained("runs/demo")
    text = DOCUMENT.read_text(encoding="utf-8").split("## Chat")[0]
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec("\n".join(code), names)
    # The conversation in the document, which a file interrupts, is the one that is not.
    history = torch.cat([names["second"].sequences, names["question"]], 1)
    whole = model.generate(history, max_new_tokens=20, do_sample=False)
    assert torch.equal(names["third"][:, -20:], whole[:, -20:])
    assert torch.equal(*names["branches"])
    assert Path("row.safetensors").is_file()
