"""Texts in a terminal: nothing that it obeys is printed, and Chinese is two columns wide."""

import pytest

from m1local_app.columns import one_line, printable, shortened, table, width


def test_what_a_terminal_would_obey_is_replaced_and_the_rest_kept() -> None:
    obeyed = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    for code in {*obeyed} - {0x09, 0x0A}:
        assert printable(f"a{chr(code)}b") == "a\ufffdb", hex(code)
    kept = "高血压 naïve\tعربى\u200f 👩‍⚕️\n"
    assert printable(kept) == kept
    assert printable("a\r\nb\rc") == "a\nb\ufffdc"
    assert printable("\ud83d") == "\ufffd"
    assert one_line("  a\n\n b\t\u2028c\x00 ") == "a b c\ufffd"


def test_chinese_is_two_columns_wide() -> None:
    assert (width("血a"), width("")) == (3, 0)
    assert shortened("高血压", 6) == "高血压"
    assert shortened("高血压", 5) == "高血…"
    assert shortened("高血压", 4) == "高…"
    assert shortened("ab cd", 4) == "ab…"
    assert (shortened("ab", 1), shortened("ab", 0)) == ("…", "")
    for columns in range(12):
        assert width(shortened("a高b血c压d", columns)) <= columns


def test_a_table_is_aligned_by_columns_of_the_terminal() -> None:
    assert table([("血", "x"), ("abc", "y\nz")], heads=("N", "T")) == "N    T\n血   x\nabc  y z"
    assert table([]) == ""
    with pytest.raises(ValueError, match="argument"):
        table([("a", "b"), ("c",)])
