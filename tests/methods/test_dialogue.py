"Dialogue: prompts byte for byte, parsing of good, broken and hostile text."

import json
import re
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dr2seg_lib.core.json_text import load_json
from dr2seg_lib.data.records import normalize_question
from dr2seg_lib.data.samples import Target
from dr2seg_lib.methods.dr2seg import DR2SEG_TEMPLATE, dr2seg_prompt
from dr2seg_lib.methods.visionreasoner import (
    EXAMPLE,
    VISIONREASONER_TEMPLATE,
    visionreasoner_prompt,
)
from dr2seg_lib.models.chat import SYSTEM, chat_messages
from dr2seg_lib.rollouts.parsing import (
    Parsed,
    format_answer,
    format_response,
    parse_answer,
    parse_response,
    parse_targets,
    parsed_record,
    reasoning_text,
    recorded_parse,
)

targets = st.lists(
    st.tuples(st.tuples(*[st.integers(0, 999)] * 4), st.tuples(*[st.integers(0, 999)] * 2)).map(
        lambda t: Target(*t)
    ),
    max_size=4,
)
soup = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<description>",
            "</description>",
            "<answer>",
            "</answer>",
            " ",
            "\n",
            "a",
            "[]",
            "{",
            ".",
        ]
    )
    | st.text(max_size=5),
    max_size=20,
).map("".join)
ITEM = '{"bbox_2d": [1,2,3,4], "point_2d": [2,3]}'


# prompts


def test_vision_reasoner_byte_for_byte():
    assert visionreasoner_prompt("The Umbrella.") == (
        'Please find "the umbrella" with bboxs and points.Compare the difference between object(s) '
        "and find the most closely matched object(s).Output the thinking process in "
        "<think> </think> and final answer in <answer> </answer> tags.Output the bbox(es) and "
        "point(s) inside the interested object(s) in JSON format.i.e., "
        "<think> thinking process here </think><answer>"
        '[{"bbox_2d": [10,100,200,210], "point_2d": [30,110]}, '
        '{"bbox_2d": [225,296,706,786], "point_2d": [302,410]}]</answer>'
    )


def test_dr2seg_differs_only_in_the_tags():
    ours, theirs = dr2seg_prompt("x"), visionreasoner_prompt("x")
    assert ours.split("Output the thinking")[0] == theirs.split("Output the thinking")[0]
    assert ours.endswith(f"<answer>{EXAMPLE}</answer>")
    assert theirs.endswith(f"<answer>{EXAMPLE}</answer>")
    assert "in <description> </description>" in ours
    assert "description" not in theirs
    assert (
        parse_response(ours[ours.index("i.e., ") :]).description
        == "description of the target object(s) here"
    )
    assert re.findall(r"<(\w+)>", ours[ours.index("i.e., ") :]) == [
        "think",
        "description",
        "answer",
    ]


@pytest.mark.parametrize(
    "template, prompt",
    [(VISIONREASONER_TEMPLATE, visionreasoner_prompt), (DR2SEG_TEMPLATE, dr2seg_prompt)],
)
def test_head_and_tail_stand_around_the_question(template, prompt):
    head, tail = template
    assert prompt("a cup") == head + "a cup" + tail


@pytest.mark.parametrize(
    "query, training, evaluation",
    [
        ("The Cup.", "the cup", "the cup"),
        ("Which one?", "which one?", "which one"),
        ('What is "it"?!.', 'what is "it"?!', 'what is "it'),
        ("Dr. No", "dr. no", "dr. no"),
        ('"Quoted"', '"quoted"', "quoted"),
        ("...so?", "so?", "so"),
        ("", "", ""),
        ("{0} % \\1", "{0} % \\1", "{0} % \\1"),
    ],
)
def test_question(query, training, evaluation):
    assert normalize_question(query) == training
    assert normalize_question(query, eval=True) == evaluation
    assert f'"{evaluation}" with bboxs' in dr2seg_prompt(query, eval=True)


