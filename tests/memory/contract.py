"""The laws every memory obeys, as functions of a case (a memory at a site of a tiny model).

`LAWS` maps the name of a law to `law(case, data)`, where `data` draws splits, paddings and
packings from Hypothesis. test_laws.py runs every law on every case of `cases()`; a memory enters by
one line in `SPECS`.
"""

from collections.abc import Callable
from typing import Any

from memlm.memory import memory_names
from tests.memory import generation_laws, state_laws, training_laws
from tests.memory.law_tools import Case, Spec

EVERYWHERE = ("mixer", "memory", "parallel")
GATED_DELTA = {"num_heads": 2, "num_v_heads": 4, "head_dim": 8}
DELTA_RULE = {"decay": False, "use_gate": False, "conv_size": None, "allow_neg_eigval": True}
TITANS = {"num_heads": 2, "head_dim": 8, "expansion": 2, "chunk_size": 4}
TITANS_ATTENTION = {"window": 5, "segment": 5, "persistent_tokens": 2, "attention_heads": 2}
PRODUCT_KEY = {"num_keys": 6, "num_heads": 2, "top_k": 3}
PLAIN_VALUES = {"variant": "plain", "value_size": 12, "query_norm": "batch", "gated": True}
LACT = {"num_heads": 2, "head_dim": 4, "chunk_size": 5, "orthogonalise": True}
KNN_CACHE = {"capacity": 12, "segment": 4, "key_size": 8, "top_k": 3, "num_heads": 2}
MEMORIZING = {"window": 5, "segment": 4, "capacity": 12, "top_k": 3, "num_heads": 4}
# The only thing a new memory adds here.
SPECS: dict[str, list[Spec]] = {
    "gated_delta": [
        Spec(EVERYWHERE, GATED_DELTA),
        Spec(("mixer",), {**GATED_DELTA, **DELTA_RULE}, "delta_rule", examples=1),
    ],
    "knn_cache": [
        Spec(("memory", "parallel"), KNN_CACHE),
        Spec(("memory", "parallel"), {**KNN_CACHE, "share": "store"}, "shared", examples=1),
        Spec(("memory",), {**KNN_CACHE, "context": 3, "head_size": 6}, "context", examples=1),
        Spec(("memory",), {**KNN_CACHE, "reproject": True}, "reproject", examples=1),
        Spec(("memory",), {**KNN_CACHE, "eviction": "lru", "context": 2}, "lru", examples=1),
    ],
    "lact": [Spec(("parallel",), LACT, stable={"orthogonalise": False})],
    "linear_attention": [
        Spec(EVERYWHERE, {"num_heads": 2, "head_dim": 8}),
        Spec(
            ("mixer",),
            {"num_heads": 2, "feature_map": "identity", "normalizer": False},
            "unnormalized",
            examples=1,
        ),
    ],
    "memorizing_attention": [
        Spec(("mixer",), {**MEMORIZING, "num_key_value_heads": 2}),
        Spec(("mixer",), {**MEMORIZING, "head_gate": "tanh", "rope": False}, "tanh", examples=1),
    ],
    "min_gru": [
        Spec(EVERYWHERE),
        Spec(("mixer",), {"expansion": 1.5, "conv_size": None}, "no_conv", examples=1),
    ],
    "min_lstm": [Spec(EVERYWHERE)],
    "product_key": [
        Spec(("ffn", "memory"), PRODUCT_KEY),
        Spec(("ffn",), {**PRODUCT_KEY, "share": "table"}, "shared", examples=1),
        Spec(("ffn",), {**PRODUCT_KEY, **PLAIN_VALUES}, "plain", examples=1),
        Spec(("ffn",), {**PRODUCT_KEY, "variant": "peer", "share": "experts"}, "peer", examples=1),
    ],
    "retention": [Spec(EVERYWHERE, {"num_heads": 2, "head_dim": 8})],
    "titans": [
        Spec(EVERYWHERE, {**TITANS, "depth": 1}, "depth1"),
        Spec(
            ("mixer", "memory"),
            {**TITANS, "depth": 2},
            "depth2",
            stable={"theta_max": 1e-3},
            examples=1,
        ),
        *(
            Spec(
                ("mixer",),
                {**TITANS, **TITANS_ATTENTION, "variant": variant, "depth": depth},
                f"{variant}-depth{depth}",
                stable={"theta_max": 1e-3} if depth > 1 else {},
                examples=1,
                slow=depth > 1,  # depth 2 by itself is above
            )
            for variant in ("mac", "mag", "mal")
            for depth in (1, 2)
        ),
    ],
}
# A store belongs to one set of weights: knn_lm has a test of its own (test_knn_lm.py).
OUTPUT_SPECS: dict[str, list[Spec]] = {
    "neural_cache": [
        Spec(("output",), {"capacity": 12, "weight": 0.4}),
        Spec(("output",), {"capacity": 15, "weight": 0.4, "top_k": 3}, "nearest", examples=1),
        Spec(
            ("output",), {"capacity": 40, "metric": "dot", "temperature": 10.0}, "dot", examples=1
        ),
    ],
}


def cases() -> list[Case]:
    """Every registered memory at each of its sites."""
    specs = SPECS | OUTPUT_SPECS
    return [
        Case(name, site, spec)
        for name in [*memory_names(), *OUTPUT_SPECS]
        for spec in specs.get(name, ())
        for site in spec.sites
    ]


LAWS: dict[str, Callable[[Case, Any], None]] = {
    "chunk": state_laws.chunk,
    "isolation": state_laws.isolation,
    "off": state_laws.off,
    "causal": state_laws.causal,
    "acts": state_laws.acts,
    "fork": state_laws.fork,
    "reference": training_laws.reference,
    "read-only": state_laws.read_only,
    "bytes": state_laws.bytes_,
    "gradient": training_laws.gradient,
    "checkpointing": training_laws.gradient_checkpointing,
    "autocast": training_laws.autocast,
    "save/load": generation_laws.save_load,
    "cache": generation_laws.generation_cache,
    "padding": generation_laws.left_padding,
    "beams": generation_laws.beams,
    "packed": state_laws.packed,
}
