"""Memories with the names and shapes of other codes, computed here from the formulas alone."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.errors import UserError
from memlm.memory import CallContext
from memlm.models.interop import load_product_key

WIDTH, HEADS, KEYS, KEY_SIZE, TOP_K = 12, 2, 5, 6, 3


def chosen(query, first, second):
    """Slots and weights [T, HEADS, TOP_K] by all KEYS^2 scores.

    query [T, HEADS, KEY_SIZE]; first, second [HEADS, KEYS, KEY_SIZE / 2].
    """
    q1, q2 = query.chunk(2, -1)
    s1, s2 = torch.einsum("thd,hnd->thn", q1, first), torch.einsum("thd,hnd->thn", q2, second)
    best = (s1[..., :, None] + s2[..., None, :]).flatten(-2).topk(TOP_K)
    return best.indices, best.values.softmax(-1)


def query_network(batch_norm=False, bias=True):
    layers = [nn.Linear(WIDTH, HEADS * KEY_SIZE, bias=bias)]
    if batch_norm:
        norm = nn.BatchNorm1d(HEADS * KEY_SIZE)
        for tensor in (norm.weight.data, norm.running_var):
            tensor.uniform_(0.5, 2)
        for tensor in (norm.bias.data, norm.running_mean):
            tensor.normal_()
        layers.append(norm)
    network = nn.Module()
    network.query_mlps = nn.Sequential(*layers)
    return network


class Meta(nn.Module):
    def __init__(self, width=WIDTH, swilu=True, projected=True, gated=False, peer=False):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(2 * HEADS * KEYS, KEY_SIZE // 2))
        self.query_proj = query_network()
        if peer:
            self.values_u, self.values_v = (nn.Embedding(KEYS**2, WIDTH) for _ in range(2))
        else:
            self.values = nn.Embedding(KEYS**2, width)
        if projected:
            self.value_proj = nn.Linear(width, WIDTH)
        if swilu:
            self.swilu_projection = nn.Linear(WIDTH, width)
        if gated:
            self.gating = nn.Linear(WIDTH, 1)
        self.swilu, self.projected, self.gated, self.peer = swilu, projected, gated, peer

    def forward(self, x):
        # The first half keys of head 0, the second ones of head 0, the first ones of head 1, ...
        lists = self.keys.split(KEYS)
        first, second = torch.stack(lists[0::2]), torch.stack(lists[1::2])
        query = self.query_proj.query_mlps(x).view(len(x), HEADS, KEY_SIZE)
        slots, weights = chosen(query, first, second)
        if self.peer:
            down, up = self.values_u(slots), self.values_v(slots)
            hidden = F.gelu(torch.einsum("td,thkd->thk", x, down))
            y = torch.einsum("thk,thkd->td", weights * hidden, up)
        else:
            y = torch.einsum("thk,thkd->td", weights, self.values(slots))
            if self.swilu:
                y = y * F.silu(self.swilu_projection(x))
            if self.projected:
                y = self.value_proj(y)
        return torch.sigmoid(self.gating(x)) * y if self.gated else y


class Xlm(nn.Module):
    def __init__(self, batch_norm=False, bias=True, one_list=False):
        super().__init__()
        shape = (KEYS,) if one_list else (HEADS, 2, KEYS)
        self.keys = nn.Parameter(torch.randn(*shape, KEY_SIZE // 2))
        self.query_proj = query_network(batch_norm, bias)
        self.values = nn.EmbeddingBag(KEYS**2, WIDTH, mode="sum")

    def forward(self, x):
        keys = self.keys.expand(HEADS, 2, KEYS, KEY_SIZE // 2)
        query = self.query_proj.query_mlps(x).view(len(x), HEADS, KEY_SIZE)
        slots, weights = chosen(query, keys[:, 0], keys[:, 1])
        return torch.einsum("thk,thkd->td", weights, self.values.weight[slots])


class Lucidrains(nn.Module):
    def __init__(self):
        super().__init__()
        half = KEY_SIZE // 2
        self.to_queries = nn.Linear(WIDTH, 2 * HEADS * half, bias=False)
        self.norm = nn.LayerNorm(half)
        self.keys = nn.Parameter(torch.randn(HEADS, KEYS, 2, half))
        self.values = nn.EmbeddingBag(KEYS**2, WIDTH, mode="sum")
        nn.init.normal_(self.norm.weight), nn.init.normal_(self.norm.bias)

    def forward(self, x):
        halves = self.norm(self.to_queries(x).view(len(x), 2, HEADS, KEY_SIZE // 2))
        query = torch.cat([halves[:, 0], halves[:, 1]], -1)
        slots, weights = chosen(query, self.keys[:, :, 0], self.keys[:, :, 1])
        return torch.einsum("thk,thkd->td", weights, self.values.weight[slots])


def output(memory, shared, x):
    context = CallContext.plain(1, len(x), shared=dict(shared))
    return memory.eval()(x[None], None, context)[0][0]


CASES = {
    "meta": (Meta, {}, "meta", "memory_plus"),
    "meta, other width": (Meta, {"width": 8}, "meta", "memory_plus"),
    "meta, gated": (Meta, {"gated": True}, "meta", "memory_plus"),
    "meta, plain": (Meta, {"swilu": False, "projected": False}, "meta", "plain"),
    "meta, projected": (Meta, {"width": 8, "swilu": False, "gated": True}, "meta", "plain"),
    "meta, experts": (Meta, {"peer": True, "gated": True}, "meta", "peer"),
    "xlm": (Xlm, {}, "xlm", "plain"),
    "xlm, batch norm": (Xlm, {"batch_norm": True}, "xlm", "plain"),
    "xlm, no bias, one list": (Xlm, {"bias": False, "one_list": True}, "xlm", "plain"),
    "lucidrains": (Lucidrains, {}, "lucidrains", "plain"),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_other_code(case):
    make, options, layout, variant = CASES[case]
    theirs = make(**options).eval()
    weights = load_product_key(theirs.state_dict(), TOP_K)
    assert weights.layout == layout and weights.hidden_size == WIDTH
    config = weights.configs[""]
    assert (config.num_keys, config.num_heads, config.key_size) == (KEYS, HEADS, KEY_SIZE)
    assert (config.variant, config.top_k, config.share) == (variant, TOP_K, None)
    memories, shared = weights.modules()
    x = torch.randn(7, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(output(memories[""], shared, x), theirs(x), rtol=1e-5, atol=1e-5)


def test_one_list_of_keys_becomes_one_of_every_head_that_trains():
    theirs = Xlm(one_list=True)
    memory = load_product_key(theirs.state_dict(), TOP_K).modules()[0][""]
    optimizer = torch.optim.SGD([memory.keys], lr=0.1)
    output(memory, {}, torch.randn(7, WIDTH)).square().sum().backward()
    optimizer.step()
    lists = memory.keys.detach().flatten(0, 1)
    assert not any(torch.equal(lists[0], other) for other in lists[1:])


def test_outputs_are_those_of_the_package():
    package = pytest.importorskip("product_key_memory")
    theirs = package.PKM(WIDTH, heads=HEADS, num_keys=KEYS, topk=TOP_K, dim_head=3).eval()
    nn.init.normal_(theirs.norm.weight), nn.init.normal_(theirs.norm.bias)
    memories, shared = load_product_key(theirs.state_dict(), TOP_K).modules()
    x = torch.randn(7, WIDTH)
    with torch.no_grad():
        expected = theirs(x[None])[0]
        torch.testing.assert_close(output(memories[""], shared, x), expected, rtol=1e-5, atol=1e-5)


class Stack(nn.Module):
    """Meta's memories in layers 2 and 10 of a model."""

    def __init__(self, **options):
        super().__init__()
        self.embeddings = nn.Embedding(3, WIDTH)
        self.layers = nn.ModuleDict()
        for index in ("10", "2"):
            self.layers[index] = nn.Module()
            self.layers[index].feed_forward = Meta(**options)

    def memory(self, index):
        return self.layers[index].feed_forward


