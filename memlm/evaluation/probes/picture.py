"""What heads attend to, as a picture."""

import io

import numpy as np
import torch

from memlm.evaluation.probes.associative import attention_weights
from memlm.models import MemLMForCausalLM

_MOST_TOKENS = 48


@torch.inference_mode()
def draw_attention(model: MemLMForCausalLM, ids: np.ndarray) -> bytes:
    """A PNG: attention weights of the first tokens of a row, one panel per layer and head.

    Args:
        model: one that `check_model` lets pass.
        ids: int64 [T].
    """
    from matplotlib.figure import Figure

    row = torch.from_numpy(ids[None, :_MOST_TOKENS]).to(model.device)
    hidden = model(row, output_hidden_states=True, use_cache=False).hidden_states
    weights = [
        attention_weights(block.mixer.module, block.mixer.norm(given))[0].cpu().numpy()
        for block, given in zip(model.model.layers, hidden[:-1], strict=True)
    ]
    columns = max(map(len, weights))
    figure = Figure(figsize=(3 * columns + 1, 3 * len(weights)), layout="constrained")
    panels = figure.subplots(len(weights), columns, squeeze=False)
    for layer, heads in enumerate(weights):
        for head, panel in enumerate(panels[layer]):
            if head >= len(heads):
                panel.set_axis_off()
                continue
            picture = panel.imshow(heads[head], vmin=0, vmax=1, cmap="viridis")
            panel.set(
                title=f"layer {layer}, head {head}",
                xlabel="attended position (tokens)",
                ylabel="position (tokens)",
            )
    figure.colorbar(picture, ax=panels, label="attention weight")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
