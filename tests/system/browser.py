"""A real headless Chromium, driven by the DevTools protocol over a pair of pipes: no port, no driver, no library."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import itertools
import json
import os
import sys
import tempfile
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tests.system.tools import tool
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_ANSWER_SECONDS = 60.0
_LONGEST_MESSAGE = 1 << 26
_LAUNCH = (
    "import os, sys; read, write, *command = sys.argv[1:]; "
    "os.dup2(int(read), 3); os.dup2(int(write), 4); os.execv(command[0], command)"
)
"""Chromium reads commands from descriptor 3 and writes answers to 4."""
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


class BrowserError(Exception):
    """Chromium refused a command, or a script threw."""


@dataclass(eq=False)
class Browser:
    """One Chromium. Make it with ``chromium()``."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.WriteTransport
    pages: dict[str, Page] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _waiting: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)

    async def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self.writer.write(json.dumps(message).encode() + b"\0")
        return await asyncio.wait_for(answer, _ANSWER_SECONDS)

    async def read(self) -> None:
        """Hand answers to those who wait for them, and events to their page, until Chromium ends."""
        with suppress(asyncio.IncompleteReadError):
            while True:
                message = json.loads((await self.reader.readuntil(b"\0"))[:-1])
                waiting = self._waiting.pop(message.get("id", 0), None)
                page = self.pages.get(message.get("sessionId", ""))
                if waiting is not None and not waiting.done():
                    if "error" in message:
                        waiting.set_exception(BrowserError(message["error"]["message"]))
                    else:
                        waiting.set_result(message["result"])
                elif page is not None and "method" in message:
                    page.notice(message["method"], message["params"])
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(BrowserError("Chromium has ended"))

    @asynccontextmanager
    async def page(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> AsyncIterator[Page]:
        """Open a URL in a tab of its own, as a screen of this size that likes it light or dark."""
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            await page.call(f"{domain}.enable")
        await page.resize(width, height)
        await page.prefer(dark=dark)
        await page.call("Page.navigate", url=url)
        try:
            yield page
        finally:
            del self.pages[session]
            await self.call("Target.closeTarget", targetId=target)


@dataclass(eq=False)
class Page:
    """One tab."""

    browser: Browser
    session: str
    complaints: list[str] = field(default_factory=list)
    """Errors and warnings of the console, exceptions nobody caught, and what the policy blocked."""
    requests: list[str] = field(default_factory=list)
    """Every URL that was asked for."""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command to this tab."""
        return await self.browser.call(method, self.session, **parameters)

    async def js(self, expression: str) -> Any:
        """Evaluate an expression in the page and return its value; a promise is awaited."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise BrowserError(json.dumps(result["exceptionDetails"].get("exception", result["exceptionDetails"])))
        return result["result"].get("value")

    async def text(self, selector: str) -> str:
        """What a person reads in the first visible element that matches; empty where there is none."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].find((element) => element.checkVisibility())"
        return str(await self.js(f"({found}?.innerText ?? '').trim()"))

    async def shows(self, selector: str, wanted: str, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109  polls
        """Wait until an element shows a text."""

        async def check() -> bool:
            found = await self.text(selector)
            assert wanted in found, found
            return True

        await eventually(check, timeout, f"{wanted!r} in {selector}")

    async def resize(self, width: int, height: int) -> None:
        """Be a screen of this size in CSS pixels; a narrow one is a phone's."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if width < 500 else 1,
            mobile=width < 500,
        )

    async def prefer(self, *, dark: bool) -> None:
        """Say which colours the person likes."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def press(self, key: str) -> None:
        """Press and release one key, ``Tab`` or ``Enter``."""
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"Enter": "\r"}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **({"text": text} if text and kind == "keyDown" else {}),
            )

    async def point(self, x: float, y: float) -> None:
        """Move the pointer, in CSS pixels of the window."""
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def roles(self) -> list[tuple[str, str]]:
        """Role and name of everything that assistive technology is told of."""
        nodes = (await self.call("Accessibility.getFullAXTree"))["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored") and "role" in node
        ]

    async def picture(self, file: Path) -> None:
        """Save the whole page as a PNG, in a folder that exists."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        await asyncio.to_thread(file.write_bytes, base64.b64decode(shot["data"]))

    def foreign_requests(self, url: str) -> list[str]:
        """What was asked of anybody but the host of ``url``."""
        host = urlsplit(url).netloc
        return [each for each in self.requests if urlsplit(each).scheme != "data" and urlsplit(each).netloc != host]

    def notice(self, method: str, parameters: dict[str, Any]) -> None:
        """Keep what the tests ask for later."""
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in {"error", "warning", "assert"}:
            self.complaints.append(json.dumps(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in {"error", "warning"}:
            self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Start Chromium with a profile of its own; end it, and delete the profile, at the end."""
    with tempfile.TemporaryDirectory(prefix="sc-chromium", ignore_cleanup_errors=True) as profile:
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()
        # Above 4, so that putting one in its place does not close the other.
        theirs = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (theirs_read, theirs_write)]
        root = ("--no-sandbox",) if os.geteuid() == 0 else ()  # Chromium's sandbox refuses root
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _LAUNCH, *map(str, theirs), tool("chromium")),
            *(*_FLAGS, *root, f"--user-data-dir={profile}", "about:blank"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            pass_fds=theirs,
        )
        for each in (*theirs, theirs_read, theirs_write):
            os.close(each)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_LONGEST_MESSAGE)
        incoming, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours_read, "rb")
        )
        writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(ours_write, "wb"))
        browser = Browser(process, reader, writer)
        reading = asyncio.create_task(browser.read())
        try:
            yield browser
        finally:
            with suppress(BrowserError, TimeoutError):
                await browser.call("Browser.close")
            try:
                await asyncio.wait_for(process.wait(), 20)
            except TimeoutError:
                process.kill()
                await process.wait()
            reading.cancel()
            writer.close()
            incoming.close()
