"""Stories with a question, as bAbI's files hold them (Weston et al., 2015, version 1.2)."""

from pathlib import Path

from memlm.data.stories.story import Story
from memlm.errors import UserError


def find_stories(folder: str, number: int) -> Path:
    """The file of a question type: qa1_single-supporting-fact_test.txt in bAbI's folders.

    Args:
        folder: such as tasks_1-20_v1-2/en-10k.
        number: of the question type, 1 to 20.

    Raises:
        UserError: for a missing folder, or one without exactly one such file.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(
            f"babilong.stories: {folder}: no such folder; give one with bAbI's files, such as "
            "tasks_1-20_v1-2/en-10k"
        )
    found = sorted(path.glob(f"qa{number}_*_test.txt"))
    if len(found) != 1:
        names = f" ({', '.join(one.name for one in found)})" if found else ""
        raise UserError(
            f"babilong.stories: {folder}: {len(found)} files are named "
            f"qa{number}_*_test.txt{names}; exactly one is needed"
        )
    return found[0]


def read_stories(path: Path) -> list[Story]:
    """All questions of a bAbI file, each with the facts that stand before it in its story.

    Earlier questions of the same story are left out, as BABILong does.

    Raises:
        UserError: for a file that cannot be read, a line that is not bAbI's, or no question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"babilong.stories: {path}: cannot be read as text ({error})") from None
    stories: list[Story] = []
    facts: dict[int, str] = {}  # by their line number in the story
    expected = 1
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"babilong.stories: {path}, line {place}"
        first, _, rest = line.partition(" ")
        if not (first.isascii() and first.isdigit()):
            raise UserError(f"{where}: starts with {first[:20]!r}, not with a number and a space")
        number = int(first)
        if number == 1:
            facts, expected = {}, 1
        if number != expected:
            raise UserError(
                f"{where}: is numbered {number}; valid are {expected}, and 1 for a new story"
            )
        expected += 1
        text, *answer = [field.strip() for field in rest.split("\t")]
        if answer:
            stories.append(_story(where, facts, text, answer))
        elif not text or text.endswith("?"):
            raise UserError(f"{where}: neither a fact nor a question, a tab and the answer")
        else:
            facts[number] = text
    if not stories:
        raise UserError(f"babilong.stories: {path}: holds no question")
    return stories


def _story(where: str, facts: dict[int, str], question: str, answer: list[str]) -> Story:
    """The story of a question line; `answer` holds the answer and the supporting numbers."""
    if len(answer) != 2 or not question or not answer[0]:
        raise UserError(f"{where}: a question needs an answer and supporting facts, after tabs")
    if not facts:
        raise UserError(f"{where}: a question before the first fact of its story")
    numbers = list(facts)
    supporting = set()
    for number in answer[1].split():
        if not (number.isascii() and number.isdigit()) or int(number) not in facts:
            raise UserError(
                f"{where}: the supporting fact {number!r} is no earlier fact of the story"
            )
        supporting.add(numbers.index(int(number)))
    if not supporting:
        raise UserError(f"{where}: a question needs an answer and supporting facts, after tabs")
    return Story(list(facts.values()), question, answer[0], sorted(supporting))
