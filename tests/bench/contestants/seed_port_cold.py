"""The serial port with a session a document instead of one a process: the other way to read its description.

What was published of the system replaced, 87.5 documents a minute, is 0.69 s a document, most of which no model of this
size needs: loading the model each time would explain it. Nobody says so; hence a row of its own, without a goal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.bench.contestants.queue_reader import serve_reader
from tests.bench.contestants.seed_port import SeedPort

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar_daemon.domain.messages import Vectors


class ColdSeedPort(SeedPort):
    """Loads the model for every document."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """As the port does, on a session of its own."""
        self._session = self.open_session()
        return super().embed(texts)


if __name__ == "__main__":
    serve_reader(ColdSeedPort)
