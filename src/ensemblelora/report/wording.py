"""How the report writes numbers, names and intervals."""

from __future__ import annotations

import math

__all__ = [
    "NOTHING",
    "count",
    "describe_coverage",
    "format_bytes",
    "format_flops",
    "format_interval",
    "format_number",
    "format_percent",
    "format_points",
    "format_ratio",
    "format_seconds",
    "format_signed",
    "group_letter",
    "join_names",
]

NOTHING = "\u2013"
_SPACE = "\u00a0"
_MINUS = "\u2212"
_FLOPS = ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs", "ZFLOPs")
_BYTES = ("B", "kB", "MB", "GB", "TB")


def format_number(value: float | None, digits: int = 3) -> str:
    """Write a number with fixed decimals; a dash for none.

    Example:
        >>> format_number(0.12345)
        '0.123'
    """
    if value is None:
        return NOTHING
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", _MINUS)


def format_signed(value: float | None, digits: int = 3) -> str:
    """Write a difference with its sign."""
    text = format_number(value, digits)
    return f"+{text}" if value is not None and text[0] != _MINUS and float(text) != 0 else text


def format_percent(value: float | None, digits: int = 1) -> str:
    """Write a rate in [0, 1] as a percentage."""
    return NOTHING if value is None else f"{format_number(100 * value, digits)}%"


def format_points(value: float | None, digits: int = 1) -> str:
    """Write a difference of rates in percentage points, without its sign."""
    return NOTHING if value is None else format_number(abs(100 * value), digits)


def format_interval(low: float | None, high: float | None, *, scale: float = 1.0, digits: int = 3) -> str:
    """Write an interval; nothing where either end is missing."""
    if low is None or high is None:
        return ""
    return f"{format_number(scale * low, digits)} to {format_number(scale * high, digits)}"


def format_ratio(value: float | None) -> str:
    """Write a factor or a small count with as many decimals, up to two, as it needs.

    Example:
        >>> format_ratio(4.0), format_ratio(1.5625)
        ('4', '1.56')
    """
    return NOTHING if value is None else f"{value:,.2f}".rstrip("0").rstrip(".")


def format_flops(value: float | None) -> str:
    """Write floating-point operations with a metric prefix.

    Example:
        >>> format_flops(2.5e15).replace(chr(160), " ")
        '2.5 PFLOPs'
    """
    return _with_prefix(value, _FLOPS)


def format_bytes(value: float | None) -> str:
    """Write bytes with a metric prefix: 1 MB is 10^6 bytes."""
    return _with_prefix(value, _BYTES)


def format_seconds(value: float | None) -> str:
    """Write a duration in the two units that matter.

    Example:
        >>> format_seconds(200).replace(chr(160), " ")
        '3 min 20 s'
    """
    if value is None:
        return NOTHING
    if value < 9.95:
        return f"{value:.1f}{_SPACE}s"
    whole = round(value)
    if whole < 60:
        return f"{whole}{_SPACE}s"
    large, small, units = (whole // 60, whole % 60, ("min", "s")) if whole < 3600 else _hours(whole)
    return f"{large}{_SPACE}{units[0]}" + (f" {small}{_SPACE}{units[1]}" if small else "")


def count(number: int, noun: str, plural: str = "") -> str:
    """Write a number with its noun.

    Example:
        >>> count(1, "task"), count(1200, "row")
        ('1 task', '1,200 rows')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def describe_coverage(n_known: int, n_tasks: int) -> str:
    """Say over how many tasks a mean goes, where it leaves some out.

    Example:
        >>> describe_coverage(3, 4), describe_coverage(4, 4)
        ('over 3 of 4 tasks', '')
    """
    return f"over {n_known} of {n_tasks} tasks" if 0 < n_known < n_tasks else ""


def group_letter(group: int) -> str:
    """Name a group: A, B, ..., Z, AA, AB, ...

    Example:
        >>> group_letter(0), group_letter(25), group_letter(26)
        ('A', 'Z', 'AA')
    """
    letters = ""
    group += 1
    while group:
        group, rest = divmod(group - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters


def join_names(names: list[str], limit: int = 6) -> str:
    """List names in a sentence, the first few of many; of none, nothing.

    Example:
        >>> join_names(["a", "b", "c"]), join_names(["a", "b", "c"], limit=1)
        ('a, b and c', 'a and 2 more')
    """
    if len(names) > limit:
        names = [*names[:limit], f"{len(names) - limit} more"]
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _with_prefix(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return NOTHING
    power = 0 if value < 1 else min(int(math.log10(value) / 3 + 1e-9), len(units) - 1)
    scaled = value / 1000**power
    return f"{scaled:,.{0 if power == 0 or scaled >= 99.95 else 1}f}{_SPACE}{units[power]}"


def _hours(whole: int) -> tuple[int, int, tuple[str, str]]:
    minutes = round(whole / 60)
    return minutes // 60, minutes % 60, ("h", "min")
