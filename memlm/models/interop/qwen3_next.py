"""Qwen3-Next as transformers has it: Gated DeltaNet, gated attention and experts, in both
directions."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from memlm.models.configuration import MemLMConfig
from memlm.models.interop.architecture import (
    Architecture,
    Rule,
    dropped,
    interleaved,
    renamed,
    stacked,
)
from memlm.models.interop.delta_hybrids import (
    BIASES,
    KINDS,
    check_layers,
    outer_rules,
    read_delta,
    read_kinds,
    read_model,
    same_names,
    swiglu_rules,
    swiglu_width,
    write_attention,
    write_delta,
)
from memlm.models.interop.our_config import OurConfig, grouped
from memlm.models.interop.their_config import TheirConfig, standardized

# Layers that predict further tokens, which neither transformers nor this library runs.
FURTHER_TOKENS = "mtp.*"
IN_ONE = "experts_in_one_tensor"  # what `observe` adds to a config.json
_MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def read_mixers(theirs: TheirConfig) -> list[dict[str, Any]]:
    """The mixer of each layer: Gated DeltaNet, or attention with an output gate."""
    heads = {
        "type": "attention",
        "num_heads": theirs.take("num_attention_heads"),
        "num_key_value_heads": theirs.take("num_key_value_heads"),
        "head_dim": theirs.take("head_dim"),
        "qk_norm": True,
        "output_gate": True,
        **theirs.rope(),
    }
    if theirs.take("attention_bias"):
        heads |= dict.fromkeys(BIASES, True)
    # Layers that predict further tokens, and the precision of states, which is ours here.
    theirs.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
    mixers = {"attention": heads, "gated_delta": read_delta(theirs)}
    return [mixers[kind] for kind in read_kinds(theirs)]


def read_experts(theirs: TheirConfig, normalize_weights: bool) -> dict[str, Any]:
    """The layer of experts."""
    theirs.ignore(IN_ONE, "output_router_logits", "router_aux_loss_coef")  # the loss has these
    return {
        "type": "moe",
        "num_experts": theirs.take("num_experts"),
        "experts_per_token": theirs.take("num_experts_per_tok"),
        "intermediate_size": theirs.take("moe_intermediate_size"),
        "shared_intermediate_size": theirs.take("shared_expert_intermediate_size"),
        "normalize_weights": normalize_weights,
    }


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    theirs = TheirConfig(config)
    values = read_model(theirs) | theirs.take_all("intermediate_size")
    mixers, sparse = read_mixers(theirs), _sparse(theirs.values)
    experts = read_experts(theirs, theirs.take("norm_topk_prob"))
    theirs.ignore("decoder_sparse_step", "mlp_only_layers")
    theirs.finish()
    layers = [
        {"mixer": mixer, "ffn": experts if index in sparse else "swiglu"}
        for index, mixer in enumerate(mixers)
    ]
    return values | {"zero_centered_norm": True, "layers": grouped(layers)}


def _sparse(values: Mapping[str, Any]) -> set[int]:
    """The layers with experts."""
    if not values["num_experts"]:
        return set()
    step = max(values["decoder_sparse_step"], 1)
    candidates = range(step - 1, values["num_hidden_layers"], step)
    return set(candidates) - set(values["mlp_only_layers"] or [])


def layer_rules(values: Mapping[str, Any], layer: int, prefix: str) -> list[Rule]:
    """What the layers of Qwen3-Next and Qwen3.5 share: norms and mixer, but for what projects to
    queries, keys, values and gates of Gated DeltaNet."""
    theirs, ours = f"{prefix}.layers.{layer}", f"model.layers.{layer}"
    rules = [
        renamed(f"{theirs}.input_layernorm.weight", f"{ours}.mixer.norm.weight"),
        renamed(f"{theirs}.post_attention_layernorm.weight", f"{ours}.ffn.norm.weight"),
    ]
    module = f"{ours}.mixer.module"
    if values["layer_types"][layer] == "full_attention":
        theirs = f"{theirs}.self_attn"
        kinds = ("weight", "bias") if values["attention_bias"] else ("weight",)
        head_dim = values["head_dim"]
        for kind in kinds:
            queries_and_gates = (f"{module}.q_proj.{kind}", f"{module}.g_proj.{kind}")
            sizes = (values["num_attention_heads"], (head_dim, head_dim))
            rules.append(interleaved(f"{theirs}.q_proj.{kind}", queries_and_gates, *sizes))
            rules += same_names(theirs, module, [f"{name}_proj.{kind}" for name in "kvo"])
        return rules + same_names(theirs, module, ["q_norm.weight", "k_norm.weight"])
    theirs = f"{theirs}.linear_attn"
    rules += same_names(theirs, module, ["conv1d.weight", "A_log", "dt_bias"])
    rules.append(renamed(f"{theirs}.norm.weight", f"{module}.o_norm.weight"))
    return [*rules, renamed(f"{theirs}.out_proj.weight", f"{module}.o_proj.weight")]


def observe(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json with whether all experts of a layer are in one tensor, or each in its own."""
    in_one = any(name.endswith(".experts.gate_up_proj") for name in tensors)
    return {**config, IN_ONE: in_one}


