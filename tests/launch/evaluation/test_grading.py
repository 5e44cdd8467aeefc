import time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from helpers.programs import in_memory
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch.data.arithmetic import generate
from launch.evaluation.grading import extract_number, is_correct, reference_answer
from launch.evaluation.tasks import check_task, detect_task, options, right_option


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 12.", 12),
        ("The answer is 12.5.", 12.5),
        ("The answer is: $1,234.50 in all", 1234.5),
        ("The answer is -3", -3),
        ("The answer is \u22123", -3),
        ("The answer is -$3.", -3),
        ("The answer is 4. No, the answer is 5. Wait, 6", 5),
        ("so 3 + 4 = 7", 7),
        ("the range is 3-4", 4),
        ("The answer is 10 - 4 = 6.", 6),
        ("The answer is 6.\nThe next one: 3 + 4 = 7", 6),
        ("The answer is 10 / 3 \u2248 3.25", 3.25),
        ("The answer is:\n\n5", 5),
        ("The answer is **5**.", 5),
        ("**The answer is:** 5", 5),
        ("Answer: 7 (of 9)", 7),
        ("2 + 2 makes 4\n#### 4", 4),
        ("#### Sums of 3\nThe answer is 5", 5),
        (r"So $\boxed{1{,}234}$ of 9", 1234),
        (r"The answer is \boxed{\frac{1}{2}}.", 0.5),
        ("The answer is 1/4", 0.25),
        ("The answer is 1 1/2 cups", 1.5),
        ("The answer is .5", 0.5),
        ("The answer is 1e5", 100000),
        ("The answer is 1.5 \u00d7 10^5", 150000),
        ("The answer is 1\u202f234\u202f567", 1234567),
        ("The answer is 12,34,567", 1234567),
        ("In 2020,300 came", 300),
        ("The answer is 60%.", 60),
        ("\u7b54\u6848\u662f5", 5),
        ("the correct answer is answer3", None),
        ("The answer is 10 - 4", None),
        ("The answer is 5 or 6", None),
        ("The answer is 3,5", None),
        ("The answer is not 5", None),
        ("The answer is 5 and 6", None),
        ("The answer is 3:30", None),
        ("The answer is 1.2.3", None),
        (r"\boxed{2\sqrt{3}}", None),
        (r"\boxed{2^{10}}", None),
        ("The answer is 1e999999999", None),
        ("The answer is 1/0", None),
        ("The answer is unknown", None),
        ("nothing", None),
    ],
)
def test_extract_number(text: str, number: float | None) -> None:
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("The answer is 30.", "30.0", True),
        ("The answer is 30.0", "30", True),
        ("The answer is 30.", "31", False),
        ("The answer is 30.0001", "30", False),
        ("The answer is 9.8.", "9.8", True),
        ("The answer is 1000000001.", "1000000002", False),
        ("The answer is 12345678.", "12345679", False),
        ("The answer is 1,000,000,001.", "1000000001", True),
        ("The answer is " + "9" * 5000, "9" * 5000, True),
        ("The answer is " + "9" * 5000, "9" * 4999 + "8", False),
        ("The answer is 0.0004", "0.0009", False),
        ("The answer is 0.", "0.0005", False),
        ("The answer is 0.667", "0.66667", True),
        ("The answer is 0.67", "0.66667", False),
        ("The answer is 1234567.81", "1234567.82", True),
        ("The answer is 1.5e-9", "2.5e-9", False),
        ("The answer is 4", "$4.00", True),
        ("The answer is 60%", "60", True),
        ("The answer is 60", "60%", True),
        ("The answer is 60%", "0.6", False),
        ("The answer is 4.", "**4**", True),
        ("no number", "3", False),
        # words are compared whole
        ("the correct answer is answer3", "answer3", True),
        ("the correct answer is answer2.", "answer3", False),
        ("The answer is True.", "true", True),
        ("", "true", False),
        ("The answer is New York.", "New York", True),
        ("The answer is  new\tyork!", "New York", True),
        ("New York", "New York", True),
        ("The answer is New York.", "New", False),
        ("The answer is New.", "New York", False),
        ("The answer is Paris, France.", "Paris", False),
        ("The answer is St. Louis.", "St. Louis", True),
        ("\u6771\u4eac\u3002", "\u6771\u4eac", True),
        ("The answer is \u6771\u4eac\u3002\u5927\u304d\u3044\u3002", "\u6771\u4eac", True),
        ("The answer is U.S.A.", "U.S.A.", True),
        ('The answer is "C++".', "C++", True),
        ("The answer is 3:30.", "3:30", True),
        ("The answer is 5 apples.", "5 apples", True),
        ("The answer is 5.", "5 apples", False),
        ("The answer is not B.", "B", False),
        ("Not B", "B", False),
        ("The answer is A or B.", "A", False),
        ("The answer is (A) or (B).", "A", False),
        ("The answer is A, B", "A", False),
        ("The answer is B because iron rusts.", "B", True),
        ("The answer is true, it is so.", "true", True),
        ("The answer is B (iron)", "B", True),
        ("The answer is (B) iron.", "iron", True),
        ("The answer is (B) iron.", "gold", False),
        ("The answer is option A or B.", "A", False),
        ("The answer is option A.", "Option A", True),
        (r"$\boxed{\text{New York}}$", "New York", True),
    ],
)
def test_numbers_are_compared_by_value_and_words_whole(text: str, reference: str, right: bool) -> None:
    assert is_correct(text, reference) is right


