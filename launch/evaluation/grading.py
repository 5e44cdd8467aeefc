"""Grade answers: what a row expects, what a text says, and whether the two agree.

[Note: Final answer] A text's final answer is what follows its last "answer is", "#### " (in its last line) or
"\\boxed{"; without one of them, what follows its last "answer:". It ends with its sentence or line. A text without any
of these is read whole: its last number counts, or its first sentence as words.

[Note: Numbers] An integer is equal to the same value only, at any size; 30 and 30.0 are one value. Other numbers may
differ by rounding, see `same_number`. Thousands separators, currency signs and a percent sign do not count: $1,234.50
is 1234.5, and 60% is 60, not 0.6. Of "10 - 4 = 6" the 6 counts. A sum that is not worked out ("10 - 4"), two numbers
("5 or 6", "3:30"), a root ("2\\sqrt{3}") and a decimal comma have no value. As a reference an output's number is taken
only if it is all that the output states; "U.S. Army", "x=2, y=3" and "5x" are words.

[Note: Words] A reference that is not a number ("New York", "B", "5 apples") is compared as text, without regard to
case, white space, and punctuation or markup around it. The whole answer must be the reference: "New" is not "New
York", and "A or B" is not "A". Three things may come with it: an explanation ("B because ..."), a bracket after it ("B
(iron)"), and the text of a lettered option ("(B) iron", which is both B and iron). Where a sentence ends is not always
clear ("Robert E. Lee"): every part of the line that may be the whole answer is compared.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from fractions import Fraction

from launch.data.messages import Row, conversation, is_text
from launch.evaluation.numerals import (
    AROUND,
    GOES_ON,
    LATEX,
    MINUS,
    TOKEN,
    as_number,
    plain_numbers,
    same_number,
    value_of,
    written,
)

_MARK = re.compile(
    r"\banswer\s+is\b(?:\s*:)?|^####(?!#)(?=[^\n]*\S[^\n]*\s*\Z)|\\boxed\s*\{", re.IGNORECASE | re.MULTILINE
)
_WEAK_MARK = re.compile(r"\banswer\s*:", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<!\b(?:St|Dr|Mr|Ms|Mt|Ft|Jr|Sr|vs))[.!?;:](?=[\s*_\"')\]]|$)|[\n\u3002]")
_STARTS = r"(?:It|Its|This|That|These|The|He|She|They|We|You|So|In|As|If|A|An|I)\b"  # a sentence, not a name
# Ends of a sentence that are inside an answer: J. K. Rowling, U.S. Army, No. 5, Yahoo! Inc. and Google, Star Wars: A
# New Hope, as follows: 5.
_INSIDE = re.compile(
    rf"(?:^|(?<=[\s.]))[A-Z]\.(?=\s+(?!{_STARTS})[A-Z])"
    r"|\bNo\.(?=\s?\d[\d,]*\W*(?:$|because\b))"
    r"|[.!?](?=\s+(?:Inc|Co|Corp|Ltd)\b)|\b(?:Inc|Co|Corp|Ltd)\.(?=\s+[a-z&])"
    r"|(?<=\w\w):(?=[ \t]+[A-Z])|(?<=[A-Za-z]):(?=[ \t]*[^\w\s]{0,3}\d)"
)

# What says that a number is not all that is stated: anywhere behind it, anywhere before it, and next to it.
_MORE_BEHIND = re.compile(
    r"\\[A-Za-z]|[\^_<>|\u2264\u2265]|[-+*/\u00d7\u00f7]\s*\(?[A-Za-z]\b|^\s*[ap]\.?m\b"
    r"|^(?!(?:st|nd|rd|th|cm|mm|km|kg|mg|ml|lbs?|ft|hrs?|mins?)\b)[A-Za-z\u03b1-\u03c9]"
)
_MORE_BEFORE = re.compile(r"\\[A-Za-z]|[\^<>|\u2264\u2265]|[\w)\]}]\s*[-+*/\u00d7\u00f7]\s*\(?$")
_STUCK = re.compile(r"[:^_/\\.]$"), re.compile(r"[:^_/\\]|\.\d")
# Degrees, and the power of a unit.
_NO_MATTER = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\u00b0|(?:(?<=[A-Za-z]{2})|(?<=\sm))\^\{?[23]\}?")
_ASIDE = re.compile(r"\b(?:out\s+)?of\b")

_LABEL = re.compile(r"\(?\s*([A-Za-z]|\d{1,2})\s*(?:\)|\.(?=\s))\s*(?=\S)")
_EXPLAINS = re.compile(
    r"\s*[,\u2014-]?\s+(?:because|since|as|which|so|for|given|due)\b"
    r"|\s*,\s*(?:not|it|this|that|the|there|but|i|we|he|she|they)\b"
    r"|\s+\(|\s+[\u2014-]\s",
    re.IGNORECASE,
)
_OPTION = re.compile(r"^(?:option|choice)\s+", re.IGNORECASE)
_BECAUSE = re.compile(r"[\s,]+because\b", re.IGNORECASE)
_DISPLAY = "$ \t\r\n"  # a formula may begin on a line of its own
_ANOTHER = re.compile(r"(?:or|and|/)(?:\W|$)")
_LONGEST_WORDS = 6  # more of them are a sentence, not an answer
_MOST_PIECES = 50  # of a line that are looked at: a model may repeat itself without an end


# ---- what a text says -----------------------------------------------------------------------------------------------


def final_part(text: str) -> str:
    """What follows the last mark of an answer, or the whole text, see [Note: Final answer]."""
    return _marked_part(text)[0]


def _marked_part(text: str) -> tuple[str, bool]:
    """The final part of a text, and whether something marks it."""
    mark = last_mark(text)
    if mark is None:
        return text, False
    rest = text[mark.end() :]
    return (_braced(rest) if mark.group().endswith("{") else rest), True


def last_mark(text: str) -> re.Match[str] | None:
    """What marks the final answer of a text, see [Note: Final answer]; None if nothing does."""
    marks = list(_MARK.finditer(text)) or list(_WEAK_MARK.finditer(text))
    return marks[-1] if marks else None


def _braced(text: str) -> str:
    """What stands before the brace that closes a group whose opening brace has been read; all of it if none does."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:index]
    return text