def test_chat_puts_the_image_first():
    system, user = chat_messages("hello")
    assert system == {"role": "system", "content": SYSTEM}
    assert SYSTEM == "You are a helpful assistant."
    assert user["role"] == "user"
    assert user["content"] == [
        {"type": "image"},
        {"type": "text", "text": "hello"},
    ]


# parsing


@pytest.mark.parametrize(
    "text, want",
    [
        ("<think>a</think><description>b</description><answer>c</answer>", ("a", "b", "c")),
        ("<think>a</think><answer>c</answer>", ("a", None, "c")),
        (
            "<answer>c</answer><think>a</think>",
            ("a", None, "c"),
        ),  # order is the format reward's business
        (
            "<think>a\n\nb</think>\n<answer>\n [] \n</answer>\n",
            ("a\n\nb", None, "[]"),
        ),  # dot matches line breaks
        ("<think>1</think><think>2</think><answer>3</answer><answer>4</answer>", ("1", None, "3")),
        (
            "<think>a<think>b</think>c</think>",
            ("a<think>b", None, None),
        ),  # first opening to first closing
        ("</think><think>a</think>", ("a", None, None)),
        ("<think>never closed <answer>[]</answer>", (None, None, "[]")),
        ("<think>a</think><answer>[", ("a", None, None)),
        ("<think></think><description></description><answer></answer>", ("", None, "")),
        ("<description> \n </description>", (None, None, None)),
        ("<Think>a</Think>", (None, None, None)),
        ("", (None, None, None)),
    ],
)
def test_parse(text, want):
    assert parse_response(text) == Parsed(*want)


@given(soup | st.text())
def test_parse_is_the_lazy_regular_expression(text):
    def first(tag):
        found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return found and found.group(1)

    d, a = first("description"), first("answer")
    parsed = parse_response(text)
    assert parsed.think == first("think")
    assert parsed.description == ((d and d.strip()) or None)
    assert parsed.answer == (a if a is None else a.strip())


@pytest.mark.parametrize(
    "text, want",
    [
        ("<think>a b</think>c", "a b"),
        ("<think></think>c", ""),
        ("no tag", "no tag"),
        ("<think>open", "<think>open"),
    ],
)
def test_reasoning_is_the_think_block_or_everything(text, want):
    assert reasoning_text(text) == want


# answers


def test_parse_answer_reads_the_example():
    a, b = parse_answer(EXAMPLE)
    assert (a.box, a.point, a.mask) == ((10, 100, 200, 210), (30, 110), None)
    assert (
        b.box,
        b.point,
    ) == ((225, 296, 706, 786), (302, 410))


def test_floats_further_keys_and_white_space_are_fine():
    (one,) = parse_answer(
        ' [ {"label": {"x": [1]}, "point_2d":[2.5, 3e0],\n"bbox_2d":[1.0,2,3,4]} ] '
    )
    assert one.box == (1.0, 2, 3, 4)
    assert one.point == (2.5, 3.0)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "null",
        "7",
        '"bbox_2d"',
        "{}",
        ITEM,
        "[" + ITEM,
        f"[{ITEM}] and more",
        f"[{ITEM},]",
        f"[{ITEM}, 7]",
        f"[{ITEM}, []]",
        f"[{ITEM}, null]",
        '[{"bbox_2d": [1,2,3,4]}]',
        '[{"point_2d": [2,3]}]',
        '[{"bbox_2d": [1,2,3], "point_2d": [2,3]}]',
        '[{"bbox_2d": [1,2,3,4], "point_2d": [2]}]',
        '[{"bbox_2d": [1,2,3,4,5], "point_2d": [2,3]}]',
        '[{"bbox_2d": "1234", "point_2d": "23"}]',
        '[{"bbox_2d": {"0":1}, "point_2d": [2,3]}]',
        f'[{ITEM}, {{"bbox_2d": ["1","2","3","4"], "point_2d": [2,3]}}]',
    ],
)
def test_malformed_answers_are_empty(text):
    assert parse_answer(text) == []
    assert parse_targets(load_json(text)) is None


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "1e9",
        "true",
        "false",
        "null",
        '"4"',
        "[4]",
        "{}",
        "9" * 400,
        "-" + "9" * 400,
        "9" * 5000,
        "1e308",
    ],
)
def test_numbers_that_are_no_coordinates(value):
    assert parse_answer(f'[{{"bbox_2d": [1,2,3,{value}], "point_2d": [2,3]}}]') == []
    assert parse_answer(f'[{ITEM}, {{"bbox_2d": [1,2,3,4], "point_2d": [2,{value}]}}]') == []


