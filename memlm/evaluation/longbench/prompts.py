"""LongBench's prompts, answer lengths and scores, as published.

The templates are those of LongBench's repository, word for word (see NOTICE), as wrapped strings.
"""

from dataclasses import dataclass

from memlm.evaluation.longbench.metrics import (
    Metric,
    classification,
    code_similarity,
    count,
    qa_f1,
    retrieval,
    rouge_l,
)

_SCORED_BY = {
    qa_f1: "the F1 of its words",
    rouge_l: "ROUGE-L",
    classification: "the right class among those that are named",
    count: "the share of its numbers that are right",
    retrieval: "the share of its numbers that are the right paragraph's",
    code_similarity: "the likeness of the line of code",
}


@dataclass(frozen=True)
class Prompt:
    """How a task asks and scores.

    Attributes:
        template: with the fields {context} and, behind it, mostly {input}.
        new_tokens: of an answer.
        metric: its score.
        first_line: whether what follows the first line of an answer is left out.
    """

    template: str
    new_tokens: int
    metric: Metric
    first_line: bool = False

    @property
    def classes(self) -> bool:
        """Whether an answer is one of the classes that every row names."""
        return self.metric is classification

    @property
    def summary(self) -> bool:
        """Whether right answers are summaries, longer than what a model should write."""
        return self.metric is rouge_l

    @property
    def scored_by(self) -> str:
        """For descriptions: an answer counts by ..."""
        return f"an answer counts by {_SCORED_BY[self.metric]}"


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer "
    "and do not output any other words.\n\nThe following are given "
    "passages.\n{context}\n\nAnswer the question based on the given passages. "
    "Only give me the answer and do not output any other words.\n\nQuestion: "
    "{input}\nAnswer:"
)

PROMPTS = {
    "narrativeqa": Prompt(
        (
            "You are given a story, which can be either a novel or a movie script, and a "
            "question. Answer the question asconcisely as you can, using a single phrase "
            "if possible. Do not provide any explanation.\n\nStory: {context}\n\nNow, "
            "answer the question based on the story asconcisely as you can, using a "
            "single phrase if possible. Do not provide any explanation.\n\nQuestion: "
            "{input}\n\nAnswer:"
        ),
        128,
        qa_f1,
    ),
    "qasper": Prompt(
        (
            "You are given a scientific article and a question. Answer the question as "
            "concisely as you can, using a single phrase or sentence if possible. If the "
            "question cannot be answered based on the information in the article, write "
            '"unanswerable". If the question is a yes/no question, answer "yes", '
            '"no", or "unanswerable". Do not provide any explanation.\n\nArticle: '
            "{context}\n\n Answer the question based on the above article as concisely "
            "as you can, using a single phrase or sentence if possible. If the question "
            "cannot be answered based on the information in the article, write "
            '"unanswerable". If the question is a yes/no question, answer "yes", '
            '"no", or "unanswerable". Do not provide any explanation.\n\nQuestion: '
            "{input}\n\nAnswer:"
        ),
        128,
        qa_f1,
    ),
    "multifieldqa_en": Prompt(
        (
            "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the "
            "following question based on the above text, only give me the answer and do "
            "not output any other words.\n\nQuestion: {input}\nAnswer:"
        ),
        64,
        qa_f1,
    ),
    "hotpotqa": Prompt(_PASSAGES, 32, qa_f1),
    "2wikimqa": Prompt(_PASSAGES, 32, qa_f1),
    "musique": Prompt(_PASSAGES, 32, qa_f1),
    "gov_report": Prompt(
        (
            "You are given a report by a government agency. Write a one-page summary of "
            "the report.\n\nReport:\n{context}\n\nNow, write a one-page summary of the "
            "report.\n\nSummary:"
        ),
        512,
        rouge_l,
    ),
    "qmsum": Prompt(
        (
            "You are given a meeting transcript and a query containing a question or "
            "instruction. Answer the query in one or more "
            "sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the "
            "above meeting transcript in one or more sentences.\n\nQuery: "
            "{input}\nAnswer:"
        ),
        512,
        rouge_l,
    ),
    "multi_news": Prompt(
        (
            "You are given several news passages. Write a one-page summary of all news. "
            "\n\nNews:\n{context}\n\nNow, write a one-page summary of all the "
            "news.\n\nSummary:"
        ),
        512,
        rouge_l,
    ),
    "trec": Prompt(
        (
            "Please determine the type of the question below. Here are some examples of "
            "questions.\n\n{context}\n{input}"
        ),
        64,
        classification,
        first_line=True,
    ),
    "triviaqa": Prompt(
        (
            "Answer the question based on the given passage. Only give me the answer and "
            "do not output any other words. The following are some "
            "examples.\n\n{context}\n\n{input}"
        ),
        32,
        qa_f1,
        first_line=True,
    ),
    "samsum": Prompt(
        (
            "Summarize the dialogue into a few short sentences. The following are some "
            "examples.\n\n{context}\n\n{input}"
        ),
        128,
        rouge_l,
        first_line=True,
    ),
    "lsht": Prompt(
        ("请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}"),
        64,
        classification,
        first_line=True,
    ),
    "passage_count": Prompt(
        (
            "There are some paragraphs below sourced from Wikipedia. Some of them may be "
            "duplicates. Please carefully read these paragraphs and determine how many "
            "unique paragraphs there are after removing duplicates. In other words, how "
            "many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease "
            "enter the final count of unique paragraphs after removing duplicates. The "
            "output format should only contain the number, such as 1, 2, 3, and so "
            "on.\n\nThe final answer is: "
        ),
        32,
        count,
    ),
    "passage_retrieval_en": Prompt(
        (
            "Here are 30 paragraphs from Wikipedia, along with an abstract. Please "
            "determine which paragraph the abstract is from.\n\n{context}\n\nThe "
            "following is an abstract.\n\n{input}\n\nPlease enter the number of the "
            "paragraph that the abstract is from. The answer format must be like "
            '"Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: '
        ),
        32,
        retrieval,
    ),
    "passage_retrieval_zh": Prompt(
        (
            '以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：'
        ),
        32,
        retrieval,
    ),
    "lcc": Prompt(
        ("Please complete the code given below. \n{context}Next line of code:\n"),
        64,
        code_similarity,
    ),
    "repobench-p": Prompt(
        ("Please complete the code given below. \n{context}{input}Next line of code:\n"),
        64,
        code_similarity,
    ),
}
CHINESE = ("lsht", "passage_retrieval_zh")
UNSCORED = ("multifieldqa_zh", "dureader", "vcsum")  # for want of Chinese words