def _without_decoration(part: str) -> str:
    """A text from where it begins to say something."""
    return part.lstrip(AROUND.replace("(", "").replace("[", "").replace(".", "").replace("$", ""))


def _statement(part: str, whole: bool = False) -> str:
    """The first sentence of a text that says something.

    Args:
        whole: look behind what only looks like the end of one, see `_INSIDE`.
    """
    part = _without_decoration(part)
    inside = {found.end() for found in _INSIDE.finditer(part)} if whole else set()
    end = next((end for end in _SENTENCE_END.finditer(part) if end.start() and end.end() not in inside), None)
    labels = end is not None and end.group() == "." and _LABEL.match(part[: end.end() + 1] + "x")
    if end is not None and labels and not re.match(rf"\s*{_STARTS}", part[end.end() :]):
        end = next((found for found in _SENTENCE_END.finditer(part, end.end())), None)  # "B. iron" is one statement
    return part if end is None else part[: end.start()]


def _first_value(piece: str) -> Fraction | None:
    """The first number of a piece of text; None if it is a part of something else, or denied."""
    token = TOKEN.search(piece)
    if token is None or re.match(r"\s*not\b", piece, re.IGNORECASE) or GOES_ON.match(piece, token.end()):
        return None
    return value_of(token)


def extract_number(text: str) -> Fraction | None:
    """The number that a text ends in: exact, and None without any. See [Note: Final answer] and [Note: Numbers]."""
    part, marked = _marked_part(text)
    if not marked:
        part = plain_numbers(part)
        found = [token for token in TOKEN.finditer(part) if not GOES_ON.match(part, token.end())]
        return value_of(found[-1]) if found else None
    statement = plain_numbers(_statement(part))
    if TOKEN.search(statement) is None:
        return _first_value(plain_numbers(part))
    values = (_first_value(piece) for piece in reversed(re.split(r"[=\u2248]", statement)))
    return next((value for value in values if value is not None), None)


def words(text: str) -> str:
    """The text as it is compared: see [Note: Words]."""
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    plain = " ".join(
        unicodedata.normalize("NFKC", text).translate(MINUS).casefold().replace("**", "").replace("`", "").split()
    )
    return plain.strip(AROUND) or plain


