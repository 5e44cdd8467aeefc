"""Grade answers: what a row expects, what a text says, and whether the two agree.

[Note: Final answer] A text's final answer is what follows its last "answer is", "#### " (in its last line) or "\\boxed{"; without one of them, what
follows its last "answer:". It ends with its sentence or line. A text without any of these is read whole: its last number counts, or its first
sentence as words.

[Note: Numbers] An integer is equal to the same value only, at any size; 30 and 30.0 are one value. Other numbers may differ by rounding, see
`_same_number`. Thousands separators, currency signs and a percent sign do not count: $1,234.50 is 1234.5, and 60% is 60, not 0.6. Of
"10 - 4 = 6" the 6 counts. A sum that is not worked out ("10 - 4"), two numbers to choose from ("5 or 6") and a decimal comma have no value.

[Note: Words] A reference that is not a number ("New York", "B", "5 apples") is compared as text, without regard to case, white space, and
punctuation or markup around it. The whole answer must be the reference: "New" is not "New York", and "A or B" is not "A". Three things may
come with it: an explanation ("B because ..."), a bracket after it ("B (iron)"), and the text of a lettered option ("(B) iron", which is both B and iron).
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from launch.rows import Rows
from launch.template import Row, conversation

_MARK = re.compile(
    r"\banswer\s+is\b(?:\s*:)?|^####(?!#)(?=[^\n]*\S[^\n]*\s*\Z)|\\boxed\s*\{", re.IGNORECASE | re.MULTILINE
)
_WEAK_MARK = re.compile(r"\banswer\s*:", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<!\b(?:St|Dr|Mr|Ms|Mt|Ft|Jr|Sr|vs))[.!?;:](?=[\s*_\"')\]]|$)|\n")
_OPTIONS = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)")

_DIGITS = r"\d{1,3}(?P<by>[,_'\u2019\u00a0\u202f\u2009])\d{2,3}(?:(?P=by)\d{2,3})*(?<=\d{3})(?!\d)|\d+"
_TOKEN = re.compile(
    r"(?P<sign>(?<![A-Za-z_\d)\]%])[-+])?(?<![A-Za-z_\d])"
    r"(?:(?P<whole>\d+) )??(?P<top>\d+)/(?P<bottom>\d+)(?![\d/])"
    r"|(?P<sign2>(?<![A-Za-z_\d)\]%])[-+])?(?<![A-Za-z_\d])"
    rf"(?:(?P<digits>{_DIGITS})(?P<rest>(?:\.\d+)?)|(?<!\.)(?P<bare>\.\d+))(?P<power>(?:[eE][-+]?\d{{1,4}}(?![A-Za-z_\d]))?)"
)
# What makes a number a part of something that has no value yet.
_GOES_ON = re.compile(r"\s*(?:[-+*/^\u00d7\u00f7]|or\b)\s*\(?[-+]?\.?\d|,\d|e[-+]?\d", re.IGNORECASE)

_MINUS = str.maketrans(dict.fromkeys("\u2212\ufe63\uff0d\u2013", "-"))
_LATEX = [
    (re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r" \1/\2"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[()\[\]]|\\[,!; ]"), " "),
    (re.compile(r"\\times"), "\u00d7"),
]
_CURRENCY = re.compile(r"([-+]?)[$\u20ac\u00a3\u00a5]\s?(?=[-+]?\.?\d)")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[\u00d7*]\s*10\s*(?:\^|\*\*)\s*\{?([-+]?\d{1,4})\}?")

_AROUND = " \t\r\n.,:;!?'\"()[]{}<>*_`~$\u2018\u2019\u201c\u201d"
_LABEL = re.compile(r"\(?\s*([A-Za-z]|\d{1,2})\s*(?:\)|\.(?=\s))\s*(?=\S)")
_EXPLAINS = re.compile(
    r"\s*[,\u2014-]?\s+(?:because|since|as|which|so|for|given|due)\b|\s*,\s*(?:not|it|this|that|the|there|but|i|we|he|she|they)\b"
    r"|\s+\(|\s+[\u2014-]\s",
    re.IGNORECASE,
)
_OPTION = re.compile(r"^(?:option|choice)\s+", re.IGNORECASE)
_ANOTHER = re.compile(r"(?:or|and|/)(?:\W|$)")
_LONGEST_WORDS = 6  # more of them are a sentence, not an answer


class Detected(NamedTuple):
    """A task that rows allow: "exact", "choice" or "loss", and why it is no more than the loss ("" otherwise)."""

    task: str
    why: str


# ---- what a text says -----------------------------------------------------------------------------------------------


def final_part(text: str) -> str:
    """What follows the last mark of an answer, or the whole text, see [Note: Final answer]."""
    return _marked_part(text)[0]


def _marked_part(text: str) -> tuple[str, bool]:
    """The final part of a text, and whether something marks it."""
    marks = list(_MARK.finditer(text)) or list(_WEAK_MARK.finditer(text))
    if not marks:
        return text, False
    rest = text[marks[-1].end() :]
    return (_braced(rest) if marks[-1].group().endswith("{") else rest), True


def _braced(text: str) -> str:
    """What stands before the brace that closes a group whose opening brace has been read; all of it if none does."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:index]
    return text


