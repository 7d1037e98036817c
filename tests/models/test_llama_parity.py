"""With copied weights the backbone gives the logits of transformers' Llama."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM

NAMES = {
    "self_attn.": "mixer.module.",
    "input_layernorm.": "mixer.norm.",
    "mlp.": "ffn.module.",
    "post_attention_layernorm.": "ffn.norm.",
}


def test_same_logits_as_llama():
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    ).eval()
    mixer = {
        "type": "attention",
        "num_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 5000.0,
    }
    ours = MemLMForCausalLM(
        MemLMConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            layers=[{"repeat": 2, "mixer": mixer, "ffn": "swiglu"}],
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    ).eval()
    weights = {}
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for name, tensor in llama.state_dict().items():
        for theirs, mine in NAMES.items():
            name = name.replace(theirs, mine)
        weights[name] = tensor
    ours.load_state_dict(weights, strict=True)

    ids = torch.randint(50, (3, 40))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        expected = llama(ids, attention_mask=mask).logits
        logits = ours(ids, attention_mask=mask).logits
        labelled = ours(ids, labels=ids).loss, llama(ids, labels=ids).loss
    # Llama gives padded rows absolute positions; rotary attention only knows differences.
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*labelled)

    prompt = ids[:, :9]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(prompt, **options), llama.generate(prompt, **options))