def said_answers(text: str) -> set[str]:
    """A text's answers in words: the whole, without its explanation, and both halves of a lettered option."""
    part = final_part(text)
    statements = [_statement(part), _statement(part, whole=True)]
    line = _without_decoration(part).split("\n", 1)[0]
    longer = (end.start() for end in _SENTENCE_END.finditer(line) if end.start() > len(statements[0]))
    pieces = [line[:end] for end in itertools.islice(longer, _MOST_PIECES)]
    said = {words(piece) for piece in (*statements, line, *pieces)}
    forms = [statement.lstrip("*_` ") for statement in statements]
    for form in (*forms, *(_OPTION.sub("", form) for form in forms)):
        explanation = _EXPLAINS.search(form)
        said.add(words(form if explanation is None else form[: explanation.start()]))
        label = _LABEL.match(form)
        rest = "" if label is None else words(form[label.end() :])
        if label is not None and rest and not _ANOTHER.match(rest):
            said |= {words(label[1]), rest}
    return said - {""}


def is_correct(generated: str, reference: str) -> bool:
    """Whether a text gives the reference: numbers by value, other answers as text."""
    expected = as_number(reference)
    if expected is None:
        return words(reference) in said_answers(generated)
    found = extract_number(generated)
    return found is not None and same_number(found, expected)


# ---- what a row expects ---------------------------------------------------------------------------------------------


def reference_answer(row: Row) -> str | None:
    """The row's `answer`, or what its worked answer ends in; None for plain text and for answers that end in prose."""
    if row.get("answer") not in (None, ""):
        answer = str(row["answer"])
        return _ending(answer) if _MARK.search(answer) else answer
    if is_text(row):
        return None
    output = str(conversation(row)[-1].get("content") or "")
    if extract_number(output) is None and not _MARK.search(output):
        return None
    return _ending(output)


def _ending(text: str) -> str | None:
    """The final answer of a text, as a reference that grades this text as right; None if it is no more than prose."""
    number = extract_number(text)
    part, marked = _marked_part(text)
    long = not marked and len(text.split()) > _LONGEST_WORDS
    if number is not None and (_stands_alone(text) if long else _is_all_that_is_stated(part)):
        return written(number)
    statement = _BECAUSE.split(_statement(part.lstrip(_DISPLAY), whole=True))[0].strip()
    if long or not 0 < len(statement.split()) <= _LONGEST_WORDS:
        return None
    return statement if is_correct(text, statement) else None


def _is_all_that_is_stated(part: str) -> bool:
    """Whether a final part states one number, perhaps with its unit, that is not only a piece of the answer."""
    pieces = re.split(r"[=\u2248]", _NO_MATTER.sub("", plain_numbers(_statement(part.lstrip(_DISPLAY), whole=True))))
    token = TOKEN.search(pieces[-1])
    if token is None or any(re.search(r",\s|\b(?:and|or)\b", piece) for piece in pieces[1:-1]):
        return False
    before, behind = pieces[-1][: token.start()], pieces[-1][token.end() :]
    asides = [found.start() for found in (_EXPLAINS.search(behind), _ASIDE.search(behind)) if found is not None]
    if _MORE_BEFORE.search(before) or _MORE_BEHIND.search(behind):
        return False
    return TOKEN.search(behind[: min(asides, default=len(behind))]) is None


def _stands_alone(text: str) -> bool:
    """Whether the last number of a text is not a piece of a time, a version or a formula."""
    plain = _NO_MATTER.sub("", plain_numbers(text))
    token = [token for token in TOKEN.finditer(plain) if not GOES_ON.match(plain, token.end())][-1]
    before, behind = _STUCK
    return not before.search(plain[: token.start()]) and not behind.match(plain, token.end())


def is_answered(row: Row) -> bool:
    """Whether the row says by itself what is right: an `answer`, or an output that marks its own."""
    if is_text(row):
        return False
    if row.get("answer") not in (None, ""):
        return reference_answer(row) is not None
    output = str(conversation(row)[-1].get("content") or "")
    return _MARK.search(output) is not None and _ending(output) is not None
