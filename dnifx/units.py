"""Numbers and names as people read them."""

from dnifx.errors import visible

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL = ("", "k", "M", "G", "T", "P")


def quantity(number: float, unit: str = "") -> str:
    """Return a count in three digits with a prefix: ``950``, ``66.0 k``, ``1.32 MFLOP``. Below 10,000 it is exact."""
    scaled, prefix = (f"{number:,.0f}", "") if number < 10_000 else _scale(number, 1000, _DECIMAL)
    return f"{scaled} {prefix}{unit}".rstrip()


def byte_size(number: float) -> str:
    """Return bytes in three digits with a binary prefix: ``512 B``, ``32.0 KiB``."""
    scaled, prefix = _scale(number, 1024, _BINARY)
    return f"{scaled} {prefix}"


def percent(share: float) -> str:
    """Return a share in whole percent, or ``<1%`` where that would round to zero."""
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def share_bar(share: float, width: int) -> str:
    """Return a bar of at most ``width`` characters, in eighths of a character. Any share above zero shows."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def shorten(text: str, width: int) -> str:
    """Return the text in at most ``width`` characters; a longer one gets an ellipsis in the middle."""
    text = visible(text, "")
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def plural(number: int, noun: str) -> str:
    """Return a number and its noun: ``1 node``, ``3 boundaries``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun[:-1]}ies" if noun.endswith("y") else f"{number:,} {noun}s"


def _scale(number: float, base: int, prefixes: tuple[str, ...]) -> tuple[str, str]:
    """Divide until three digits are left, and return the number and the prefix."""
    step = 0
    while number >= base - 0.5 and step < len(prefixes) - 1:
        number /= base
        step += 1
    if step == 0:
        return f"{number:.0f}", prefixes[0]
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{digits}f}", prefixes[step]
