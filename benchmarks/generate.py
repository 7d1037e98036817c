"""Tokens per second of generation, next to transformers' Llama and Qwen3-Next.

python -m benchmarks.generate --device cpu

Models of equal size decode greedily through their own `generate()`, each after the same text of
1k and of 32k tokens, which its cache holds already: what is timed is the tokens behind the first
new one, so neither the text nor what `generate()` prepares is in it. Qwen3-Next runs in its plain
torch path, as it does without a GPU, in its pattern of three gated delta layers and one with
attention: its cache refuses models without attention. All models have the same width, depth,
vocabulary and feed-forward form, whose width is chosen so that the parameters are equal in number;
the value table of product keys, of which a token reads a few rows, is left out of that count.

The models take turns, on one thread. A ratio is the median over the turns of how many times as many
tokens per second ours gives; with other work on the machine the one of processor time is steadier.
"""

import argparse
import contextlib
import copy
import dataclasses
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.generation import BaseStreamer
from transformers.models.qwen3_next import modeling_qwen3_next

from benchmarks import report
from benchmarks.library import one_thread, positive
from memlm.models import MemLMCache, MemLMConfig, MemLMForCausalLM
from memlm.models.count import count

NEEDED = 1.0  # of the peer's tokens per second
LARGEST_CHANGE = 1.1  # of the time of a token, from the short to the long context
LARGEST_DIFFERENCE = 0.02  # of the parameters
CONTEXTS = (1024, 32768)
PREFILL_PIECE = 4096  # tokens of a call
PEERS = ("llama", "qwen3-next")
GATED_DELTA = {"type": "gated_delta", "num_heads": 4, "head_dim": 48}
SLIDING = {"type": "sliding_attention", "num_heads": 4, "window": 256}
ATTENTION = {"type": "attention", "num_heads": 4}
TITANS = {"type": "titans", "depth": 1, "num_heads": 4, "head_dim": 64}  # as configs/titans.yaml
# Layers of each of ours: what stands where; whether a token costs the same after any text.
OURS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "attention": ([{"mixer": ATTENTION, "ffn": "swiglu"}], False),
    "gated_delta": ([{"mixer": GATED_DELTA, "ffn": "swiglu"}], True),
    "gated_delta 3:1": (
        [
            {"repeat": 3, "mixer": GATED_DELTA, "ffn": "swiglu"},
            {"mixer": ATTENTION, "ffn": "swiglu"},
        ],
        False,
    ),
    "sliding + gated_delta": (
        [{"mixer": GATED_DELTA, "ffn": "swiglu"}, {"mixer": SLIDING, "ffn": "swiglu"}],
        True,
    ),
    "titans": ([{"mixer": TITANS, "ffn": "swiglu"}], True),
    "titans, depth 2": ([{"mixer": {**TITANS, "depth": 2}, "ffn": "swiglu"}], True),
    "product_key": (
        [
            {"mixer": ATTENTION, "ffn": "swiglu"},
            {"mixer": ATTENTION, "ffn": {"type": "product_key", "num_keys": 128}},
        ],
        False,
    ),
    "knn_cache": (
        [
            {"mixer": SLIDING, "ffn": "swiglu"},
            {"mixer": SLIDING, "memory": {"type": "knn_cache"}, "ffn": "swiglu"},
        ],
        False,  # its search grows until the store is full
    ),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of all models; `intermediate_size` is the Llama's."""

    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 768
    vocabulary: int = 1024
    longest: int = 65536

    @property
    def shared(self) -> dict[str, Any]:
        """What configs call by the same name."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden_size,
            "max_position_embeddings": self.longest,
            "tie_word_embeddings": True,
        }


def llama(size: Size, intermediate_size: int) -> PreTrainedModel:
    """Attention in every layer, through sdpa."""
    config = LlamaConfig(
        **size.shared,
        intermediate_size=intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def qwen3_next(size: Size, intermediate_size: int) -> PreTrainedModel:
    """Gated delta layers as ours, and attention in every fourth."""
    head_dim = GATED_DELTA["head_dim"]
    config = Qwen3NextConfig(
        **size.shared,
        intermediate_size=intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.hidden_size // size.heads,
        linear_num_key_heads=GATED_DELTA["num_heads"],
        linear_num_value_heads=GATED_DELTA["num_heads"],
        linear_key_head_dim=head_dim,
        linear_value_head_dim=2 * head_dim,
        mlp_only_layers=list(range(size.layers)),
        num_experts=0,
        attn_implementation="sdpa",
    )
    return Qwen3NextForCausalLM(config)


def memlm(size: Size, intermediate_size: int, name: str) -> PreTrainedModel:
    """One of OURS."""
    layers = OURS[name][0]
    times = size.layers // sum(layer.get("repeat", 1) for layer in layers)
    config = MemLMConfig(**size.shared, intermediate_size=intermediate_size, layers=layers * times)
    return MemLMForCausalLM(config)


def makers(size: Size) -> dict[str, Callable[[int], PreTrainedModel]]:
    """All models by name, from the width of their feed-forward layers."""
    made: dict[str, Callable[[int], PreTrainedModel]] = {
        "llama": lambda width: llama(size, width),
        "qwen3-next": lambda width: qwen3_next(size, width),
    }
    for name in OURS:
        made[name] = lambda width, name=name: memlm(size, width, name)
    return made


def matched(make: Callable[[int], PreTrainedModel], parameters: int) -> PreTrainedModel:
    """The model whose feed-forward layers, a multiple of 8 wide, bring it next to `parameters`.

    Raises:
        ValueError: where the nearest differs by more than LARGEST_DIFFERENCE.
    """
    with torch.device("meta"):
        narrow, wide = (counted(make(width)) for width in (64, 72))
    steps = max(1, 8 + round((parameters - narrow) / (wide - narrow)))
    torch.manual_seed(0)
    model = make(8 * steps).eval()
    if abs(counted(model) / parameters - 1) > LARGEST_DIFFERENCE:
        raise ValueError(f"{counted(model)} parameters, but {parameters} are wanted")
    return model


def counted(model: PreTrainedModel) -> int:
    """Parameters, value tables left out."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if not isinstance(model, MemLMForCausalLM):
        return total
    return total - count(model.config, 1).value_tables


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Qwen3-Next's own torch functions in here: decorators hand calls to installed libraries."""
    names = [name for name in vars(modeling_qwen3_next) if name.startswith("torch_")]
    names += [name for name in vars(modeling_qwen3_next) if name.startswith("causal_conv1d")]
    with contextlib.ExitStack() as stack:
        for name in names:
            function = inspect.unwrap(getattr(modeling_qwen3_next, name))
            stack.enter_context(mock.patch.object(modeling_qwen3_next, name, function))
        yield


