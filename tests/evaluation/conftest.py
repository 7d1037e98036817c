import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from memlm.data import ByteTokenizer
from memlm.layers.state import MemoryState
from memlm.models import MemLMConfig, MemLMForCausalLM


@dataclasses.dataclass
class Bytes(MemoryState):
    """The last bytes of every row, -1 = none yet."""

    values: Tensor

    def reset(self, rows: Tensor | None = None) -> "Bytes":
        if rows is None:
            return Bytes(torch.full_like(self.values, -1))
        return Bytes(self.values.masked_fill(rows[:, None], -1))


class Oracle(nn.Module):
    """A stand-in that keeps the digits of the last needle line as its memory.

    Its attention is the last bytes read; behind the question it continues with the digits of its
    memory, or with zeros when it has none. `wrong` makes it answer with other digits.
    """

    WIDTH = 40
    KEY = re.compile(rb"# The pass key is (\d{5})\.")
    QUESTION = re.compile(rb"# The pass key is (\d{0,4})$")

    def __init__(self, wrong: bool = False, limit: int | None = None):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=259)
        self.device = torch.device("cpu")
        self.max_context = limit
        self.wrong = wrong
        self.calls = 0
        self.longest_call = 0

    def memories(self):
        return {"layers.0.memory": SimpleNamespace(name="oracle")}

    def memory_state_names(self):
        return ["layers.0.memory"]

    def forward(
        self,
        input_ids,
        attention_mask=None,
        memory_states=None,
        use_memory=True,
        logits_to_keep=0,
        return_memory_states=False,
    ):
        rows, length = input_ids.shape
        self.calls += 1
        self.longest_call = max(self.longest_call, length)
        if memory_states is None:
            memory_states = {
                "tail": Bytes(torch.full((rows, self.WIDTH), -1)),
                "layers.0.memory": Bytes(torch.full((rows, 5), -1)),
            }
        tails = memory_states["tail"].values.clone()
        keys = memory_states["layers.0.memory"].values.clone()
        logits = torch.zeros(rows, length, self.config.vocab_size)
        for row in range(rows):
            valid = length if attention_mask is None else int(attention_mask[row].sum())
            known = [byte for byte in tails[row].tolist() if byte >= 0]
            seen = bytes(known + input_ids[row, :valid].tolist())
            if use_memory and (found := self.KEY.findall(seen)):
                keys[row] = torch.tensor(list(found[-1]))
            asked = self.QUESTION.search(seen)
            if asked and valid:
                place = len(asked.group(1))
                digit = int(keys[row, place]) if keys[row, place] >= 0 else ord("0")
                digit = ord("0") + (digit - ord("0") + self.wrong) % 10
                logits[row, valid - 1, digit] = 9.0
            tail = seen[-self.WIDTH :].rjust(self.WIDTH, b"\xff")
            tails[row] = torch.tensor([-1 if byte == 0xFF else byte for byte in tail])
        return SimpleNamespace(
            logits=logits[:, -logits_to_keep:],
            memory_states={"tail": Bytes(tails), "layers.0.memory": Bytes(keys)},
        )


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture
def make_oracle() -> type[Oracle]:
    return Oracle


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def text_file(tmp_path):
    """Plain words in lines, about 6000 bytes."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a quiet text without keys\n" for i in range(160)))
    return path


@pytest.fixture(scope="session")
def tiny_model():
    """A builder of untrained models with two layers of attention over 16 tokens."""

    def build(vocab_size: int = 259, max_position_embeddings: int | None = None, **sites):
        sliding = {"type": "sliding_attention", "window": 16, "num_heads": 2, "conv_size": 4}
        layer = {"repeat": 2, "mixer": sliding, "ffn": "swiglu"} | sites
        config = MemLMConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            layers=[layer],
            max_position_embeddings=max_position_embeddings,
            initializer_range=0.3,
        )
        return MemLMForCausalLM(config).eval()

    return build


@pytest.fixture
def gated_delta(tiny_model):
    return tiny_model(memory="gated_delta")
