"""The status page as it is served: one document, whole in itself, that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from tests.contract.test_http import Daemon, served

MARKUP_FROM_TEXT = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function")


class Read(HTMLParser):
    """What a browser would find in the document."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.attributes: list[tuple[str, str, str]] = []
        """Tag, name and value."""
        self._within = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        del tag
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within in self.inline:
            self.inline[self._within].append(data)


@pytest.fixture
async def page() -> tuple[Read, dict[str, str], str]:
    """The document, its headers and its text."""
    async with served(Daemon().state()) as client:
        response = await client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    return Read(response.text), dict(response.headers), response.text


def directives(headers: dict[str, str]) -> dict[str, list[str]]:
    parts = [part.split() for part in headers["content-security-policy"].split(";")]
    return {name: values for name, *values in parts}


async def test_it_asks_nobody_else_for_anything(page: tuple[Read, dict[str, str], str]) -> None:
    read, _, html = page
    assert not re.search(r"(?<!xmlns=\")\bhttps?://(?!www\.w3\.org/2000/svg)", html)
    assert "@import" not in html
    assert "url(" not in html
    links = [value for _, name, value in read.attributes if name in {"href", "src", "srcset", "action", "data"}]
    assert links
    assert [value for value in links if not re.match(r"[a-z]+$|#\w*$|data:,$", value)] == []
    assert [tag for tag, name, _ in read.attributes if name == "src"] == []


async def test_the_policy_lets_exactly_its_own_script_and_style_run(page: tuple[Read, dict[str, str], str]) -> None:
    read, headers, _ = page
    policy = directives(headers)
    for kind in ("script", "style"):
        text = "".join(read.inline[kind])
        assert len(text) > 1000, "the file was put in its place"
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == [f"'sha256-{digest}'"]
    assert policy["default-src"] == ["'none'"]
    assert policy["connect-src"] == ["'self'"]
    assert policy["frame-ancestors"] == ["'none'"]
    assert policy["require-trusted-types-for"] == ["'script'"]
    assert "unsafe" not in headers["content-security-policy"]
    assert [name for _, name, _ in read.attributes if name == "style" or name.startswith("on")] == []
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"


async def test_its_script_makes_no_markup_of_text(page: tuple[Read, dict[str, str], str]) -> None:
    read, _, _ = page
    assert not MARKUP_FROM_TEXT.search("".join(read.inline["script"]))


async def test_every_table_says_what_it_holds_and_every_heading_cell_what_it_heads(
    page: tuple[Read, dict[str, str], str],
) -> None:
    _, _, html = page
    assert html.count("<table") == html.count("<caption") > 0
    cells = re.findall(r"<th\b[^>]*>", html)
    assert cells
    assert [cell for cell in cells if 'scope="' not in cell] == []
    assert '<html lang="en">' in html


async def test_head_has_the_headers_without_the_page() -> None:
    async with served(Daemon().state()) as client:
        head = await client.head("/")
    assert (head.status_code, head.content) == (200, b"")
    assert "content-security-policy" in head.headers
