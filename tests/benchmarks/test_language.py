"""docs/language.md is what its measurements say."""

import json

from benchmarks import language
from tokred.demo.language import table


def test_the_page_is_what_was_measured():
    found = json.loads(language.FILE.read_text())
    page = language.PAGE.read_text()
    assert language.render(found) == page
    for row in table.recipes():
        assert (f"`{row.recipe}`" in page) == (row.key in found)


def test_a_row_that_was_not_measured_is_not_shown():
    found = json.loads(language.FILE.read_text())
    (gone, *_) = [row for row in table.recipes() if row.method == "norm"]
    del found[gone.key]
    assert f"`{gone.recipe}`" not in language.render(found)
