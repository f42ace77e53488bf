"""A real Prometheus with our scrape configuration and rules."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from tests.conftest import short_folder
from tests.daemon import free_port
from tests.monitoring import RULES, SCRAPE
from tests.system.tools import tool
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

INTERVAL = "1s"


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running server."""

    url: str

    async def ask(self, path: str, **parameters: str) -> Any:
        """The ``data`` of one call of its HTTP interface; fails with what it complains about."""
        async with httpx.AsyncClient(base_url=self.url, timeout=30.0) as client:
            answer = (await client.get(f"/api/v1/{path}", params=parameters)).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    async def query(self, expr: str) -> list[dict[str, Any]]:
        """The series of an instant query."""
        found: list[dict[str, Any]] = (await self.ask("query", query=expr))["result"]
        return found


@asynccontextmanager
async def prometheus(targets: Sequence[str]) -> AsyncIterator[Prometheus]:
    """Run Prometheus on the repository's configuration and rules, with these targets and a short interval."""
    port = free_port()
    with short_folder() as folder:
        _configure(folder, targets)
        arguments = [
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with (folder / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                tool("prometheus"), *arguments, cwd=folder, stdout=log, stderr=log
            )
        running = Prometheus(f"http://127.0.0.1:{port}")

        async def answers() -> bool:
            assert process.returncode is None, (folder / "log").read_text()[-2000:]
            async with httpx.AsyncClient() as client:
                try:
                    return (await client.get(f"{running.url}/-/ready")).status_code == httpx.codes.OK
                except httpx.TransportError:
                    return False

        try:
            await eventually(answers, 60, "Prometheus")
            yield running
        finally:
            if process.returncode is None:
                process.terminate()
            await asyncio.wait_for(process.wait(), 30)


def _configure(folder: Path, targets: Sequence[str]) -> None:
    configuration = yaml.safe_load(SCRAPE.read_text(encoding="utf-8"))
    configuration["global"] = {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
    (job,) = configuration["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": list(targets)}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    shutil.copy(RULES, folder)
