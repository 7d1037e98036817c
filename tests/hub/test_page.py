"""The code of docs/checkpoints.md on the Hub, as it stands there."""

import re
from pathlib import Path

from huggingface_hub import HfApi

from memlm import MemLMForCausalLM
from memlm.data import load_tokenizer
from tests.hub.conftest import Client
from tests.hub.server import HubServer
from tests.hub.test_pull import tiny

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_the_code_of_the_page(
    client: Client, hub: HubServer, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained("runs/NAME")
    load_tokenizer("bytes").save_pretrained("runs/NAME")
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page.split("## Models of others")[0], re.DOTALL)
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE}, block {number}", "exec"), names)
        if number == 0:
            HfApi(endpoint=hub.url).create_tag("ORG/NAME", tag="v1")
    assert len(blocks) == 4
    assert hub.repositories["models", "ORG/NAME"].private
    assert isinstance(names["model"], MemLMForCausalLM)
    assert capsys.readouterr().out.count("generated_text") == 2