def test_an_empty_list_is_an_answer():
    assert parse_targets(load_json("[]")) == []
    assert parse_answer("[]") == []


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 100_000,
        "[[[[" * 1000 + "]]]]" * 1000,
        '"' + "x" * 2_000_000,
        f"[{', '.join([ITEM] * 20_000)}]",
        "[" + "9" * 1_000_000 + "]",
        " " * 2_000_000,
        "\\u0000" * 100_000,
        '"\\ud800"',
        "\x00",
        "[1e" + "9" * 100_000 + "]",
    ],
)
def test_hostile_answers_neither_raise_nor_hang(text):
    start = process_time()
    (
        parse_answer(text),
        parse_response(f"<answer>{text}</answer>"),
        parse_response("<answer>" * 1000 + text),
    )
    assert process_time() - start < 5


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "<", "<answer>" + " " * 100, "<think></answer>"]
)
def test_long_tag_soup_is_linear(piece):
    start = process_time()
    parse_response(piece * 100_000)
    assert process_time() - start < 2


@given(st.text() | soup)
def test_any_text_is_survived(text):
    assert isinstance(parse_response(text), Parsed)
    assert isinstance(parse_answer(text), list)
    assert isinstance(reasoning_text(text), str)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["bbox_2d", "point_2d", "x"]), inner, max_size=3)
        ),
    )
)
def test_any_json_is_survived(data):
    assert all(
        isinstance(t, Target) and len(t.box) == 4 and len(t.point) == 2
        for t in parse_answer(json.dumps(data))
    )


@given(targets, st.booleans())
def test_what_a_row_keeps_is_what_was_parsed(targets, captioned):
    text = format_response("so.", "the cup", targets) + "<caption>a cup</caption>" * captioned
    parsed = parse_response(text)
    row = json.loads(json.dumps(dict(text=text, parsed=parsed_record(parsed))))
    again = recorded_parse(row)
    assert again == parsed
    assert [(t.box, t.point) for t in again.objects] == [(t.box, t.point) for t in targets]


def test_a_malformed_answer_is_none_in_its_row_and_an_empty_one_is_not():
    assert parsed_record(parse_response("<answer>[7]</answer>"))["objects"] is None
    assert parsed_record(parse_response("<answer>[]</answer>"))["objects"] == []


def test_two_points_of_an_object_are_kept():
    text = '<answer>{"bbox": [1,2,3,4], "points_1": [2,3], "points_2": [3,4]}</answer>'
    parsed = parse_response(text)
    assert parsed.listed is None
    (target,) = recorded_parse(dict(text=text, parsed=parsed_record(parsed))).objects
    assert target.second == (3, 4)


def test_an_older_row_is_parsed_from_its_text():
    row = dict(text=format_response("so.", "the cup", []))
    assert recorded_parse(row) == parse_response(row["text"])


# writing


def test_format_answer_bytes():
    targets = [Target((10, 100, 200, 210), (30, 110)), Target((225, 296, 706, 786), (302, 410))]
    assert format_answer(targets) == EXAMPLE
    assert format_answer([]) == "[]"


words = st.text("abc .,\n", max_size=30)


@given(words, st.none() | words.filter(str.strip), targets)
def test_written_and_read_again(think, description, targets):
    text = format_response(think, description, targets)
    parsed = parse_response(text)
    assert parsed.think == think
    assert parsed.description == (description and description.strip())
    assert [(t.box, t.point) for t in parse_answer(parsed.answer)] == [
        (t.box, t.point) for t in targets
    ]
