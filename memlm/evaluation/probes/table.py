"""The probes as Markdown."""

from memlm.evaluation.probes.associative import AssociativeProbes

_HEAD = (
    "| layer | head | previous token (%) | weight | induction (%) | weight "
    "| output-value recall (%) | key-query recall (%) |\n|---|---|---|---|---|---|---|---|\n"
)


def format_table(probes: AssociativeProbes) -> str:
    """A line per head, then what the model predicts.

    Key-query recall is that with the best head of the layer before, named where there are several.
    """
    lines = [
        f"| {one.layer} | {one.head} | {100 * one.previous_token:.1f} | {one.previous_weight:.2f} "
        f"| {100 * one.induction:.1f} | {one.induction_weight:.2f} "
        f"| {100 * one.output_value:.1f} | {_best(one.key_query)} |\n"
        for one in probes.heads
    ]
    said = [f"Recall by chance: {100 * probes.chance:.1f} %."]
    if probes.in_context_bits is not None:
        accuracy = 100 * probes.measures["in_context_accuracy"]
        said.append(
            f"Behind triggers seen before: accuracy {accuracy:.1f} %, loss "
            f"{probes.in_context_bits:.3f} bits."
        )
    if probes.global_bits is not None:
        accuracy, best = (
            100 * probes.measures[name] for name in ("global_accuracy", "global_best")
        )
        above = probes.measures["global_kl_bits"]
        said.append(
            f"Behind other tokens: accuracy {accuracy:.1f} % of the possible {best:.1f} %, loss "
            f"{probes.global_bits:.3f} bits, {above:.3f} above the chain."
        )
    said.append(
        f"Without attention: {probes.bigram_kl_bits:.3f} bits from the chain (all tokens alike: "
        f"{probes.uniform_kl_bits:.3f})."
    )
    return _HEAD + "".join(lines) + "\n" + "\n".join(said) + "\n"


def _best(recall: list[float]) -> str:
    if not recall:
        return "-"
    best = max(range(len(recall)), key=recall.__getitem__)
    text = f"{100 * recall[best]:.1f}"
    return text if len(recall) == 1 else f"{text} (head {best})"
