import pytest

from recipes.stop_strings import StopStrings, before_stop

TEXT = "def f():\n    return 1\n\nclass A:\n    pass\n"


@pytest.mark.parametrize(
    ("stops", "expected", "met"),
    [
        (["\n\n"], "def f():\n    return 1", "\n\n"),
        (["class", "\n\nclass"], "def f():\n    return 1", "\n\nclass"),  # the one that begins first
        (["lass A:\n ", "pass"], "def f():\n    return 1\n\nc", "lass A:\n "),
        (["\n\n\n", "zebra"], TEXT, None),
        ([], TEXT, None),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_text_ends_at_the_first_stop_string_however_it_is_cut(stops, expected, met, size):
    stopped = StopStrings(stops)
    shown = "".join(stopped.push(TEXT[i : i + size]) for i in range(0, len(TEXT), size)) + stopped.flush()
    assert (shown, stopped.met) == (expected, met)
    assert before_stop(TEXT, stops) == (expected, met)


def test_only_what_may_begin_a_stop_string_is_held_back():
    stopped = StopStrings(["\n\n"])
    assert [stopped.push(piece) for piece in ("a\n", "b\n", "\nc", "d")] == ["a", "\nb", "", ""]
    assert stopped.met == "\n\n"
    open_end = StopStrings(["\n\n"])
    assert (open_end.push("a\n"), open_end.flush(), open_end.flush()) == ("a", "\n", "")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="at least one character"):
        StopStrings(["a", ""])
