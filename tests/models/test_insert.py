"""Memories are put into the blocks of a model that is there already."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoHybridConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from memlm import MemLMConfig, MemLMForCausalLM, UserError, insert_memory
from memlm.memory import memory_class, memory_names
from memlm.memory.base import AttendingMemory
from memlm.models.insert import freeze_base
from memlm.models.insert_config import InsertConfig
from tests.memory.contract import GATED_DELTA, KNN_CACHE, PRODUCT_KEY, SPECS
from tests.memory.law_tools import assert_close, build_model, run
from tests.models.attach_tools import GROUPED
from tests.models.interop.hybrid_tools import EXPERTS, QWEN_HEADS, SIZES, WIDTH, randomized

FULL = {"type": "attention", "num_heads": 4, "num_key_value_heads": 2, "qk_norm": True}
SLIDING = {"type": "sliding_attention", "window": 6, "num_heads": 2, "conv_size": 3}
LAYERS = [
    {"repeat": 2, "mixer": FULL, "ffn": "swiglu"},
    {"mixer": {"type": "gated_delta", **GATED_DELTA}, "ffn": "swiglu", "norm": "sandwich"},
    {"mixer": SLIDING, "ffn": None},
]
DELTA = {"type": "gated_delta", **GATED_DELTA}
IDS = torch.arange(1, 43).view(2, 21) % 39 + 1


def base_model(layers=LAYERS, dtype=torch.float32) -> MemLMForCausalLM:
    """Attention of both kinds and a memory as a mixer, with weights that are no start values."""
    return build_model(copy.deepcopy(layers), dtype)


def trained(model: MemLMForCausalLM) -> MemLMForCausalLM:
    """The memories at the memory site as after some training: no weight at its start value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for block in model.model.layers:
            if block.memory is not None:
                for parameter in block.memory.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
                block.memory.gate.uniform_(0.5, 1.5)
    return model


def check_saved(model: MemLMForCausalLM, folder: Path) -> None:
    """The saved model is the same: its weights in every bit and in their order."""
    model.save_pretrained(folder)
    again = MemLMForCausalLM.from_pretrained(folder)
    # A resumed run adds up norms in this order.
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    for name, tensor in again.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    # Kernels may round by where weights lie in memory.
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", memory_names())
@torch.no_grad()
def test_every_memory_keeps_the_logits_in_every_bit(name, tmp_path):
    spec = SPECS[name][0]
    memory = {"type": name, **spec.options, **spec.stable}
    model = base_model()
    if issubclass(memory_class(name), AttendingMemory):
        with pytest.raises(UserError, match=r"insert.memory: .* has an attention of its own"):
            insert_memory(model, memory)
        return
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    documents = torch.arange(21).expand(2, -1) // 8 + 1
    calls = [{}, {"attention_mask": mask}, {"segment_ids": documents}, {"labels": IDS}]
    before = [model(IDS, **call).logits for call in calls]
    off = model(IDS, use_memory=False).logits  # without the mixer that is a memory
    assert insert_memory(model, memory, layers=[3, 0]) is model
    insert_memory(model, {**memory, "parallel": True}, layers=[2])
    assert [block.memory is not None for block in model.model.layers] == [True, False, True, True]
    for call, logits in zip(calls, before, strict=True):
        assert torch.equal(model(IDS, **call).logits, logits)
    assert torch.equal(run(model, IDS)[0], before[0])  # and with states

    trained(model)
    whole = model(IDS).logits
    assert (whole - before[0]).abs().max() > 1e-3
    assert torch.equal(model(IDS, use_memory=False).logits, off)
    first, states = run(model, IDS[:, :9])
    second, _ = run(model, IDS[:, 9:], states)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-3, rtol=1e-3)
    check_saved(model, tmp_path)


