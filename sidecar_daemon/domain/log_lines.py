"""Log lines: how they look, and the passwords that none may hold. Apart from what writes them: this loads fast."""

from __future__ import annotations

import re
from enum import StrEnum

_URL_PASSWORD = re.compile(r"(?P<head>\b[a-z][a-z0-9+.-]*://[^\s:/@]*):[^\s/]*@", re.IGNORECASE)
_NAMED_PASSWORD = re.compile(r"(?P<head>\b(?:ssl)?password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&'\"]+)", re.IGNORECASE)


class LogFormat(StrEnum):
    """How log lines look."""

    AUTO = "auto"
    """Console on a terminal, JSON elsewhere."""
    JSON = "json"
    CONSOLE = "console"


def redact(text: str) -> str:
    """Replace the passwords in URLs and connection strings by ``***``: the last defence, not the first."""
    return _NAMED_PASSWORD.sub(r"\g<head>***", _URL_PASSWORD.sub(r"\g<head>:***@", text))
