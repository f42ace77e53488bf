"""The status page in a real browser, in front of a real daemon on a real Postgres."""

from __future__ import annotations

import asyncio
import os
import re
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest
import pytest_asyncio

from tests.conftest import ROOT, RUNTIME_ROLE, admin, migrate_at
from tests.daemon import Daemon
from tests.system.browser import chromium
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sidecar_daemon.adapters.postgres.embedded import EmbeddedServer
    from tests.system.browser import Browser, Page

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.long]

SETTINGS = {
    "THREADS": "1",
    "MAX_DOCUMENT_BYTES": "4096",
    "MAX_ATTEMPTS": "2",
    "BACKOFF_BASE": "0.05",
    "BACKOFF_CAP": "0.1",
    "POLL_MAX": "1",
}
HOSTILE_KEY = "<img src=x onerror=document.title='owned'>"
CONTRAST = """
(() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (colour) => colour.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  let looked = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    looked += 1;
    const [one, other] = [light(rgb(getComputedStyle(element).color)), light(ground(element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${element.tagName} ${element.textContent.trim().slice(0, 40)}`);
  }
  return { looked, poor };
})()
"""


@pytest.fixture(scope="module")
def pictures() -> Path:
    """Where screenshots are kept: the folder that ``ARTIFACTS_DIR`` names, else one that git ignores."""
    folder = Path(os.environ.get("ARTIFACTS_DIR") or ROOT / ".artifacts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """One Chromium for all tests; each has its own tab."""
    async with chromium() as running:
        yield running


@asynccontextmanager
async def attached(dsn: str, runtime_dsn: str, tiny_models: Path) -> AsyncIterator[tuple[Daemon, asyncpg.Connection]]:
    """A daemon at work on table ``notes``, whose keys are text, and a connection of the application's."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("CREATE TABLE notes (id text PRIMARY KEY, body text)")
        await connection.execute("SELECT sidecar.attach('notes', '{body}', p_model => 'tiny', p_dimensions => 32)")
        async with Daemon(runtime_dsn, tiny_models, SETTINGS) as daemon:
            yield daemon, connection
    finally:
        connection.terminate()


@pytest_asyncio.fixture(loop_scope="module")
async def working(
    database_url: str, runtime_url: str, tiny_models: Path
) -> AsyncIterator[tuple[Daemon, asyncpg.Connection]]:
    """See ``attached``; on a database of the test's own."""
    async with attached(database_url, runtime_url, tiny_models) as running:
        yield running


async def write(connection: asyncpg.Connection, count: int) -> None:
    """Insert documents."""
    await connection.execute(
        "INSERT INTO notes SELECT 'note ' || n, 'this is note number ' || n FROM "
        "generate_series((SELECT count(*) FROM notes) + 1, (SELECT count(*) FROM notes) + $1::bigint) AS n",
        count,
    )


async def bury(connection: asyncpg.Connection, key: str = HOSTILE_KEY) -> None:
    """Insert a document that is too large."""
    await connection.execute("INSERT INTO notes VALUES ($1, repeat('secret ', 1000))", key)


async def spoken(page: Page, chart: str) -> str:
    """What a chart is called for those who cannot see it."""
    return str(await page.js(f"document.querySelector('[data-chart={chart}] svg').getAttribute('aria-label')"))


async def number(page: Page, selector: str) -> float:
    """The number that an element begins with."""
    found = re.match(r"[\d,.]+", await page.text(selector))
    assert found, await page.text(selector)
    return float(found.group().replace(",", ""))


def assert_clean(page: Page, url: str) -> None:
    """No error in the console, nothing blocked, nobody else asked."""
    assert page.complaints == []
    assert page.requests
    assert page.foreign_requests(url) == []


async def test_it_renders_and_follows_the_documents(
    browser: Browser, working: tuple[Daemon, asyncpg.Connection], pictures: Path
) -> None:
    daemon, connection = working
    async with browser.page(daemon.url) as page:
        await page.shows("#headline", "Ready")
        await page.shows("[data-at=name]", "notes")
        await page.shows(".card .state", "working")
        await page.shows(".card .circuit", "circuit closed")
        await page.shows("#database", RUNTIME_ROLE)
        assert await page.js("document.title") == "Ready · sidecar-daemon"
        await page.shows("[data-at=outcomes]", "embedded")
        await write(connection, 300)
        await eventually(lambda: embedded(page, 300), 90, "300 documents on the page")
        assert await number(page, "[data-chart=embedded] .now") > 0
        await page.shows("[data-chart=freshness] .now", "p99")
        assert re.search(r"half of 300 documents within .+, 99 of 100 within", await spoken(page, "freshness"))
        assert await page.js("document.querySelector('[data-chart=embedded] .bars').getAttribute('d').length") > 10
        before = await number(page, "[data-at=outcomes] dd")
        await write(connection, 50)
        await eventually(lambda: embedded(page, before + 50), 90, "50 more, without a reload")
        await connection.execute("SELECT sidecar.request_sweep('notes')")
        await page.shows("[data-at=documents]", "350")
        await page.shows("[data-at=coverage]", "100 %")
        await page.shows("[data-at=sweep]", "finished")
        assert sum("/overview" in url for url in page.requests) > 2
        assert [url for url in page.requests if url == f"{daemon.url}/"] == [f"{daemon.url}/"], "it was loaded once"
        await page.picture(pictures / "page-light.png")
        assert_clean(page, daemon.url)


async def embedded(page: Page, count: float) -> bool:
    found = await number(page, "[data-at=outcomes] dd")
    assert found >= count, found
    return found == count


async def test_a_dead_letter_is_shown_as_text_and_without_what_it_says(
    browser: Browser, working: tuple[Daemon, asyncpg.Connection]
) -> None:
    daemon, connection = working
    async with browser.page(daemon.url) as page:
        await page.shows("[data-at=no-letters]", "None.")
        await bury(connection)
        await page.shows("[data-at=letter-rows]", "too_large")
        assert await page.text("[data-at=letter-rows] th") == HOSTILE_KEY
        assert re.fullmatch(r"\d+ ms|[\d.]+ s|\d+ min", await page.text("[data-at=letter-rows] td:nth-child(3)"))
        assert await page.text("[data-at=letter-rows] td:nth-child(4)") == "1"
        assert await page.text("[data-at=dead]") == "1"
        await page.shows("#summary", "1 dead letter waiting for a person")
        await page.shows("[data-at=command]", "sidecar-daemon dead-letters list notes")
        assert await page.js("document.images.length") == 0
        assert "owned" not in str(await page.js("document.title"))
        assert "secret" not in str(await page.js("document.documentElement.textContent"))
        await connection.execute("SELECT sidecar.purge('notes')")
        await page.shows("[data-at=no-letters]", "None.")
        assert await page.text("[data-at=letters]") == ""
        assert_clean(page, daemon.url)


async def test_a_paused_pipeline_is_shown_and_a_second_one_beside_it(
    browser: Browser, working: tuple[Daemon, asyncpg.Connection]
) -> None:
    daemon, connection = working
    async with browser.page(daemon.url) as page:
        await page.shows(".card .state", "working")
        assert await page.text("#all") == "", "one pipeline needs no list"
        await connection.execute("SELECT sidecar.set_enabled('notes', false)")
        await page.shows(".card .state", "paused")
        await page.shows(".card .why", "sidecar-daemon resume notes")
        await page.shows("#headline", "Ready")
        await page.shows("#summary", "1 pipeline paused")
        await write(connection, 20)
        await page.shows("[data-at=live-depth]", "20")
        await connection.execute("CREATE TABLE titles (id bigint PRIMARY KEY, body text)")
        await connection.execute("SELECT sidecar.attach('titles', '{body}', p_model => 'tiny', p_dimensions => 32)")
        await page.shows("#rows tr:nth-child(2)", "working")
        assert "paused" in await page.text("#rows tr:nth-child(1)")
        assert await page.js("[...document.querySelectorAll('.card h2')].map((each) => each.textContent)") == [
            "notes",
            "titles",
        ]
        await connection.execute("SELECT sidecar.set_enabled('notes', true)")
        await page.shows("#pipeline-notes .state", "working")
        await connection.execute("SELECT sidecar.detach('titles')")
        await eventually(lambda: gone(page, "#pipeline-titles"))
        assert_clean(page, daemon.url)


async def gone(page: Page, selector: str) -> bool:
    return await page.js(f"document.querySelector('{selector}') === null") is True


async def test_an_outage_of_the_database_is_shown_and_its_end(
    browser: Browser, server: EmbeddedServer, tiny_models: Path, pictures: Path
) -> None:
    await migrate_at(server.dsn())
    await asyncio.to_thread(admin, server.dsn(), f"CREATE ROLE {RUNTIME_ROLE} LOGIN IN ROLE sidecar_runtime")
    async with attached(server.dsn(), server.dsn(user=RUNTIME_ROLE), tiny_models) as (daemon, connection):
        await bury(connection)
        async with browser.page(daemon.url) as page:
            await page.shows("[data-at=letter-rows]", "too_large")
            await page.shows("#headline", "Ready")
            await asyncio.to_thread(server.stop)
            await page.shows("#headline", "Not ready", timeout=60)
            await page.shows("#reasons", "cannot reach the database")
            assert (await page.text("#reasons")).count("cannot reach") == 1, "one cause is one line"
            await page.shows(".card .state", "waiting")
            assert re.search("circuit (open|half open)", await page.text(".card .circuit"))
            await page.shows("#age", "queues as of", timeout=60)
            assert "too_large" in await page.text("[data-at=letter-rows]"), "what was seen before stays"
            assert (await page.js(CONTRAST))["poor"] == []
            assert await page.js("document.title") == "Not ready · sidecar-daemon"
            await page.picture(pictures / "page-outage.png")
            await asyncio.to_thread(server.start)
            await page.shows("#headline", "Ready", timeout=60)
            await page.shows(".card .circuit", "circuit closed")
            await eventually(lambda: empty(page, "#reasons"))
            assert_clean(page, daemon.url)


async def empty(page: Page, selector: str) -> bool:
    return await page.text(selector) == ""


async def test_a_daemon_that_is_gone_is_said_so_with_the_age_of_what_is_shown(
    browser: Browser, working: tuple[Daemon, asyncpg.Connection]
) -> None:
    daemon, _ = working
    async with browser.page(daemon.url) as page:
        await page.shows("#headline", "Ready")
        await page.shows("#age", "updated every 2 s")
        await daemon.kill()
        await page.shows("#headline", "The daemon does not answer")
        assert await page.text("#reasons") == "What you see is its last answer."
        await page.shows("#age", "shown: state of")
        await eventually(lambda: older(page, 3))
        assert await page.text("[data-at=name]") == "notes", "the last answer stays"
        await daemon.start()
        await page.shows("#headline", "Ready")
        await page.shows("#age", "updated every 2 s")
        assert page.foreign_requests(daemon.url) == []


async def older(page: Page, seconds: int) -> bool:
    found = re.search(r"state of ([\d.]+) s ago", await page.text("#age"))
    return bool(found and float(found.group(1)) >= seconds)


async def test_updates_can_be_held_by_keyboard(browser: Browser, working: tuple[Daemon, asyncpg.Connection]) -> None:
    daemon, connection = working
    async with browser.page(daemon.url) as page:
        await page.shows("#headline", "Ready")
        await page.press("Tab")
        assert await page.js("document.activeElement.textContent") == "Skip to the pipelines"
        await page.press("Tab")
        assert await page.js("document.activeElement.id") == "hold"
        assert await page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        await page.press("Enter")
        await page.shows("#hold", "Resume updates")
        await bury(connection)
        await eventually(lambda: older(page, 4))
        assert await page.text("[data-at=no-letters]") == "None."
        await page.press("Enter")
        await page.shows("[data-at=letter-rows]", "too_large")
        await page.shows("#hold", "Hold updates")
        assert_clean(page, daemon.url)


async def test_it_is_told_to_those_who_cannot_see_it(
    browser: Browser, working: tuple[Daemon, asyncpg.Connection]
) -> None:
    daemon, connection = working
    await write(connection, 30)
    await bury(connection, "a key")
    async with browser.page(daemon.url) as page:
        await page.shows("[data-at=letter-rows]", "too_large")
        roles = await page.roles()
        names = {role: [name for each, name in roles if each == role] for role, _ in roles}
        for landmark in ("banner", "main", "contentinfo", "navigation", "status"):
            assert len(names[landmark]) == 1, landmark
        assert names["heading"][:2] == ["sidecar-daemon", "notes"]
        assert "notes" in names["region"]
        assert {"Messages by lane", "The newest dead letters"} <= set(names["table"])
        assert {"live", "bulk", "a key"} <= set(names["rowheader"])
        pictures = [name for name in names["image"] if name]
        assert [name.split(" in ")[0] for name in pictures] == ["Embedded", "Queued", "Freshness"]
        assert all("now" in name or "within" in name or "nothing" in name for name in pictures)
        live = await page.js(
            "[...document.querySelectorAll('[aria-live], [role=status], [role=alert]')].map(e => e.id)"
        )
        assert live == ["announced"], "only the verdict is spoken by itself"
        watch = "new MutationObserver(() => { window.spoken = (window.spoken || 0) + 1; })"
        options = "{ subtree: true, childList: true, characterData: true }"
        await page.js(f"{watch}.observe(document.getElementById('announced'), {options}), 0")
        asked = sum("/overview" in url for url in page.requests)
        await eventually(lambda: sum("/overview" in url for url in page.requests) >= asked + 3)
        assert await page.js("window.spoken || 0") == 0, "it is silent while nothing changes"
        assert_clean(page, daemon.url)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_it_is_readable_on_a_phone_and_in_the_dark(
    browser: Browser, working: tuple[Daemon, asyncpg.Connection], pictures: Path, *, dark: bool
) -> None:
    daemon, connection = working
    await write(connection, 100)
    await bury(connection, "0f8fad5b-d9cb-469f-a165-70867728950e" * 3)
    await connection.execute("CREATE TABLE titles (id bigint PRIMARY KEY, body text)")
    await connection.execute("SELECT sidecar.attach('titles', '{body}', p_model => 'tiny', p_dimensions => 32)")
    await connection.execute("SELECT sidecar.set_enabled('titles', false)")
    async with browser.page(daemon.url, width=360, height=740, dark=dark) as page:
        await page.shows("[data-at=letter-rows]", "too_large")
        await page.shows("#pipeline-titles .state", "paused")
        scroller = "document.documentElement"
        assert await page.js(f"[{scroller}.clientWidth, {scroller}.scrollWidth]") == [360, 360]
        outside = (
            "[...document.querySelectorAll('body *:not(.unseen):not(.skip)')].filter((e) => e.checkVisibility() && "
            "!e.closest('svg') && e.getBoundingClientRect().right > 360.5).map((e) => e.outerHTML.slice(0, 80))"
        )
        assert await page.js(outside) == [], "nothing is cut off either"
        ground = await page.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (max(ground) < 60) is dark
        contrast = await page.js(CONTRAST)
        assert contrast["looked"] > 60
        assert contrast["poor"] == []
        await page.picture(pictures / f"page-phone{'-dark' if dark else ''}.png")
        await page.resize(1280, 900)
        assert (await page.js(CONTRAST))["poor"] == []
        await page.picture(pictures / f"page-{'dark' if dark else 'two'}.png")
        assert_clean(page, daemon.url)


async def test_a_chart_says_what_stands_under_the_pointer(
    browser: Browser, working: tuple[Daemon, asyncpg.Connection]
) -> None:
    daemon, connection = working
    await write(connection, 40)
    async with browser.page(daemon.url) as page:
        await eventually(lambda: embedded(page, 40), 60)
        box = await page.js(
            "(({ left, top, width, height }) => [left, top, width, height])"
            "(document.querySelector('[data-chart=depth] svg').getBoundingClientRect())"
        )
        left, top, width, height = box
        await page.point(left + width - 1, top + height / 2)
        await page.shows("[data-chart=depth] .at", "just now: ")
        await page.point(left + 1, top + height / 2)
        await eventually(lambda: empty(page, "[data-chart=depth] .at"))
        assert_clean(page, daemon.url)