@pytest.mark.parametrize("stored", ["in all", "in the first", "as copies"])
@pytest.mark.parametrize("peer", [False, True])
def test_a_shared_table(stored, peer):
    model = Stack(peer=peer)
    first, last = model.memory("2"), model.memory("10")
    names = ("values_u", "values_v") if peer else ("values",)
    for name in names:
        setattr(last, name, getattr(first, name))
    state = model.state_dict()
    for name in names:
        key = f"layers.10.feed_forward.{name}.weight"
        if stored == "in the first":
            del state[key]
        if stored == "as copies":
            state[key] = state[key].clone()
    weights = load_product_key(state, TOP_K)
    assert list(weights.layers) == ["layers.2.feed_forward", "layers.10.feed_forward"]
    assert {config.share for config in weights.configs.values()} == {"table"}
    assert list(weights.shared) == ["table"]
    assert not any(name.startswith("values") for t in weights.layers.values() for name in t)
    x = torch.randn(7, WIDTH)
    memories, shared = weights.modules()
    with torch.no_grad():
        for theirs, memory in zip((first, last), memories.values(), strict=True):
            torch.testing.assert_close(output(memory, shared, x), theirs(x), rtol=1e-5, atol=1e-5)


def test_tables_of_their_own():
    model = Stack()
    weights = load_product_key(model.state_dict(), TOP_K)
    assert [config.share for config in weights.configs.values()] == [None, None]
    assert not weights.shared
    table = weights.layers["layers.2.feed_forward"]["values.weight"]
    assert table.data_ptr() == model.memory("2").values.weight.data_ptr()  # no copy
    only = load_product_key(model.state_dict(), TOP_K, prefix="layers.10.")
    assert list(only.layers) == ["layers.10.feed_forward"]


