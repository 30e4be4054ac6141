"""Markdown tables: whatever a name holds, it stays in its cell."""

import re

from hypothesis import given
from hypothesis import strategies as st

from fractal.base.errors import printable
from fractal.base.table import table


@given(st.lists(st.lists(st.text(max_size=20), min_size=3, max_size=3), min_size=1, max_size=4))
def test_a_name_stays_in_its_cell(cells: list[list[str]]):
    lines = table(["<b>", "|", "n"], cells).split("\n")
    assert len(lines) == len(cells) + 2
    for line in lines:
        assert line.isprintable()
        bare = re.sub(r"\\.", "", line)  # without what is escaped
        assert bare.count("|") == 4
        assert "<" not in bare


def test_hostile_names_by_hand():
    shown = table(["Type", "Cells"], [["<script>alert(1)</script>", "1"], ["a|b\\", "2"], ["c\x1b[2J\nd", "3"]])
    assert shown.split("\n") == [
        "| Type                        | Cells |",
        "|-----------------------------|------:|",
        "| \\<script>alert(1)\\</script> |     1 |",
        "| a\\|b\\\\                      |     2 |",
        "| c\\x1b[2J\\nd                 |     3 |",
    ]
    assert printable("Größe, T cell α") == "Größe, T cell α"
