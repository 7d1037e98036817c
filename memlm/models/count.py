"""What a model costs, without building it: `python -m memlm.models.count CONFIG [--preset NAME]`.

The model is made on the meta device, so a config of any size takes a second and no memory.
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from memlm.cli import Parser, run_entry_point
from memlm.errors import UserError
from memlm.layers.attention import Attention
from memlm.layers.moe import MixtureOfExperts
from memlm.memory.value_table import ValueTable
from memlm.models.configuration import MemLMConfig
from memlm.models.insert_config import InsertConfig
from memlm.models.modeling import MemLMForCausalLM
from memlm.models.retrofit import INSERT, retrofit_config


@dataclasses.dataclass(frozen=True)
class ModelCount:
    """Parameters, work and state of a model.

    Attributes:
        parameters: all of them, tied ones once.
        embedding: of the embedding, and of the head where it is not tied.
        memory: of the memories, shared modules and value tables included.
        value_tables: of the value tables of product-key memories, of which a token reads a few
            rows; models are matched in what is left without them.
        idle: of the experts of `moe` that a token does not use.
        length: tokens per row for the numbers below.
        flops_per_token: floating point operations of a forward pass over a row of `length`
            tokens, head included, per token. Training takes about three times as many.
        memory_state_bytes: state of the memories of one row, whatever its length.
        attention_state_bytes: keys and values that attention keeps of one row of `length` tokens.
    """

    parameters: int
    embedding: int
    memory: int
    value_tables: int
    idle: int
    length: int
    flops_per_token: int
    memory_state_bytes: int
    attention_state_bytes: int

    @property
    def matched(self) -> int:
        """Parameters without the value tables."""
        return self.parameters - self.value_tables

    @property
    def active(self) -> int:
        """Parameters without the experts that a token does not use."""
        return self.parameters - self.idle


def count(config: MemLMConfig, length: int) -> ModelCount:
    """Count a model with float32 weights and states, for rows of `length` tokens."""
    with torch.device("meta"):
        model = MemLMForCausalLM(config)
        states = model.init_states(1)
    decoder = model.model
    memories = [*decoder.memories().values(), decoder.shared]
    tables = [module for module in model.modules() if isinstance(module, ValueTable)]
    return ModelCount(
        parameters=_size(model.parameters()),
        embedding=_size([*decoder.embed_tokens.parameters(), *model.lm_head.parameters()]),
        memory=_size(p for memory in memories for p in memory.parameters()),
        value_tables=_size(p for table in tables for p in table.parameters()),
        idle=sum(m.idle_parameters for m in model.modules() if isinstance(m, MixtureOfExperts)),
        length=length,
        flops_per_token=round(model.flops(length) / length),
        memory_state_bytes=sum(states[name].nbytes for name in model.memory_state_names()),
        attention_state_bytes=sum(_attention_bytes(m, length) for m in model.modules()),
    )


def _size(parameters: Iterable[Tensor]) -> int:
    """Numbers in distinct parameters: tied and shared ones count once."""
    return sum({id(parameter): parameter.numel() for parameter in parameters}.values())


def _attention_bytes(module: nn.Module, length: int) -> int:
    if not isinstance(module, Attention):
        return 0
    tokens = min(module.window or length, length)
    per_token = 2 * module.num_key_value_heads * module.head_dim
    return tokens * per_token * module.k_proj.weight.element_size()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the count of a run config; returns the exit code (2 for a mistake of the user)."""
    return run_entry_point(lambda: _print_count(argv))


def _print_count(argv: Sequence[str] | None) -> None:
    from memlm.config import load_config
    from memlm.data import load_tokenizer

    parser = Parser(
        prog="python -m memlm.models.count",
        description="Parameters, FLOPs per token and state bytes of a model.",
        epilog="Any key of the config can be given, as in --model.hidden_size 512.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="the YAML file of a run")
    parser.add_argument("--preset", metavar="NAME", help="an entry of the file's presets")
    options, overrides = parser.parse_known_args(argv)
    run = load_config(options.config, overrides, options.preset)
    sizes = run.model
    if "attach" in sizes:
        raise UserError(
            f"{options.config}: only whole models are counted, not a memory for a pretrained one"
        )
    if "pretrained" in sizes:
        inserted = sizes.get("insert")
        memories = None if inserted is None else InsertConfig.from_mapping(inserted, INSERT)
        config = retrofit_config(sizes["pretrained"], memories)
    else:
        if "vocab_size" not in sizes:
            sizes = {"vocab_size": len(load_tokenizer(run.data.tokenizer))} | sizes
        config = MemLMConfig.from_mapping(sizes)
    result = count(config, run.train.stages()[-1].length)
    for label, value in _lines(result):
        print(f"{label:<42}{value:>18,}")


def _lines(result: ModelCount) -> list[tuple[str, int]]:
    lines = [
        ("parameters", result.parameters),
        ("  embedding and head", result.embedding),
        ("  memories", result.memory),
    ]
    if result.value_tables:
        lines += [
            ("    of these in value tables", result.value_tables),
            ("  outside the value tables", result.matched),
        ]
    if result.idle:
        lines.append(("  that a token uses", result.active))
    return [
        *lines,
        (f"FLOPs per token, forward, {result.length} tokens", result.flops_per_token),
        ("state bytes per sequence, memories", result.memory_state_bytes),
        (f"state bytes, attention, {result.length} tokens", result.attention_state_bytes),
    ]


if __name__ == "__main__":
    sys.exit(main())
