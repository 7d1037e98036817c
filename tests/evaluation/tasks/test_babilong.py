"""BABILong: bAbI's files, prompts of exact lengths, strict scores; all twenty question types."""

import hashlib
import os
import re
import time

import numpy as np
import pytest

from memlm.data import ByteTokenizer
from memlm.errors import UserError
from memlm.evaluation.babilong import world
from memlm.evaluation.babilong.labels import LABELS, is_right
from memlm.evaluation.babilong.prompts import prompt_end, prompt_start
from memlm.evaluation.babilong.sentences import Sentences
from memlm.evaluation.babilong.stories import Story, find_stories, read_stories
from memlm.evaluation.config import BabilongOptions
from memlm.evaluation.tasks.babilong import Babilong
from memlm.evaluation.tasks.base import ABSENT, Record

STORIES = """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Sandra moved to the garden.
6 Where is Daniel? \thallway\t4
1 Sandra travelled to the office.
2 Where is Sandra? \toffice\t1
"""
BOOK = "\n\n".join(
    " ".join(f"Mr. Reed counted {n} ships in verse {k}, and went home." for n in range(k, k + 9))
    for k in range(100, 400)
)


@pytest.fixture
def folder(tmp_path):
    """The three stories above as qa1, and a book that is all sentences."""
    (tmp_path / "book.txt").write_text(BOOK)
    (tmp_path / "qa1_single-supporting-fact_test.txt").write_text(STORIES)
    return tmp_path


@pytest.fixture
def make_task(make_tools, folder):
    def make(lengths, name="babilong_qa1", tokenizer=None, stories=folder, seed=0):
        options = BabilongOptions(stories=None if stories is None else str(stories))
        haystack = [str(folder / "book.txt")]
        config = {"lengths": lengths, "haystack": haystack, "babilong": options, "seed": seed}
        return Babilong(name, make_tools(config, tokenizer=tokenizer))

    return make


@pytest.fixture(scope="module")
def babi():
    """bAbI's own files."""
    if "MEMLM_DATA" not in os.environ:
        pytest.skip("MEMLM_DATA, the folder with babi/en-10k, is not set")
    return os.path.join(os.environ["MEMLM_DATA"], "babi", "en-10k")


def whole_text(task, trial) -> str:
    ids = trial.context.read(0, len(trial.context)).tolist()
    return task.tools.tokenizer.decode(ids + trial.questions[0].token_ids.tolist())


def body_of(text: str) -> str:
    return re.search(r"<context>\n?((?:(?!<context>).)*?)\n?</context>", text, re.DOTALL)[1]


def size_of(trial) -> int:
    question = trial.questions[0]
    return len(trial.context) + len(question.token_ids) + question.new_tokens


# Stories


def test_stories_of_a_file(folder) -> None:
    first, second, third = read_stories(find_stories(str(folder), 1))
    assert first == Story(
        ["Mary moved to the bathroom.", "John went to the hallway."],
        "Where is Mary?",
        "bathroom",
        [0],
    )
    # The earlier question is no fact, and the number of its line is none of the facts' places.
    assert second.facts[2:] == ["Daniel went back to the hallway.", "Sandra moved to the garden."]
    assert second.supporting == [2]
    assert third.facts == ["Sandra travelled to the office."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Mary moved.\n", "line 1: starts with 'Mary'"),
        ("1 Mary moved.\n3 John moved.\n", "line 2: is numbered 3; valid are 2, and 1"),
        ("1 Mary moved.\n2 Where is Mary? office 1\n", "holds no question"),
        ("1 Mary moved.\n2 Where is Mary?\n", "line 2: neither a fact nor a question"),
        ("1 Mary moved.\n2 Where is Mary?\toffice\n", "line 2: a question needs an answer"),
        ("1 Mary moved.\n2 Where is Mary?\t\t1\n", "line 2: a question needs an answer"),
        ("1 Mary moved.\n2 Where is Mary?\toffice\t \n", "line 2: a question needs an answer"),
        ("1 Mary moved.\n2 Where is Mary?\toffice\t2\n", "fact '2' is no earlier fact"),
        ("1 Where is Mary?\toffice\t1\n", "line 1: a question before the first fact"),
        ("1 Mary moved.\n2 Where is Mary?\tcellar\t1\n", "the answer 'cellar' to 'Where is Mary?'"),
        ("1 Mary moved.\n", "holds no question"),
        ("", "holds no question"),
    ],
)
def test_what_is_no_story(folder, make_task, text: str, message: str) -> None:
    (folder / "qa1_single-supporting-fact_test.txt").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        make_task([2048])
    assert "\n" not in str(error.value)