def test_the_config_is_that_of_the_new_model():
    model = insert_memory(base_model(), DELTA, layers=[1, 2])
    memory = {"gate": 0.0, **DELTA}
    mixer = {"mixer": FULL, "ffn": "swiglu"}
    assert model.config.layers == [
        mixer,
        {**mixer, "memory": memory},
        {**LAYERS[1], "memory": memory},
        LAYERS[2],
    ]
    built = MemLMForCausalLM(copy.deepcopy(model.config))
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    alike = insert_memory(base_model(LAYERS[:1]), "min_gru", layers=[0, 1])
    memory = {"type": "min_gru", "gate": 0.0}
    assert alike.config.layers == [{"repeat": 2, **mixer, "memory": memory}]
    assert insert_memory(base_model(), "min_gru").config.num_hidden_layers == 4
    assert list(insert_memory(base_model(), "min_gru").model.memories()) == ["2.mixer", "3.memory"]


def test_the_new_weights_are_those_of_a_new_model():
    torch.manual_seed(3)
    model = insert_memory(base_model(), DELTA, layers=[0]).bfloat16()
    torch.manual_seed(3)
    narrow = insert_memory(base_model().bfloat16().train(), DELTA, layers=[0])
    memory = narrow.model.layers[0].memory
    assert memory.training and memory.module.q_proj.weight.dtype == torch.bfloat16
    # A rate of decay that is kept in 16 bits would not learn.
    assert memory.module.A_log.dtype == memory.module.dt_bias.dtype == torch.float32
    std = float(model.model.layers[0].memory.module.q_proj.weight.detach().float().std())
    assert std == pytest.approx(model.config.initializer_range, rel=0.1)


def test_the_norm_is_that_of_the_site_that_reads_the_same():
    behind = insert_memory(base_model(), DELTA, layers=[0, 2, 3]).model.layers
    beside = insert_memory(base_model(), {**DELTA, "parallel": True}, layers=[0, 2]).model.layers
    for index in (0, 2):
        assert torch.equal(behind[index].memory.norm.weight, behind[index].ffn.norm.weight)
        assert torch.equal(beside[index].memory.norm.weight, beside[index].mixer.norm.weight)
    assert torch.equal(behind[2].memory.post_norm.weight, torch.ones(32))
    assert torch.equal(behind[3].memory.norm.weight, torch.ones(32))  # nothing reads behind it


def test_a_memory_starts_from_the_attention_beside_it():
    sizes = {"type": "knn_cache", "capacity": 12, "segment": 4, "key_size": 8, "top_k": 3}
    model = insert_memory(base_model(), {**sizes, "parallel": True}, layers=[0, 2])
    beside, elsewhere = (model.model.layers[index] for index in (0, 2))
    assert torch.equal(beside.memory.module.q_proj.weight, beside.mixer.module.q_proj.weight)
    assert torch.equal(beside.memory.module.o_proj.weight, beside.mixer.module.o_proj.weight)
    entries = [pattern.get("memory") for pattern in model.config.layers]
    own = {**sizes, "parallel": True, "gate": 0.0}
    assert entries == [{**own, "num_heads": 4, "head_size": 8}, None, own, None]
    assert elsewhere.memory.module.num_heads == 1  # a mixer without such projections
    behind = insert_memory(base_model(), sizes, layers=[0]).model.layers[0]
    assert behind.memory.module.num_heads == 1


@torch.no_grad()
def test_memories_share_one_table():
    shared = {"type": "product_key", **PRODUCT_KEY, "share": "table"}
    model = base_model()
    model = insert_memory(model, {**shared, "share": "upper"}, layers=[3])
    logits = model(IDS).logits
    insert_memory(model, shared, layers=[0, 1])
    assert list(model.model.shared) == ["table", "upper"]  # as the blocks are
    assert torch.equal(model(IDS).logits, logits)
    again = MemLMForCausalLM(copy.deepcopy(model.config))
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    follower = {"type": "knn_cache", **KNN_CACHE, "share": "store"}
    states = insert_memory(base_model(), follower, layers=[0, 1]).init_states(1)
    assert states["0.memory"].nbytes > states["1.memory"].nbytes  # one store for both


@torch.no_grad()
def test_what_was_generated_is_generated():
    model = base_model()
    before = model.generate(IDS, max_new_tokens=3, do_sample=False)
    insert_memory(model, DELTA, layers=[0, 3])
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), before)
    greedy = {"max_new_tokens": 3, "do_sample": False}
    cached = trained(model).generate(IDS, **greedy)
    assert torch.equal(cached, model.generate(IDS, **greedy, use_cache=False))


