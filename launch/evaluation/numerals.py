"""Read numbers in a text, compare them and write them. See [Note: Numbers] in grading.py for what counts as one."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

_DIGITS = r"\d{1,3}(?P<by>[,_'\u2019\u00a0\u202f\u2009])\d{2,3}(?:(?P=by)\d{2,3})*(?<=\d{3})(?!\d)|\d+"
TOKEN = re.compile(
    r"(?P<sign>(?<![A-Za-z_\d)\]%])[-+])?(?<![A-Za-z_\d])"
    r"(?:(?P<whole>\d+) )??(?P<top>\d+)/(?P<bottom>\d+)(?![\d/])"
    r"|(?P<sign2>(?<![A-Za-z_\d)\]%])[-+])?(?<![A-Za-z_\d])"
    rf"(?:(?P<digits>{_DIGITS})(?P<rest>(?:\.\d+)?)|(?<!\.)(?P<bare>\.\d+))"
    r"(?P<power>(?:[eE][-+]?\d{1,4}(?![A-Za-z_\d]))?)"
)
# What makes a number a part of something that has no value yet.
GOES_ON = re.compile(
    r"\s*(?:[-+*/^\u00d7\u00f7]|or\b|and\b)\s*[({]?[-+]?\.?\d|[,:]\d|\.\d|e[-+]?\d"
    r"|\s*(?:\\(?:sqrt|pi|cdot|pm)|[\u03c0\u221a])",
    re.IGNORECASE,
)

MINUS = str.maketrans(dict.fromkeys("\u2212\ufe63\uff0d\u2013", "-"))
LATEX = [
    (re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r" \1/\2"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[()\[\]]|\\[,!; ]"), " "),
    (re.compile(r"\\times"), "\u00d7"),
]
_CURRENCY = re.compile(r"([-+]?)[$\u20ac\u00a3\u00a5]\s?(?=[-+]?\.?\d)")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[\u00d7*]\s*10\s*(?:\^|\*\*)\s*\{?([-+]?\d{1,4})\}?")

# What may stand around an answer without being a part of it.
AROUND = " \t\r\n.,:;!?'\"()[]{}<>*_`~$\u2018\u2019\u201c\u201d\u3002"


def plain_numbers(text: str) -> str:
    """The text with every number written in ASCII, without currency signs and without markup."""
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    text = _TIMES_TEN.sub(r"e\1", text.translate(MINUS).replace("**", " ").replace("`", " "))
    return _CURRENCY.sub(r" \1", text)


def value_of(token: re.Match[str]) -> Fraction | None:
    """The value of a number that stands in a text; None where a zero divides."""
    sign = -1 if "-" in (token["sign"], token["sign2"]) else 1
    if token["top"] is not None:
        whole, top, bottom = (
            Fraction(Decimal(part)) for part in (token["whole"] or "0", token["top"], token["bottom"])
        )
        return sign * (whole + top / bottom) if bottom else None
    digits = re.sub(r"\D", "", token["digits"] or "") + (token["rest"] or token["bare"] or "")
    return sign * Fraction(Decimal(digits + token["power"]))


def as_number(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else."""
    plain = plain_numbers(text).strip(AROUND.replace(".", "") + "%")
    token = TOKEN.fullmatch(plain.rstrip(".%"))
    return None if token is None else value_of(token)


def same_number(found: Fraction, expected: Fraction) -> bool:
    """Whether two numbers are one value, up to rounding if neither is an integer.

    Rounding is a difference of a millionth, or of a thousandth that is at most 0.001.
    """
    if found == expected:
        return True
    if found.denominator == 1 or expected.denominator == 1:
        return False
    size, difference = max(abs(found), abs(expected)), abs(found - expected)
    return difference <= max(size / 10**6, min(size, Fraction(1)) / 1000)


def written(number: Fraction) -> str:
    """All digits of a number; a fraction that no decimal number equals stays one."""
    decimals = next((digits for digits in range(400) if 10**digits % number.denominator == 0), None)
    if decimals is None:
        return f"{Decimal(number.numerator)}/{Decimal(number.denominator)}"
    scaled = Decimal(int(number * 10**decimals))
    return f"{Decimal((scaled.as_tuple().sign, scaled.as_tuple().digits, -decimals)):f}"