NAMES = [
    ("J. K. Rowling", "J. K. Tolkien"),
    ("Robert E. Lee", "Robert E. Grant"),
    ("George W. Bush", "George W. Bish"),
    ("U.S. Army", "U.S. Navy"),
    ("Yahoo! Inc.", "Yahoo! Mail"),
    ("No. 5", "No. 6"),
    ("Star Wars: A New Hope", "Star Wars"),
    ("Apple Inc. and Google", "Apple Inc."),
    ("Dr. No", "Dr. Yes"),
    ("\u6771\u4eac", "\u4eac\u90fd"),
]


@pytest.mark.parametrize(("name", "other"), NAMES)
def test_a_name_with_full_stops_is_one_answer(name: str, other: str) -> None:
    for said in ("{}", "{}.", "The answer is {}.", "The answer is {} because it is so.", "Answer: {}"):
        assert is_correct(said.format(name), name)
        assert not is_correct(said.format(other), name)
        assert not is_correct(said.format(name.split()[0]), name) or " " not in name


def test_a_text_without_an_end_is_graded_in_no_time() -> None:
    start = time.process_time()
    for text in ("a. ", "A. ", "x: "):
        assert not is_correct(text * 40_000, "B")
    assert time.process_time() - start < 6  # looking at every piece takes far longer


CHOICES = ["B", "(B)", "B)", "**B**", "**(B)**", "`B`", "b", r"\boxed{B}", r"$\text{B}$"]
CHOICES += ["B) iron", "(B) iron", "B. iron", "B: iron", "option B", "choice (B): iron"]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_may_be_decorated(choice: str) -> None:
    for said in ("The answer is {}", "The answer is: {}.", "{}", "{}.", "Answer: {}", "So it is.\n#### {}"):
        text = said.format(choice)
        assert is_correct(text, "B")
        assert is_correct(text, "(B)")
        assert not is_correct(text, "A")


NUMBERS = st.one_of(
    st.integers(-(10**40), 10**40).map(str),
    st.integers(-(10**12), 10**12).map("{:,}".format),
    st.decimals(-(10**9), 10**9, places=6).map(str),
    st.decimals(0, 1, places=12).map(lambda value: f"{value:f}"),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.fractions(-100, 100, max_denominator=99).map(str),
)
STATING = ["The answer is {}.", "The answer is: {}", r"So it is $\boxed{{{}}}$.", "It is.\n#### {}"]
OTHERS = ["The answer is {}", "The answer is **{}**.", r"So it is \boxed{{{}}}.", "It is 7.\n#### {}", "Answer: {}"]
OTHERS += ["So it is {}"]
NUMERIC = ["3 + 4 = 7. The answer is ${}.", "The answer is {} apples, of 9.", "The answer is 10 - 4 = {}."]
PHRASES = st.sampled_from([STATING[0], *OTHERS, *NUMERIC])