HYBRID = {**SIZES, **WIDTH, "eos_token_id": None, "pad_token_id": None}
OTHERS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "qwen3_next": Qwen3NextConfig(**HYBRID, **QWEN_HEADS, **EXPERTS),
    "olmo_hybrid": OlmoHybridConfig(**HYBRID),
}


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_models_of_other_libraries_get_memories_in_their_blocks(kind, tmp_path):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(OTHERS[kind])
    randomized(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = MemLMForCausalLM.from_pretrained(tmp_path / "theirs")
    before = model(IDS).logits
    generated = model.generate(IDS, max_new_tokens=3, do_sample=False)
    memory = {"type": "knn_cache", "segment": 4, "top_k": 3, "parallel": True}
    insert_memory(model, memory, layers=[0, 2])
    insert_memory(model, DELTA, layers=[1])
    assert torch.equal(model(IDS).logits, before)
    assert torch.equal(run(model, IDS)[0], before)
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), generated)
    upper = model.model.layers[2]  # attention in all of them
    assert torch.equal(upper.memory.module.q_proj.weight, upper.mixer.module.q_proj.weight)
    assert not torch.equal(trained(model)(IDS).logits, before)
    check_saved(model, tmp_path / "ours")


@torch.no_grad()
def test_a_window_keeps_texts_within_it_and_lifts_the_limit():
    model = base_model(LAYERS[:1])
    model.config.max_position_embeddings = 24
    short, long = model(IDS[:, :10]).logits, model(IDS).logits
    insert_memory(model, DELTA, layers=[0], window=10)
    assert model.max_context is None
    after = model(IDS).logits
    assert torch.equal(model(IDS[:, :10]).logits, short)
    assert_close(after[:, :10], long[:, :10])
    assert (after - long)[:, 10:].abs().max() > 1e-3
    again = MemLMForCausalLM(copy.deepcopy(model.config)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS).logits, after)
    narrow = insert_memory(base_model(), DELTA, layers=[0], window=10)
    windows = [pattern["mixer"].get("window") for pattern in narrow.config.layers]
    assert windows == [10, 10, None, 6]  # a window is never made wider


REFUSED = {
    "unknown": ("gated_dleta", {}, "insert.memory: unknown memory 'gated_dleta'; did you mean"),
    "no memory": (None, {}, "insert.memory: expected a name or a mapping"),
    "unknown key": (
        {"type": "titans", "depht": 2},
        {},
        "insert.memory: unknown key 'depht'; did you mean 'depth'?",
    ),
    "no layer": ("min_gru", {"layers": [4]}, "insert.layers: there is no layer 4; the model has 0"),
    "below": ("min_gru", {"layers": [-1]}, "insert.layers: there is no layer -1"),
    "twice": ("min_gru", {"layers": [1, 1]}, "insert.layers: name at least one layer, and each"),
    "none": ("min_gru", {"layers": []}, "insert.layers: name at least one layer"),
    "names": ("min_gru", {"layers": ["1"]}, "insert: .*layers"),
    "taken": ("min_gru", {"layers": [1]}, "insert.layers: layer 1 has a memory already (titans)"),
    "sizes": ({"type": "titans", "depth": 9}, {}, "insert: layers.3.memory: titans: depth is 9"),
    "segment": (
        {"type": "knn_cache", "segment": 8},
        {"layers": [0, 3]},
        "insert: layers.3: the memory's segment (8) is longer than the attention window (6)",
    ),
    "window": (
        {"type": "knn_cache", "segment": 8},
        {"layers": [0], "window": 4},
        "insert: layers.0: the memory's segment (8) is longer than the attention window (4)",
    ),
    "no window": ("min_gru", {"window": 0}, "insert.window is 0, it must be at least 1"),
    "attending": (
        {"type": "titans", "variant": "mag", "window": 6},
        {},
        "insert.memory: titans with these options has an attention of its own",
    ),
    "shared": (
        {"type": "titans", "share": "one"},
        {"layers": [0]},
        "insert.memory.share: memories of the model share 'one' already (1.memory)",
    ),
    "no name": (
        {"type": "product_key", **PRODUCT_KEY, "share": "keys"},
        {},
        "'keys' cannot be a name of share",
    ),
}