def test_missing_files(folder, make_task) -> None:
    with pytest.raises(UserError, match=r"0 files are named qa2_\*_test.txt"):
        make_task([2048], "babilong_qa2")
    with pytest.raises(UserError, match="no such folder"):
        make_task([2048], stories=folder / "nothing")
    (folder / "qa1_again_test.txt").write_text(STORIES)
    with pytest.raises(UserError, match="2 files are named"):
        make_task([2048])
    (folder / "qa3_binary_test.txt").write_bytes(b"1 \xff\xfe")
    with pytest.raises(UserError, match="cannot be read as text"):
        make_task([2048], "babilong_qa3")


# Prompts


def test_prompts_are_word_for_word() -> None:
    texts = [prompt_start(n) + "CONTEXT" + prompt_end("Where is Mary?") for n in range(1, 21)]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    assert digest == "af9cbe985fb4051db37f765f93dfd1daef2245d45411c66bdb6cb78076f1cff5"


def test_a_prompt_in_bytes(make_task) -> None:
    task = make_task([2048])
    for index in range(12):
        trial = task.trial(2048, index)
        text = whole_text(task, trial)
        story = task.stories[index % 3]
        assert size_of(trial) == 2048
        assert text.startswith(prompt_start(1))
        assert text.endswith(prompt_end(story.question))
        body = body_of(text)
        assert body == body.lstrip()
        left = body
        for fact in story.facts:
            _, found, left = left.partition(fact)
            assert found
            # Whole sentences in front, and a space or a new paragraph behind.
            before = body[: len(body) - len(left) - len(fact)]
            assert re.fullmatch(r"|.*[.] ", before, re.DOTALL)
            assert not left or left[0].isspace()
        # Without the facts the text is one stretch of the book, cut off in its last sentence.
        for fact in story.facts:
            body = body.replace(f"{fact} ", "", 1) if body.startswith(fact) else body
            body = body.replace(f" {fact}", "", 1)
        assert body.strip() in BOOK
        assert body.startswith("Mr. Reed")
        supported = trial.excerpt
        assert story.facts[story.supporting[-1]] in supported


def test_a_reader_of_the_text_is_right(make_task) -> None:
    task = make_task([1500])
    for index in range(12):
        trial = task.trial(1500, index)
        body = body_of(whole_text(task, trial))
        who = re.search(r"Where is (\w+)\?$", whole_text(task, trial))[1]
        place = re.findall(rf"{who} (?:moved|went|travelled)(?: back)? to the (\w+)\.", body)[-1]
        question = trial.questions[0]
        assert task.score(question, f"\nAnswer: The most recent location of {who} is {place}.") == 1
        wrong = next(label for label in LABELS[1] if label != place)
        assert task.score(question, wrong) == 0
        assert task.score(question, "") == 0


def test_a_prompt_depends_on_seed_and_place_alone(make_task) -> None:
    task, again, other = make_task([2048]), make_task([2048]), make_task([2048], seed=1)
    prints = [task.trial(2048, index).fingerprint() for index in range(6)]
    assert [again.trial(2048, index).fingerprint() for index in reversed(range(6))] == prints[::-1]
    assert len(set(prints)) == 6
    assert other.trial(2048, 0).fingerprint() not in prints


def test_without_the_facts(make_task) -> None:
    task = make_task([2048])
    plain, absent = task.trial(2048, 4), task.trial(2048, 4, ABSENT)
    assert size_of(absent) == 2048
    assert absent.questions[0].references == plain.questions[0].references
    assert body_of(whole_text(task, absent)) in BOOK
    assert absent.labels == {"facts": 0}
    assert absent.excerpt == ""


def test_just_long_enough(make_task) -> None:
    with pytest.raises(UserError, match="babilong_qa1: lengths: 64 tokens are too short") as error:
        make_task([64])
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    with pytest.raises(UserError):
        make_task([least - 1])
    task = make_task([least, least + 1, least + 30, least + 70])
    # Only the shortest story fits, whatever the index, and it stands alone.
    for index in range(3):
        trial = task.trial(least, index)
        assert size_of(trial) == least
        assert body_of(whole_text(task, trial)) == "Sandra travelled to the office."
    assert task.tools._haystack is None
    for length in (least + 1, least + 30, least + 70):
        for index in range(20):
            trial = task.trial(length, index)
            assert size_of(trial) == length
            assert trial.questions[0].references[0] in body_of(whole_text(task, trial))