def _statement(part: str) -> str:
    """The first sentence of a text that says something."""
    part = part.lstrip(_AROUND.replace("(", "").replace("[", "").replace(".", "").replace("$", ""))
    end = next((found for found in _SENTENCE_END.finditer(part) if found.start()), None)
    if end is not None and _LABEL.match(part[: end.end() + 1] + "x") and end.group() == ".":
        end = next((found for found in _SENTENCE_END.finditer(part, end.end())), None)  # "B. iron" is one statement
    return part if end is None else part[: end.start()]


def _plain_numbers(text: str) -> str:
    """The text with every number written in ASCII, without currency signs and without markup."""
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _TIMES_TEN.sub(r"e\1", text.translate(_MINUS).replace("**", " ").replace("`", " "))
    return _CURRENCY.sub(r" \1", text)


def _value(token: re.Match[str]) -> Fraction | None:
    """The value of a number that stands in a text; None where a zero divides."""
    sign = -1 if "-" in (token["sign"], token["sign2"]) else 1
    if token["top"] is not None:
        whole, top, bottom = (
            Fraction(Decimal(part)) for part in (token["whole"] or "0", token["top"], token["bottom"])
        )
        return sign * (whole + top / bottom) if bottom else None
    digits = re.sub(r"\D", "", token["digits"] or "") + (token["rest"] or token["bare"] or "")
    return sign * Fraction(Decimal(digits + token["power"]))


def _first_value(piece: str) -> Fraction | None:
    """The first number of a piece of text; None if it is a part of something else, or denied."""
    token = _TOKEN.search(piece)
    if token is None or re.match(r"\s*not\b", piece, re.IGNORECASE) or _GOES_ON.match(piece, token.end()):
        return None
    return _value(token)


def extract_number(text: str) -> Fraction | None:
    """The number that a text ends in: exact, and None without any. See [Note: Final answer] and [Note: Numbers]."""
    part, marked = _marked_part(text)
    if not marked:
        part = _plain_numbers(part)
        found = [token for token in _TOKEN.finditer(part) if not _GOES_ON.match(part, token.end())]
        return _value(found[-1]) if found else None
    statement = _plain_numbers(_statement(part))
    if _TOKEN.search(statement) is None:
        return _first_value(_plain_numbers(part))
    values = (_first_value(piece) for piece in reversed(re.split(r"[=\u2248]", statement)))
    return next((value for value in values if value is not None), None)