@pytest.mark.parametrize(("memory", "options", "message"), REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_what_does_not_fit_leaves_the_model_as_it_was(memory, options, message):
    titans = {"type": "titans", "num_heads": 2, "head_dim": 8, "share": "one"}
    model = insert_memory(base_model(), titans, layers=[1])
    before, layers = model(IDS).logits, copy.deepcopy(model.config.layers)
    names = list(model.state_dict())
    with pytest.raises(UserError) as error:
        insert_memory(model, memory, **options)
    if ".*" not in message:
        assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(model.state_dict()) == names and model.config.layers == layers
    assert torch.equal(model(IDS).logits, before)


def test_another_kind_of_model_is_refused():
    sizes = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    with pytest.raises(UserError, match="LlamaForCausalLM is no model of this library; load it"):
        insert_memory(llama, "min_gru")


def test_a_model_with_offloaded_weights_is_refused(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    devices = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    model = MemLMForCausalLM.from_pretrained(
        tmp_path / "base", device_map=devices | {"lm_head": "cpu"}, offload_folder=tmp_path / "disk"
    )
    with pytest.raises(UserError, match="weights of the model are offloaded"):
        insert_memory(model, "min_gru")


def test_a_model_without_weights_tells_the_sizes():
    with torch.device("meta"):
        model = MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=LAYERS))
        insert_memory(model, {**KNN_CACHE, "type": "knn_cache", "parallel": True}, layers=[0, 3])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert "memory" in model.config.layers[0]


VALUES = 8


def recall(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that name a value, go on with fillers, and end with the question which it was."""
    values = torch.randint(1, 1 + VALUES, (rows,))
    tokens = torch.full((rows, 12), 20)
    tokens[:, 1], tokens[:, -1] = values, 30
    return tokens, values


def recall_loss(model: MemLMForCausalLM, rows: int = 32, **options) -> torch.Tensor:
    tokens, values = recall(rows)
    return F.cross_entropy(model(tokens, logits_to_keep=1, **options).logits[:, 0], values)


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen"])
def test_the_memory_learns_what_no_attention_reaches(frozen):
    mixer = {**SLIDING, "window": 4, "conv_size": None}
    model = base_model([{"repeat": 2, "mixer": mixer, "ffn": "swiglu"}])
    options = InsertConfig.from_mapping({"memory": DELTA, "layers": [0]})
    insert_memory(model, DELTA, layers=[0])
    if frozen:
        freeze_base(model, options)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if ".memory." not in n}
    with torch.no_grad():
        without = model(IDS, use_memory=False).logits
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(learning, lr=1e-2)
    memory = model.model.layers[0].memory

    recall_loss(model).backward()
    moved = {name for name, p in memory.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"gate"}  # behind a closed gate nothing else has a gradient
    start = {name: p.detach().clone() for name, p in memory.named_parameters()}
    for _ in range(40):
        optimizer.zero_grad()
        recall_loss(model).backward()
        optimizer.step()
    for name, parameter in memory.named_parameters():
        assert not torch.equal(parameter, start[name]), name
    torch.manual_seed(1)
    with torch.no_grad():
        assert recall_loss(model, 256) < 0.6 * math.log(VALUES)
        assert recall_loss(model, 256, use_memory=False) > 0.9 * math.log(VALUES)
        assert torch.equal(model(IDS, use_memory=False).logits, without) == frozen
    kept = [torch.equal(model.get_parameter(name), tensor) for name, tensor in base.items()]
    assert all(kept) if frozen else not any(kept)


def test_only_what_is_new_asks_for_gradients_when_the_base_is_frozen():
    shared = {"type": "product_key", **PRODUCT_KEY, "share": "table"}
    model = insert_memory(base_model(), shared, layers=[0, 3])
    freeze_base(model, InsertConfig.from_mapping({"memory": shared, "layers": [0, 3]}))
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    prefixes = ("model.layers.0.memory.", "model.layers.3.memory.", "model.shared.table.")
    assert asking == {n for n, _ in model.named_parameters() if n.startswith(prefixes)}
    assert {name.split(".")[1] for name in asking} == {"layers", "shared"}