def value_of(number: str) -> Fraction:
    top, _, bottom = number.replace(",", "").partition("/")
    return Fraction(Decimal(top)) / Fraction(Decimal(bottom or 1))


@settings(max_examples=500, deadline=None)
@given(NUMBERS, PHRASES)
def test_a_reference_from_a_rows_own_output_grades_it_as_right(number: str, phrase: str) -> None:
    output = phrase.format(number)
    reference = reference_answer({"instruction": "q", "output": output})
    assert reference is not None
    assert extract_number(output) == value_of(number)
    assert value_of(reference) == value_of(number)
    assert is_correct(output, reference)
    assert is_correct(output, number)
    if value_of(number).denominator == 1:
        assert not is_correct(output, str(int(value_of(number)) + 1))


PIECES = [
    *NAMES,
    ("3:30", "3:45"),
    ("3 p.m.", "3 a.m."),
    ("(3, 4)", "(3, 5)"),
    ("12 and 15", "12 and 16"),
    ("5 apples and 3 pears", "5 apples and 2 pears"),
    ("1.2.3", "1.2.4"),
    ("x=2, y=3", "x=1, y=3"),
    ("5x", "5y"),
    ("10 - x", "10 - y"),
    (r"x \le 5", "x = 5"),
    (r"2\sqrt{3}", r"2\sqrt{5}"),
    (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt{5}}{2}"),
    (r"3\pi", "3"),
    ("2^{10}", "2^{11}"),
]


@pytest.mark.parametrize(("answer", "other"), PIECES)
def test_a_reference_is_no_piece_of_what_an_output_states(answer: str, other: str) -> None:
    for phrase in STATING + OTHERS:
        reference = reference_answer({"instruction": "q", "output": phrase.format(answer)})
        assert reference is not None or phrase in OTHERS
        assert reference is None or is_correct(phrase.format(answer), reference)
        assert reference is None or not is_correct(phrase.format(other), reference)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=30), PHRASES)
@example("\x0c", "The answer is **{}**.")
@example("\xa0", "The answer is **{}**.")
@example("\x85", "The answer is **{}**.")
def test_whatever_a_row_says_its_own_reference_grades_it_as_right(answer: str, phrase: str) -> None:
    output = phrase.format(answer)
    reference = reference_answer({"instruction": "q", "output": output})
    assert reference is None or is_correct(output, reference)


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"output": "It is so. The answer is 7."}, "7"),
        ({"output": "The answer is 1234567."}, "1234567"),
        ({"output": "So it is 12345678"}, "12345678"),
        ({"output": "The answer is New York."}, "New York"),
        ({"output": "The answer is that people like what they know and have."}, None),
        ({"output": "Prose."}, None),
        ({"output": "The answer is **\x0c**."}, None),
        ({"output": "The answer is no. There are 5 planets."}, "no"),
        ({"output": "The answer is as follows: 5"}, "5"),
        ({"output": "The answer is:\n$$\n5\n$$"}, "5"),
        ({"output": "The answer is x = 5."}, "5"),
        ({"output": "The answer is 5 cm."}, "5"),
        ({"output": r"\boxed{90^\circ}"}, "90"),
        ({"output": r"\boxed{5\text{ cm}^2}"}, "5"),
        ({"output": "The answer is B because iron rusts."}, "B"),
        ({"output": "The answer is B. It is wet."}, "B"),
        ({"output": "The answer is vitamin C. It is good."}, "vitamin C"),
        ({"output": "We looked for it and found it at last at 3:30"}, None),
        ({"output": "She took 3 of the 9 apples and then ate 7"}, "7"),
        ({"output": "7", "answer": 10**15 + 1}, "1000000000000001"),
        ({"output": "7", "answer": 0}, "0"),
        ({"output": "7", "answer": ""}, "7"),
        ({"output": "7", "answer": "She sold 4 / 2 = <<4/2=2>>2 clips.\n#### 1,234"}, "1234"),
    ],
)
def test_reference(row: dict[str, Any], reference: str | None) -> None:
    assert reference_answer({"instruction": "q", **row}) == reference