def expert_rules(values: Mapping[str, Any], theirs: str, ours: str) -> list[Rule]:
    """Of the layer of experts."""
    each = [f"{theirs}.experts.{expert}" for expert in range(values["num_experts"])]
    rules = []
    for name, matrices in _MATRICES.items():
        if values.get(IN_ONE):
            rules.append(renamed(f"{theirs}.experts.{name}", f"{ours}.{name}"))
            continue
        names = [[f"{one}.{matrix}.weight" for matrix in matrices] for one in each]
        rules.append(stacked(names, f"{ours}.{name}"))
    return [
        *rules,
        renamed(f"{theirs}.gate.weight", f"{ours}.router"),
        renamed(f"{theirs}.shared_expert_gate.weight", f"{ours}.shared_gate.weight"),
        *swiglu_rules(f"{theirs}.shared_expert", f"{ours}.shared_expert"),
    ]


def _rules(config: dict[str, Any]) -> list[Rule]:
    values = standardized(config["model_type"], config)
    heads, value_heads = values["linear_num_key_heads"], values["linear_num_value_heads"]
    key_dim, value_dim = values["linear_key_head_dim"], values["linear_value_head_dim"]
    of_a_head = value_heads // heads
    sizes = (key_dim, key_dim, of_a_head * value_dim, of_a_head * value_dim)
    sparse = _sparse(values)
    found = [*outer_rules(values), dropped(FURTHER_TOKENS)]
    for layer, kind in enumerate(values["layer_types"]):
        found += layer_rules(values, layer, "model")
        theirs, ours = f"model.layers.{layer}", f"model.layers.{layer}"
        if kind == "linear_attention":
            of, to = f"{theirs}.linear_attn", f"{ours}.mixer.module"
            qkvg = [f"{to}.{name}_proj.weight" for name in "qkvg"]
            found.append(interleaved(f"{of}.in_proj_qkvz.weight", qkvg, heads, sizes))
            ba = [f"{to}.{name}_proj.weight" for name in "ba"]
            each = (of_a_head, of_a_head)
            found.append(interleaved(f"{of}.in_proj_ba.weight", ba, heads, each))
        theirs, ours = f"{theirs}.mlp", f"{ours}.ffn.module"
        if layer in sparse:
            found += expert_rules(values, theirs, ours)
        else:
            found += swiglu_rules(theirs, ours)
    return found


def write_mixers(ours: OurConfig) -> dict[str, Any]:
    """The values of a config.json but those of the feed-forward layers."""
    if not ours.config.zero_centered_norm:
        ours.refuse("zero_centered_norm", "False")
    held = ("rope_theta", "rope_fraction", "rope_scaling")
    attention, spec = write_attention(ours, *held, qk_norm=True, output_gate=True, rope=True)
    where = f"layer {ours.mixers('attention')[0][0]}.mixer"
    rope = ours.rope_parameters(where, spec) | {"partial_rotary_factor": spec.rope_fraction}
    return {
        **ours.model_values(),
        **attention,
        **write_delta(ours),
        "model_type": ours.model_type,
        "rms_norm_eps": ours.config.rms_norm_eps,
        "hidden_act": "silu",
        "head_dim": spec.heads(ours.config.hidden_size)[2],
        "rope_parameters": rope,
        "layer_types": [KINDS[plan.mixer[0]] for plan in ours.plans],
    }


def write_experts(ours: OurConfig) -> dict[str, Any]:
    """The values of a config.json for its layers of experts.

    Raises:
        UserError: for layers that differ, or have no shared expert.
    """
    ffns = {i: plan.ffn[1] for i, plan in enumerate(ours.plans) if plan.ffn[0] == "moe"}
    first, spec = next(iter(ffns.items()))
    for index, other in ffns.items():
        if other != spec:
            ours.refuse(f"layer {index}.ffn", f"moe with other options than in layer {first}")
    if spec.shared_intermediate_size is None:
        ours.refuse(f"layer {first}.ffn", "moe without an expert that all tokens share")
    return {
        "num_experts": spec.num_experts,
        "num_experts_per_tok": spec.experts_per_token,
        "moe_intermediate_size": spec.intermediate_size or ours.config.intermediate_size,
        "shared_expert_intermediate_size": spec.shared_intermediate_size,
        "norm_topk_prob": spec.normalize_weights,
    }


def _write_config(config: MemLMConfig) -> dict[str, Any]:
    ours = OurConfig(config, "qwen3_next")
    check_layers(ours, {"attention": "pre", "gated_delta": "pre"}, ("swiglu", "moe"))
    dense = [index for index, plan in enumerate(ours.plans) if plan.ffn[0] == "swiglu"]
    values = write_mixers(ours) | {
        "architectures": ["Qwen3NextForCausalLM"],
        "intermediate_size": swiglu_width(ours),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }
    if len(dense) == len(ours.plans):
        values |= {"num_experts": 0, "mlp_only_layers": []}
    else:
        values |= write_experts(ours)
    return standardized("qwen3_next", values)


QWEN3_NEXT = Architecture("qwen3_next", _read_config, _rules, _write_config, observe)