def test_depths(make_task) -> None:
    task = make_task([4096])
    labels = [task.trial(4096, index).labels for index in range(60)]
    assert {label["facts"] for label in labels} == {1, 2, 4}
    depths = {label["depth"] for label in labels}
    assert depths <= {n / 10 for n in range(11)}
    assert len(depths) > 7
    trial = task.trial(4096, 0)
    story = task.stories[0]
    body = body_of(whole_text(task, trial))
    start = body.index(story.facts[story.supporting[-1]]) - 1  # its space belongs to it
    assert trial.labels["distance"] == len(body) - start
    assert trial.labels["depth"] == round(start / len(body), 1)


@pytest.mark.parametrize("length", [1024, 4096, 16384])
def test_other_tokenizers(make_task, sentencepiece_tokenizer, length: int) -> None:
    task = make_task([length], tokenizer=sentencepiece_tokenizer)
    for index in range(6):
        trial = task.trial(length, index)
        assert size_of(trial) == length
        text = whole_text(task, trial)
        left = body_of(text)
        assert "\ufffd" not in left
        for fact in task.stories[index % 3].facts:
            _, found, left = left.partition(fact)
            assert found, text
            before = text[: text.rindex(fact + left)]
            assert re.search(r"(<context>|[.])\s+$", before)
    absent = task.trial(length, 0, ABSENT)
    assert size_of(absent) == length


def test_a_million_tokens(make_task) -> None:
    length = 1 << 20
    task = make_task(["1M"])
    started = time.process_time()
    trial = task.trial(length, 3)
    assert time.process_time() - started < 2
    assert size_of(trial) == length
    parts = [trial.context.read(start, start + 65536) for start in range(0, length, 65536)]
    ids = np.concatenate(parts)
    assert len(ids) == len(trial.context)
    text = ByteTokenizer().decode(ids.tolist())
    places = [text.index(fact) for fact in task.stories[0].facts]
    assert places == sorted(places)


def test_ends_of_sentences() -> None:
    text = 'He met Mr. Reed. "No!" said J. Smith. See e.g. this\n\nA title\n\nand more without end'
    ids = ByteTokenizer().encode_bytes(text.encode())
    sentences = Sentences(ByteTokenizer())

    def before(place: int) -> str:
        return text[: sentences.end_near(lambda a, b: ids[a:b], place, 0, len(text))]

    assert before(0) == ""
    assert before(1) == "He met Mr. Reed."
    assert before(17).endswith("J. Smith.")
    assert before(40).endswith("this")
    assert before(len(text)).endswith("A title")
    plain = ByteTokenizer().encode_bytes(b"some words\nand some")
    assert sentences.end_near(lambda a, b: plain[a:b], 3, 1, 19) == 1
    long = ByteTokenizer().encode_bytes(b"some words\n" * 2000)
    assert sentences.end_near(lambda a, b: long[a:b], 11003, 0, 22000) == 11010
    alone = ByteTokenizer().encode_bytes(b"x" * 20000)
    assert sentences.end_near(lambda a, b: alone[a:b], 10000, 0, 20000) == 10000


# Scores


@pytest.mark.parametrize(
    ("number", "question", "answer", "prediction", "right"),
    [
        (1, "Where is Mary?", "kitchen", " Kitchen. Or the garden.", True),
        (1, "Where is Mary?", "kitchen", "kitchen, bathroom, hallway", False),
        (1, "Where is Mary?", "kitchen", "kitchen\n<example>\ngarden", True),
        (1, "Where is Mary?", "kitchen", "kitchen\n\nQuestion: garden?", False),
        (1, "Where is Mary?", "garden", "with the gardener", False),
        (3, "Where was the milk before the office?", "garden", "before the office: garden", True),
        (5, "Who gave Fred the milk?", "Bill", "bill gave the milk to Fred", True),
        (6, "Is John here?", "no", "I do not know", False),
        (6, "Is John here?", "no", "No", True),
        (7, "How many objects is Mary carrying?", "none", "none", True),
        (7, "How many objects is Mary carrying?", "none", "none or one", False),
        (7, "How many objects is Mary carrying?", "one", "none", False),
        (5, "Who gave Jeff the milk?", "Bill", "Bill, said Alfred to Freddie", True),
        (15, "What is emily afraid of?", "cat", "Mice are afraid of cats.", True),
        (15, "What is emily afraid of?", "cat", "cattle", False),
        (8, "What is Mary carrying?", "apple,milk", "milk and apple", True),
        (8, "What is Mary carrying?", "apple,milk", "apple", False),
        (8, "What is Mary carrying?", "apple,milk", "apple, milk, football", False),
        (8, "What is Mary carrying?", "apple", "apple,milk", False),
        (19, "How do you go there?", "s,w", "s,w", True),
        (19, "How do you go there?", "s,w", "w,s", False),
        (19, "How do you go there?", "s,w", "n,s,w", True),
        (19, "How do you go there?", "s,w", "s,w,s", False),
    ],
)
def test_scores(number, question, answer, prediction, right) -> None:
    assert is_right(number, question, answer, prediction) is right