def test_the_built_in_rows_keep_their_references_and_grades() -> None:
    for row in [*generate("train", 100), *generate("test", 100)]:
        without = {key: value for key, value in row.items() if key != "answer"}
        assert reference_answer(row) == reference_answer(without) == row["answer"]
        assert is_correct(row["output"], row["answer"])
        assert not is_correct(row["output"], str(int(row["answer"]) + 1))


ARC = {
    "instruction": "Choose: what is wet?\n\nAnswer1: fire Answer2: water\n\nAnswer format: answer1/answer2",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


def test_options() -> None:
    assert options(ARC) == ["answer1", "answer2"]
    assert options({**ARC, "choices": ["a", "b", "c"]}) == ["a", "b", "c"]
    assert options({"instruction": "What?"}) == []
    assert right_option(ARC) == 1
    assert right_option({**ARC, "choices": ["A", "B"], "answer": "(B)"}) == 1
    assert right_option({**ARC, "choices": ["b", "B"], "answer": "**B**"}) is None
    assert right_option({**ARC, "answer": "answer9"}) is None
    assert right_option({**ARC, "choices": ["A", "B"], "answer": "(B) gold."}) == 1
    assert right_option({**ARC, "choices": ["iron", "gold"], "answer": "(B) gold."}) == 1
    assert right_option({**ARC, "choices": ["iron", "gold"], "answer": "(B) silver."}) is None
    assert right_option({**ARC, "choices": ["A", "B"], "answer": "A or B"}) is None
    assert right_option({**ARC, "choices": ["B", "gold"], "answer": "(B) gold."}) is None


def test_auto_takes_the_task_that_all_rows_allow() -> None:
    plain = {key: value for key, value in ARC.items() if key != "answer"} | {"instruction": "What is wet?"}
    assert detect_task(in_memory([ARC])) == ("choice", "")
    assert detect_task(in_memory(generate("test", 2))) == ("exact", "")
    assert detect_task(in_memory([ARC, plain])) == ("exact", "")
    assert detect_task(in_memory([{"instruction": "q", "output": "7\n#### 7"}])) == ("exact", "")


ALPACA = [{"instruction": "Explain.", "output": "There are 3 reasons."}] + [
    {"instruction": "Explain.", "output": "It is a thing that people like."}
] * 3


def test_auto_takes_the_loss_for_prose_and_says_why() -> None:
    for rows in (ALPACA, ALPACA[:1], [{"text": "prose 3"}], [{"text": "The answer is 3."}]):
        assert detect_task(in_memory(rows)).task == "loss"
    mixture = generate("test", 5) + ALPACA
    assert detect_task(in_memory(mixture)) == (
        "loss",
        '5 of 9 rows have an `answer`, or an output that says "The answer is ..." (the first without: memory: row 5)',
    )


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("exact", ALPACA, "memory: row 1 has no `answer` to compare with"),
        ("exact", [{"text": "a", "answer": "3"}], "memory: row 0 is plain `text`"),
        (
            "choice",
            [ARC, {**ARC, "answer": "answer9"}],
            "memory: row 1 has no options with its answer 'answer9' among",
        ),
        ("choice", ALPACA, "memory: row 0 has no options"),
        ("choice", [{"text": "a", "answer": "a", "choices": ["a", "b"]}], "memory: row 0 is plain `text`"),
    ],
)
def test_rows_that_a_task_cannot_measure_are_named(task: str, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_task(task, in_memory(rows))
    check_task("loss", in_memory(rows))