def test_weights_go_into_a_model():
    theirs = Stack()
    theirs.memory("10").values = theirs.memory("2").values
    weights = load_product_key(theirs.state_dict(), TOP_K)
    sites = {"layers.2.feed_forward": "0.ffn", "layers.10.feed_forward": "1.memory"}
    options = [
        {
            "type": "product_key",
            **{name: getattr(config, name) for name in ("num_keys", "num_heads", "top_k", "share")},
            **{name: getattr(config, name) for name in ("key_size", "query_norm", "variant")},
        }
        for config in weights.configs.values()
    ]
    layers = [
        {"mixer": "attention", "ffn": options[0]},
        {"mixer": "attention", "memory": options[1], "ffn": "swiglu"},
    ]
    model = MemLMForCausalLM(MemLMConfig(vocab_size=20, hidden_size=WIDTH, layers=layers)).eval()
    found = model.load_state_dict(weights.state_dict(sites), strict=False)
    assert not found.unexpected_keys
    assert not any("keys" in name or "shared" in name for name in found.missing_keys)
    x = torch.randn(7, WIDTH)
    shared = dict(model.model.shared)
    with torch.no_grad():
        for index, memory in zip(("2", "10"), model.model.memories().values(), strict=True):
            expected = theirs.memory(index)(x)
            torch.testing.assert_close(output(memory, shared, x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="no memory 'layers.3.feed_forward'; did you mean 'layers"):
        weights.state_dict({"layers.3.feed_forward": "0.ffn"})


def test_safetensors_file_and_folder(tmp_path):
    state = Xlm(batch_norm=True).state_dict()
    table = {"values.weight": state["values.weight"]}
    rest = {name: tensor for name, tensor in state.items() if name not in table}
    save_file(state, tmp_path / "all.safetensors")
    (tmp_path / "parts").mkdir()
    save_file(table, tmp_path / "parts" / "1.safetensors")
    save_file(rest, tmp_path / "parts" / "2.safetensors")
    expected = load_product_key(state, TOP_K).layers[""]
    for path in (tmp_path / "all.safetensors", str(tmp_path / "parts")):
        found = load_product_key(path, TOP_K).layers[""]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.save(state, tmp_path / "all.pth")
    for path in (tmp_path / "all.pth", tmp_path / "nothing.safetensors", tmp_path):
        if path == tmp_path:
            (tmp_path / "all.safetensors").unlink()
        with pytest.raises(UserError, match=re.escape(f"{path} is no safetensors file nor")):
            load_product_key(path, TOP_K)


def changed(module, **tensors):
    """A state dict with other tensors; None takes one away."""
    state = dict(module.state_dict())
    for name, tensor in tensors.items():
        state[name.replace("__", ".")] = tensor
    return {name: tensor for name, tensor in state.items() if tensor is not None}


LINEAR = "query_proj__query_mlps__0"
ERRORS = [
    (lambda: {}, "no product-key memory under '': .* nothing is there"),
    (lambda: {"a.weight": torch.ones(2)}, "the first name there is 'a.weight'"),
    (lambda: changed(Meta(), values__weight=None), "keys?.*values.weight is missing, and 0 other"),
    (lambda: changed(Meta(), values__weight=torch.ones(24, 12)), "24 rows, it must have num_keys"),
    (lambda: changed(Meta(), values__weight=torch.ones(25)), r"values.weight is \[25\], it must"),
    (lambda: changed(Meta(), keys=torch.ones(19, 3)), r"keys is \[19, 3\], it must be \[20, 3\]"),
    (lambda: changed(Meta(), keys=torch.ones(20, 5)), r"mlps.0.weight is \[12, 12\], .* \* 10"),
    (lambda: changed(Meta(), swilu_projection__bias=None), "swilu_projection.bias is missing"),
    (
        lambda: changed(Meta(), value_proj__weight=torch.ones(12, 9)),
        r"value_proj.weight is \[12, 9\], it must be \[12, 12\]",
    ),
    (lambda: Meta(swilu=False).state_dict(), "value_proj.weight belongs to an option"),
    (lambda: changed(Xlm(), head_permutations=torch.ones(2, 25)), "head_permutations belongs to"),
    (
        lambda: changed(Xlm(), query_proj__query_mlps__2__weight=torch.ones(12, 12)),
        "mlps.2.weight is .* a single linear layer",
    ),
    (lambda: changed(Xlm(), values__weight=torch.ones(25, 8)), "value_proj.weight is missing"),
    (lambda: changed(Lucidrains(), norm__weight=None), "norm.weight is missing"),
    (
        lambda: changed(Lucidrains(), to_queries__weight=torch.ones(10, 12)),
        r"to_queries.weight is \[10, 12\], it must be \[12, 12\]",
    ),
    (
        lambda: changed(Lucidrains(), keys=torch.ones(2, 2, 5, 3)),
        r"keys is \[2, 2, 5, 3\], it must be \[heads, 5, 2, dim_head\] for 5\^2 slots",
    ),
    (lambda: changed(Lucidrains(), output_norm__weight=torch.ones(12)), "output_norm.weight bel"),
]


@pytest.mark.parametrize("state, message", ERRORS)
def test_errors_are_one_line(state, message):
    with pytest.raises(UserError, match=message) as raised:
        load_product_key(state(), TOP_K)
    assert "\n" not in str(raised.value)


def test_errors_of_several_memories():
    model = Stack()
    state = model.state_dict()
    state |= {f"other.{name}": tensor for name, tensor in Xlm().state_dict().items()}
    with pytest.raises(UserError, match=r"other.keys has the layout of xlm .* with `prefix`"):
        load_product_key(state, TOP_K)
    state |= {f"third.{name}": t for name, t in changed(Meta(), values__weight=None).items()}
    with pytest.raises(UserError, match=r"third.values.weight is missing, and 3 other tables"):
        load_product_key(state, TOP_K)
    with pytest.raises(UserError, match="top_k 6 is more than num_keys 5"):
        load_product_key(model.state_dict(), 6)
