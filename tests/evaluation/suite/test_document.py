import json

import pytest

from memlm.errors import UserError
from memlm.evaluation.suite.document import write_section
from tests.evaluation.suite.example_suite import cell, suite

PICTURE = b"\x89PNG of a test"


@pytest.fixture
def repository(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "docs").mkdir()
    return tmp_path


def write(path, table="| a |\n|---|\n| 1 |", preset="small", name="tiny"):
    results = suite([cell("attention", 8, {"4": 1.0})], kind="lengths")
    write_section(path, name, preset, results, table, PICTURE)
    return results


def test_a_section_is_appended_with_picture_and_numbers(repository):
    path = repository / "docs" / "results.md"
    path.write_text("# Results\n")
    results = write(path)
    assert (
        path.read_text()
        == """# Results

<!-- suite tiny small -->
## Tiny

Does it hold?

```
python -m memlm.evaluation.suite tiny --preset small
```

AMD EPYC, 2 cores. Versions: memlm 1.0, torch 2.13. Means over seeds, in brackets the lowest \
and the highest seed.

| a |
|---|
| 1 |

![Tiny](<../benchmarks/results/amd-epyc/suites/tiny-small.png>)
<!-- /suite tiny small -->
"""
    )
    folder = repository / "benchmarks" / "results" / "amd-epyc" / "suites"
    assert (folder / "tiny-small.png").read_bytes() == PICTURE
    assert json.loads((folder / "tiny-small.json").read_text()) == results


def test_a_section_is_replaced_and_the_rest_stays(repository):
    path = repository / "docs" / "results.md"
    before = b"# Results\r\n\r\nabove\r\n\r\n"
    path.write_bytes(before)
    write(path)
    write(path, preset="paper")
    after = b"\nbelow \\1 without an end"
    path.write_bytes(path.read_bytes() + after)
    first = path.read_bytes()
    write(path)
    assert path.read_bytes() == first
    write(path, table=r"\g<0> \1")
    text = path.read_bytes()
    assert text == first.replace(b"| a |\n|---|\n| 1 |", rb"\g<0> \1", 1)
    assert text.startswith(before) and text.endswith(after)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- suite tiny small -->",
        "<!-- /suite tiny small -->",
        "<!-- /suite tiny small --> <!-- suite tiny small -->",
        "<!-- suite tiny small --> <!-- /suite tiny small -->" * 2,
    ],
)
def test_markers_that_do_not_belong_together(repository, text):
    path = repository / "docs" / "results.md"
    path.write_text(text)
    with pytest.raises(UserError, match="mend them by hand"):
        write(path)
    assert path.read_text() == text
    assert not (repository / "benchmarks").exists()


def test_a_document_outside_a_repository_is_made(tmp_path):
    path = tmp_path / "report.md"
    write(path, preset=None)
    assert path.read_text().startswith("<!-- suite tiny -->\n")
    assert "(<benchmarks/results/amd-epyc/suites/tiny.png>)" in path.read_text()
    assert (tmp_path / "benchmarks/results/amd-epyc/suites/tiny.png").exists()