class Clock(BaseStreamer):
    """Notes when each token comes: the prompt, then one by one."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def put(self, value: Tensor) -> None:
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())

    def end(self) -> None:
        pass

    def seconds(self) -> tuple[float, float]:
        """Per token behind the first new one: of the wall clock, and of the processor."""
        count = len(self.wall) - 2
        return tuple((times[-1] - times[1]) / count for times in (self.wall, self.processor))


class Decoder:
    """A model and its cache behind a text.

    Args:
        model: what decodes.
        text: int64 [B, T]; the cache holds all of it but the last token.
    """

    def __init__(self, model: PreTrainedModel, text: Tensor):
        self.model, self.text = model, text
        self.cache = self._prefilled(text[:, :-1])
        self.wall: list[float] = []
        self.processor: list[float] = []

    @torch.no_grad()
    def _prefilled(self, text: Tensor) -> Cache:
        cache = None
        for piece in text.split(PREFILL_PIECE, 1):
            cache = self.model(
                piece, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).past_key_values
        return cache

    def decode(self, tokens: int) -> Tensor:
        """Generate from a copy of the cache and note the time; int64 [B, tokens]."""
        clock = Clock()
        config = GenerationConfig(
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            eos_token_id=0,
            pad_token_id=0,
        )
        cache = copy.deepcopy(self.cache)
        found = self.model.generate(
            self.text, generation_config=config, past_key_values=cache, streamer=clock
        )
        wall, processor = clock.seconds()
        self.wall.append(wall)
        self.processor.append(processor)
        return found[:, self.text.shape[1] :]

    def state_bytes(self) -> int:
        """What the cache holds of a row."""
        rows = self.text.shape[0]
        if isinstance(self.cache, MemLMCache):
            return self.cache.nbytes // rows
        tensors: dict[int, Tensor] = {}
        for layer in self.cache.layers:
            for value in vars(layer).values():
                values = value.values() if isinstance(value, dict) else (value,)
                tensors |= {id(x): x for x in values if isinstance(x, Tensor)}
        return sum(tensor.nbytes for tensor in tensors.values()) // rows


def measure(
    size: Size,
    contexts: Sequence[int],
    rows: int,
    tokens: int,
    rounds: int,
    chosen: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Decode with the chosen models in turns, after texts of all lengths.

    Returns:
        By model: `parameters`, `value_tables`, and by context `seconds` and `processor_seconds` of
        a token in each round, and `state_bytes` of a row.
    """
    made = makers(size)
    with torch.device("meta"):
        parameters = counted(made["llama"](size.intermediate_size))
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, size.vocabulary, (rows, max(contexts)), generator=generator)
    decoders: dict[str, dict[int, Decoder]] = {}
    with one_thread(), plain_torch():
        for name in chosen:
            start = time.perf_counter()
            model = matched(made[name], parameters)
            decoders[name] = {length: Decoder(model, text[:, :length]) for length in contexts}
            _progress(f"{name}: texts read in {time.perf_counter() - start:.1f} s")
        for number in range(rounds + 1):
            for length in contexts:
                for name in chosen if number % 2 else reversed(chosen):
                    decoders[name][length].decode(tokens if number else 4)
            _progress(f"round {number} of {rounds}" if number else "warmed up")
    return {name: _found(own) for name, own in decoders.items()}


