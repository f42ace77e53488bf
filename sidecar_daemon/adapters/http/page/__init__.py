"""The status page: three files joined to one answer that asks nobody but this daemon for anything more."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_FOLDER = Path(__file__).parent
_STYLE, _SCRIPT = "/* style.css */", "/* script.js */"
"""Where the other two files stand in ``index.html``."""


@dataclass(frozen=True, slots=True)
class Page:
    """One self-contained document, and the headers that hold it to that."""

    html: str
    headers: Mapping[str, str]


def load_page() -> Page:
    """Read the page that ships inside this package."""
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    html = (_FOLDER / "index.html").read_text(encoding="utf-8").replace(_STYLE, style).replace(_SCRIPT, script)
    policy = {
        "default-src": "'none'",
        "script-src": _hashed(script),
        "style-src": _hashed(style),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",  # keys and reasons can become text, never markup
        "trusted-types": "'none'",
    }
    return Page(
        html,
        {
            "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        },
    )


def _hashed(text: str) -> str:
    """The one inline text that a directive lets through."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
