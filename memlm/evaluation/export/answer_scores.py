"""Scores of answers for lm-evaluation-harness, `process_results` of task files beside this one.

Written by memlm.evaluation.export; the scores are those that memlm gives the same answers. It needs
nothing but the standard library. `results` holds one generated text; a document has "references",
and for `names_labels` "labels", "asked" and "named" (see there).
"""

import re


def contains_all(doc: dict, results: list[str]) -> dict[str, float]:
    """The share of the references that the answer contains, upper and lower case alike (RULER)."""
    answer = _plain(results[0])
    found = [reference.lower() in answer for reference in doc["references"]]
    return {"score": sum(found) / len(found)}


def contains_any(doc: dict, results: list[str]) -> dict[str, float]:
    """1 when the answer contains a reference, upper and lower case alike (RULER's qa)."""
    answer = _plain(results[0])
    return {"score": float(any(reference.lower() in answer for reference in doc["references"]))}


def contains_phrases(doc: dict, results: list[str]) -> dict[str, float]:
    """1 when the answer contains all references, white space and case apart (niah)."""
    answer = " ".join(results[0].split()).casefold()
    return {"score": float(all(phrase.casefold() in answer for phrase in doc["references"]))}


def first_line_contains(doc: dict, results: list[str]) -> dict[str, float]:
    """1 when the first line with text contains a reference, white space and case apart."""
    line, *references = (
        " ".join(text.lower().split())
        for text in (results[0].strip().partition("\n")[0], *doc["references"])
    )
    return {"score": float(any(reference in line for reference in references))}


def completes(doc: dict, results: list[str]) -> dict[str, float]:
    """1 when the first line contains a reference, upper and lower case alike."""
    line = results[0].split("\n")[0]
    found = (re.search(re.escape(one), line, re.IGNORECASE) for one in doc["references"])
    return {"score": float(any(found))}


def names_labels(doc: dict, results: list[str]) -> dict[str, float]:
    """1 when the answer names the labels "named" of the question type's "labels", and no other.

    What stands behind the first full stop or where an example or a context starts does not count,
    nor do the labels that the question itself names, "asked" (BABILong).
    """
    said = re.split(r"\.|<context>|<example>", results[0].lower(), maxsplit=1)[0]
    found = {
        label
        for label in doc["labels"]
        if re.search(rf"(?<![a-z0-9]){re.escape(label)}s?(?![a-z0-9])", said)
    }
    return {"score": float(found - set(doc["asked"]) == set(doc["named"]))}


def _plain(text: str) -> str:
    """In lower case, control characters as line ends, without white space around."""
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip().lower()