def _as_number(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else."""
    plain = _plain_numbers(text).strip(_AROUND.replace(".", "") + "%")
    token = _TOKEN.fullmatch(plain.rstrip(".%"))
    return None if token is None else _value(token)


def _same_number(found: Fraction, expected: Fraction) -> bool:
    """Whether two numbers are one value; if neither is an integer, also if they differ by a millionth, or by 0.001 and by a thousandth."""
    if found == expected:
        return True
    if found.denominator == 1 or expected.denominator == 1:
        return False
    size, difference = max(abs(found), abs(expected)), abs(found - expected)
    return difference <= max(size / 10**6, min(size, Fraction(1)) / 1000)


def _words(text: str) -> str:
    """The text as it is compared: see [Note: Words]."""
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    plain = " ".join(
        unicodedata.normalize("NFKC", text).translate(_MINUS).casefold().replace("**", "").replace("`", "").split()
    )
    return plain.strip(_AROUND) or plain


def _said(text: str) -> set[str]:
    """The answers that a text gives in words: the whole, without its explanation, and both halves of a lettered option."""
    whole = _statement(final_part(text)).lstrip("*_` ")
    said = {_words(whole)}
    for form in (whole, _OPTION.sub("", whole)):
        explanation = _EXPLAINS.search(form)
        said.add(_words(form if explanation is None else form[: explanation.start()]))
        label = _LABEL.match(form)
        rest = "" if label is None else _words(form[label.end() :])
        if label is not None and rest and not _ANOTHER.match(rest):
            said |= {_words(label[1]), rest}
    return said - {""}


def is_correct(generated: str, reference: str) -> bool:
    """Whether a text gives the reference: numbers by value, other answers as text."""
    expected = _as_number(reference)
    if expected is None:
        return _words(reference) in _said(generated)
    found = extract_number(generated)
    return found is not None and _same_number(found, expected)


# ---- what a row expects ---------------------------------------------------------------------------------------------


def reference_answer(row: Row) -> str | None:
    """The row's `answer`, or what its worked answer ends in; None for plain text and for answers that end in prose."""
    if row.get("answer") not in (None, ""):
        answer = str(row["answer"])
        return _ending(answer) if _MARK.search(answer) else answer
    if _is_text(row):
        return None
    output = str(conversation(row)[-1].get("content") or "")
    if extract_number(output) is None and not _MARK.search(output):
        return None
    return _ending(output)


def _ending(text: str) -> str | None:
    """The final answer of a text, as a reference that grades this text as right; None if it is no more than prose."""
    number = extract_number(text)
    if number is not None:
        return _written(number)
    statement = _statement(final_part(text)).strip()
    return statement if 0 < len(statement.split()) <= _LONGEST_WORDS else None


def _written(number: Fraction) -> str:
    """All digits of a number; a fraction that no decimal number equals stays one."""
    places = next((places for places in range(0, 400) if 10**places % number.denominator == 0), None)
    if places is None:
        return f"{Decimal(number.numerator)}/{Decimal(number.denominator)}"
    scaled = Decimal(int(number * 10**places))
    return f"{Decimal((scaled.as_tuple().sign, scaled.as_tuple().digits, -places)):f}"


def _is_text(row: Row) -> bool:
    return row.get("messages") is None and row.get("instruction") is None


def _is_answered(row: Row) -> bool:
    """Whether the row says by itself what is right: an `answer`, or an output that marks its own."""
    if _is_text(row):
        return False
    if row.get("answer") not in (None, ""):
        return reference_answer(row) is not None
    output = str(conversation(row)[-1].get("content") or "")
    return _MARK.search(output) is not None and _ending(output) is not None


def options(row: Row) -> list[str]:
    """The choices of a row: its `choices`, or the list after "Answer format:" in its instruction; [] if none."""
    if row.get("choices"):
        return [str(choice) for choice in row["choices"]]
    found = _OPTIONS.search(str(row.get("instruction") or ""))
    return found.group(1).split("/") if found else []


def right_option(row: Row) -> int | None:
    """The index of the option that the row's answer names, decorated or not; None without options, or if it names none or several."""
    names, answer = options(row), reference_answer(row)
    if len(names) < 2 or answer is None or _is_text(row):
        return None
    if answer in names:
        return names.index(answer)
    alike = [index for index, name in enumerate(names) if _words(name) == _words(answer)]
    return alike[0] if len(alike) == 1 else None


# ---- what rows allow ------------------------------------------------------------------------------------------------


def detect_task(rows: Rows) -> Detected:
    """The task that all of the rows allow. A number somewhere in a row's output does not make it a row with an answer."""
    if all(right_option(row) is not None for row in rows.rows):
        return Detected("choice", "")
    without = [index for index, row in enumerate(rows.rows) if not _is_answered(row)]
    if not without:
        return Detected("exact", "")
    answered = len(rows) - len(without)
    why = (
        f'{answered} of {len(rows)} rows have an `answer`, or an output that says "The answer is ..." (the first without: '
        f"{rows.source}: row {without[0]})"
    )
    return Detected("loss", why)


def check_task(task: str, rows: Rows) -> None:
    """Refuse rows that a task cannot be measured on.

    Raises:
        ValueError: naming the source and the row.
    """
    for index, row in enumerate(rows.rows):
        where = f"{rows.source}: row {index}"
        if task in ("exact", "choice") and _is_text(row):
            raise ValueError(
                f"{where} is plain `text`, without a prompt to answer: task {task} cannot measure it; use loss"
            )
        if task == "exact" and reference_answer(row) is None:
            raise ValueError(
                f"{where} has no `answer` to compare with: give the rows an `answer`, or measure the loss (task loss)"
            )
        if task == "choice" and right_option(row) is None:
            raise ValueError(
                f"{where} has no options with its answer {reference_answer(row)!r} among them: {options(row)}; give the rows `choices` "
                'or "Answer format: a/b" and an `answer`, or choose another task'
            )
