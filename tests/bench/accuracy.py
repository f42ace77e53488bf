"""Beside every speed, what it costs: cosine to the fp32 reference, and whether a vector depends on its batch mates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sidecar_daemon.domain.messages import Vectors
    from tests.bench.contest import Contestant
    from tests.bench.corpora import Corpora

REFERENCES = ("sentence_transformers_fp32", "ours_fp32")
"""Whose vectors, one document a run, are the reference: torch's where it is there."""
BATCHES_A_TEXT = 3
MATES = 8


async def accuracy(corpora: Corpora, contestants: Mapping[str, Contestant], count: int) -> dict[str, Any]:
    """Cosine mean and min of every contestant to the reference, and its own worst case in random batches.

    Args:
        corpora: where the texts come from: half docstrings, half bimodal.
        contestants: by name.
        count: texts.
    """
    texts = corpora.named("docstrings", count - count // 2) + corpora.named("bimodal", count // 2)
    rng = corpora.rng("invariance")
    orders = [rng.sample(range(len(texts)), len(texts)) for _ in range(BATCHES_A_TEXT)]
    alone = {name: await _alone(one, texts) for name, one in contestants.items()}
    reference = next(name for name in REFERENCES if name in alone)
    found = {}
    for name, one in contestants.items():
        similar = cosines(alone[name], alone[reference])
        together = [await _together(one, texts, order) for order in orders]
        found[name] = {
            "reference": reference,
            "cosine_mean": round(float(similar.mean()), 7),
            "cosine_min": round(float(similar.min()), 7),
            "batch_cosine_min": round(min(float(cosines(each, alone[name]).min()) for each in together), 7),
            "batch_max_difference": float(f"{max(float(np.abs(e - alone[name]).max()) for e in together):.2e}"),
        }
    return found


def cosines(left: Vectors, right: Vectors) -> Vectors:
    """Cosine of each pair of rows, in float64. Shapes ``(n, dimensions)``, result ``(n,)``."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    return np.asarray((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))


async def _alone(contestant: Contestant, texts: list[str]) -> Vectors:
    return np.concatenate(await contestant.vectors([[text] for text in texts]))


async def _together(contestant: Contestant, texts: list[str], order: list[int]) -> Vectors:
    """Vectors in the order of the texts, embedded in batches of ``MATES`` in another order."""
    batches = [order[first : first + MATES] for first in range(0, len(order), MATES)]
    rows = np.concatenate(await contestant.vectors([[texts[place] for place in batch] for batch in batches]))
    found = np.empty_like(rows)
    found[order] = rows
    return found
