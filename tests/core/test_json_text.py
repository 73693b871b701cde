"JSON and texts that anyone may have written."

import pytest

from dr2seg_lib.core.json_text import (
    MAX_DEPTH,
    decode_text,
    json_depth,
    load_json,
    parse_json_text,
    parse_strict_json,
)
from dr2seg_lib.core.plain_text import blank_unprintable, escape_unprintable, shorten_line


@pytest.mark.parametrize(
    "data, problem",
    [
        (b"", "is not valid JSON"),
        (b'{"a": ', "is not valid JSON"),
        (b"\xff", "is not UTF-8"),
        (b"[" * 10**5, "is nested too deeply"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "is nested too deeply"),
    ],
)
def test_what_is_no_record_is_said_in_a_few_words(data, problem):
    with pytest.raises(ValueError, match=f"^{problem}$"):
        parse_strict_json(data)


def test_the_deepest_record_is_read():
    value = parse_strict_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert json_depth(value) == MAX_DEPTH


@pytest.mark.parametrize("digits", ["NaN", "-Infinity", "1e999", "1" + "0" * 400])
def test_numbers_are_finite_or_none(digits):
    assert parse_json_text(digits) is None


def test_numbers_stay_where_they_are_checked_anyway():
    assert parse_json_text("[1e999, 2]", finite=False) == [float("inf"), 2]


def test_a_key_that_is_there_twice_is_refused():
    with pytest.raises(ValueError) as error:
        parse_json_text('{"id": 1, "id": 2}', unique_keys=True)
    assert "'id' is there twice" in str(error.value.__cause__)


def test_encodings_are_tried_in_turn():
    assert decode_text("café".encode("cp1252"), ("utf-8", "cp1252")) == "café"


def test_half_of_a_character_is_a_question_mark():
    assert parse_strict_json(b'{"a\\ud83d": ["\\ude00"]}') == {"a?": ["?"]}


@pytest.mark.parametrize("text", [None, "", "no JSON", "[" * 10**5, "9" * 5000])
def test_an_answer_that_says_nothing_is_none(text):
    assert load_json(text) is None


def test_what_cannot_be_printed_is_replaced():
    text = "a\x1b[2J\nb"
    assert blank_unprintable(text) == "a [2J b"
    assert escape_unprintable(text) == r"a\x1b[2J\nb"


def test_a_line_is_cut_and_escaped():
    assert shorten_line("a \n b\x00c" + "d" * 99, 6) == r"a b\x00cd…"
