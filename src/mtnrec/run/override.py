"""Values of command-line overrides, in the grammar of Hydra, which is not needed here."""

import re

_PLAIN_PATH = re.compile(r"(/?[A-Za-z0-9_.-]+)?(/[A-Za-z0-9_.-]+)+")
_BEFORE_QUOTE = re.compile(r'(\\*)("|\Z)')


def quote_value(text: str) -> str:
    """Return a text as a value of an override; a plain path stays as it is.

    >>> quote_value("runs/a"), quote_value("runs/a,b")
    ('runs/a', '"runs/a,b"')
    """
    return text if _PLAIN_PATH.fullmatch(text) else f'"{escape_quoted(text)}"'


def escape_quoted(text: str) -> str:
    r"""Return what stands between double quotes for a text.

    Interpolations and quotes are escaped, and so are backslashes before them and at the end.

    >>> print(escape_quoted('a "b" ${c}'))
    a \"b\" \${c}
    """
    return _BEFORE_QUOTE.sub(_escape, escape_interpolations(text))


def escape_interpolations(text: str) -> str:
    """Return a string that OmegaConf reads as the text, which may hold ``${``."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _escape(match: re.Match[str]) -> str:
    quote = r"\"" if match[2] else ""
    return 2 * match[1] + quote
