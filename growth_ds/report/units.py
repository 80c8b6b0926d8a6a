"""Numbers as people read them. A number that is missing or not finite is shown as such, never as zero."""

from __future__ import annotations

import math

MISSING = "\u2013"
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def count(number: float | None) -> str:
    """Things that are counted: `1,234`, `210 k`, `12.3 M`, `1.20 B`."""
    if number is None or not math.isfinite(number):
        return MISSING
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= max(size, 1e5):
            return f"{_three_digits(number / size)} {letter}"
    return f"{number:,.0f}"


def _three_digits(number: float) -> str:
    return f"{number:.{max(0, 2 - int(math.log10(abs(number))))}f}"


def power(exponent: int) -> str:
    """`10¹⁵`."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def flops(number: float | None) -> str:
    """`4.20 × 10¹⁵`; the spaces do not break."""
    if number is None or not math.isfinite(number):
        return MISSING
    mantissa, exponent = plain_flops(number).split("e")
    return f"{mantissa}\u00a0\u00d7\u00a0{power(int(exponent))}"


def plain_flops(number: float | None) -> str:
    """`4.20e15`, for terminals."""
    return MISSING if number is None or not math.isfinite(number) else f"{number:.2e}".replace("e+", "e")


def duration(seconds: float | None) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600 and whole >= 60 and whole % 60 == 0:
        return f"{whole // 60} min"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def nats(loss: float | None) -> str:
    """A loss: `5.123`."""
    return MISSING if loss is None else f"{loss:.3f}"


def difference(nats_apart: float | None, digits: int = 3) -> str:
    """A signed difference of losses: `+0.012`; a difference that rounds to nothing has no sign."""
    if nats_apart is None:
        return MISSING
    text = f"{nats_apart:+.{digits}f}"
    return text[1:] if math.isfinite(nats_apart) and float(text) == 0 else text


def percent(share: float | None, digits: int = 1) -> str:
    """A fraction of one: `12.3%`."""
    return MISSING if share is None else f"{100 * share:.{digits}f}%"
