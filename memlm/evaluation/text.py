"""Held-out text for the tasks."""

from transformers import PreTrainedTokenizerBase

from memlm.data.config import DataConfig
from memlm.data.corpus import Corpus, build_corpus
from memlm.data.sources import stdlib_documents, text_documents


def held_out_text(tokenizer: PreTrainedTokenizerBase, files: list[str]) -> Corpus:
    """The documents of `files`, all of them; or the standard library's held-out sources.

    Held out are the documents that training with the default validation_fraction never sees.

    Raises:
        UserError: for a file that is missing, empty or binary.
    """
    if files:
        return build_corpus(text_documents(files), tokenizer, "train", fraction=0.0)
    fraction = DataConfig().validation_fraction
    return build_corpus(stdlib_documents(), tokenizer, "validation", fraction)