def _found(decoders: dict[int, Decoder]) -> dict[str, Any]:
    model = next(iter(decoders.values())).model
    ours = isinstance(model, MemLMForCausalLM)
    return {
        "parameters": counted(model),
        "value_tables": count(model.config, 1).value_tables if ours else 0,
        "contexts": {
            length: {
                "seconds": decoder.wall[1:],
                "processor_seconds": decoder.processor[1:],
                "state_bytes": decoder.state_bytes(),
            }
            for length, decoder in decoders.items()
        },
    }


def _progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def compare(measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was measured, and for each of ours per context its `ratios` to the peers in the run, in
    time and in processor time; for what carries a constant state also `change`, the time of a token
    in the longest context over that in the shortest."""
    results = copy.deepcopy(measured)
    for name, entry in results.items():
        for length, own in entry["contexts"].items():
            own["tokens_per_second"] = 1 / statistics.median(own["seconds"])
            if name in PEERS:
                continue
            own["ratios"] = {
                peer: {
                    field: median_ratio(measured[peer]["contexts"][length][field], own[field])
                    for field in ("seconds", "processor_seconds")
                }
                for peer in PEERS
                if peer in measured
            }
        if name in OURS and OURS[name][1]:
            shortest, *_, longest = (entry["contexts"][n] for n in sorted(entry["contexts"]))
            entry["change"] = {
                field: median_ratio(longest[field], shortest[field])
                for field in ("seconds", "processor_seconds")
            }
    return results


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def below(results: dict[str, dict[str, Any]]) -> list[str]:
    """What misses the bar, one line each."""
    missed = []
    for name, entry in results.items():
        for length, own in entry["contexts"].items():
            for peer, ratios in own.get("ratios", {}).items():
                if ratios["seconds"] < NEEDED:
                    missed.append(f"{name} after {length}: {ratios['seconds']:.2f} of {peer}")
        change = entry.get("change", {}).get("seconds", 0)
        if change > LARGEST_CHANGE:
            missed.append(f"{name}: a token takes {change:.2f} times as long in the long context")
    return missed


def tables(results: dict[str, dict[str, Any]]) -> str:
    """One table per context, for a reader."""
    peers = [name for name in PEERS if name in results]
    names = {"llama": "Llama", "qwen3-next": "Qwen3-Next"}
    header = ["model", "parameters", "tokens/s", "state of a row"]
    header += [f"x {names[peer]}{kind}" for peer in peers for kind in ("", " (CPU time)")]
    texts = []
    for length in next(iter(results.values()))["contexts"]:
        rows = []
        for name, entry in results.items():
            own = entry["contexts"][length]
            row = [name, entry["parameters"], own["tokens_per_second"], own["state_bytes"]]
            for peer in peers:
                ratios = own.get("ratios", {}).get(peer, {})
                row += [ratios.get(field) for field in ("seconds", "processor_seconds")]
            rows.append(row)
        texts.append(f"After {length} tokens\n{report.table(header, rows)}")
    rows = [(name, *e["change"].values()) for name, e in results.items() if "change" in e]
    if rows:
        header = ("time of a token, long / short", "ratio", "in CPU time")
        texts.append(report.table(header, rows))
    return "\n\n".join(texts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the tables; 1 where one of ours misses the bar."""
    parser = argparse.ArgumentParser(prog="benchmarks.generate")
    parser.add_argument("--device", choices=("cpu",), required=True)
    parser.add_argument("--models", nargs="+", choices=list(makers(Size())), help="default: all")
    parser.add_argument("--contexts", nargs=2, type=positive, default=CONTEXTS)
    parser.add_argument("--rows", type=positive, default=1, help="decoded at once")
    parser.add_argument("--tokens", type=positive, default=48, help="of a turn")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--output", type=report.Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    if options.tokens < 3:
        parser.error("--tokens: at least 3")
    contexts = sorted(options.contexts)
    size = Size(longest=2 * max(contexts))
    chosen = options.models or list(makers(size))
    start = time.perf_counter()
    results = compare(measure(size, contexts, options.rows, options.tokens, options.rounds, chosen))
    missed = below(results)
    print(tables(results))
    print("\n".join(f"below the bar: {line}" for line in missed) or "\nnothing below the bar")
    found = {
        "machine": {**report.machine(), "threads": 1},
        "size": size,
        "rows": options.rows,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "needed": NEEDED,
        "largest_change": LARGEST_CHANGE,
        "seconds": time.perf_counter() - start,
        "missed": missed,
        "models": results,
    }
    print(report.save_json(found, options.output / report.machine_name() / "generate.json"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