# All question types


@pytest.mark.parametrize("number", range(1, 21))
def test_files_of_babi(babi, make_task, number: int) -> None:
    task = make_task([4096], f"babilong_qa{number}", stories=babi)
    assert len(task.stories) == 1000
    labels = {label.lower() for label in LABELS[number]}
    for story in task.stories:
        assert is_right(number, story.question, story.answer, story.answer)
        assert not is_right(number, story.question, story.answer, ", ".join(LABELS[number]))
    for index in range(4):
        trial = task.trial(4096, index)
        story = task.fitting[4096][index]
        assert size_of(trial) == 4096
        left = body_of(whole_text(task, trial))
        for fact in story.facts:
            _, found, left = left.partition(fact)
            assert found
        question = trial.questions[0]
        assert task.score(question, f"\nAnswer: {story.answer}") == 1
        for label in labels - {story.answer.lower()}:
            assert task.score(question, label) == 0


@pytest.mark.parametrize("number", range(1, 21))
def test_stories_of_a_simulated_world(make_task, number: int) -> None:
    task = make_task([4096, 8192], f"babilong_qa{number}", stories=None)
    for index in range(3):
        trial, longer = task.trial(4096, index), task.trial(8192, index)
        assert size_of(trial) == 4096
        assert trial.labels["facts"] > 0
        question = trial.questions[0]
        assert task.score(question, question.references[0]) == 1
        assert task.score(question, ", ".join(LABELS[number])) == 0
        assert longer.fingerprint() != trial.fingerprint()


def test_a_world_without_short_stories(make_task, monkeypatch) -> None:
    def long_story(number: int, rng: np.random.Generator) -> Story:
        return Story(["Mary went to the office."] * 200, "Where is Mary?", "office", [199])

    monkeypatch.setattr(world, "make_story", long_story)
    with pytest.raises(UserError, match="too short for the prompt and the facts"):
        make_task([2048], stories=None)
    assert make_task([8192], stories=None).trial(8192, 0).labels["facts"] == 200


@pytest.mark.parametrize("number", [5, pytest.param(14, marks=pytest.mark.slow), 19])
def test_the_least_length_is_enough_for_all_trials(make_task, number: int) -> None:
    name = f"babilong_qa{number}"
    with pytest.raises(UserError, match="too short for the prompt and the facts") as error:
        make_task([64], name, stories=None)
    least = int(str(error.value).split()[-1])
    with pytest.raises(UserError, match=f"at least {least}$"):
        make_task([least - 1], name, stories=None)
    task = make_task([least], name, stories=None)
    assert all(size_of(task.trial(least, index)) == least for index in range(32))


def test_tokens_of_an_answer(make_task, sentencepiece_tokenizer) -> None:
    def tokens(number: int, tokenizer=None) -> int:
        return make_task(["8k"], f"babilong_qa{number}", tokenizer, None).new_tokens

    assert [tokens(number, sentencepiece_tokenizer) for number in (4, 8, 19)] == [20, 20, 20]
    # In bytes the format of qa3's answers alone takes more.
    assert tokens(4) == 20
    assert tokens(3) > len("\nAnswer: Before the bathroom the football was in the bathroom.")
    assert tokens(8) > len("\nAnswer: football, apple, milk")


def test_details(make_task) -> None:
    task = make_task([2048])
    records = [
        Record("2048", trial, condition, 1.0, [{"references": [place]}])
        for condition in ("on", "off")
        for trial, place in enumerate(["office", "garden", "office"])
    ]
    details = task.details(records)
    assert details["constant_answer"] == pytest.approx(2 / 3)
    assert details["stories"] == "qa1_single-supporting-fact_test.txt"
    assert task.title == "BABILong qa1: single supporting fact"
