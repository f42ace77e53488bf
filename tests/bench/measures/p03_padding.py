"""P3: how many of the computed tokens are real, documents streaming by in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar_daemon.adapters.onnx.store import TOKENIZER
from sidecar_daemon.adapters.onnx.tokenizer import WindowTokenizer
from sidecar_daemon.settings import Settings
from tests.bench.arithmetic import quantile
from tests.bench.contestants.streaming import WINDOW, Stream
from tests.bench.corpora import LIMIT
from tests.bench.folders import TRAINED

if TYPE_CHECKING:
    from tests.bench.workplace import Workplace


async def run(place: Workplace) -> None:
    """Both mixed corpora, through the real batcher."""
    corpora = await place.corpora()
    limits = Settings.read().worker
    tokenizer = WindowTokenizer.load(place.models / TRAINED / TOKENIZER, max_tokens=LIMIT, prefix="")
    for name in ("docstrings", "bimodal"):
        texts = corpora.named(name, place.pick(300, 1000, 4000))
        stream = Stream(tokenizer.windows, texts, limits.batch_tokens, limits.batch_windows)
        batches = list(stream.batches())
        real, padded = sum(batch.tokens for batch in batches), sum(batch.padded_tokens for batch in batches)
        place.say(f"  P3 {name}: {corpora.described(texts)}")
        place.say(f"  P3 {name}: {real / padded:.3f} of {padded:,} tokens in {len(batches):,} batches")
        place.report.figure(f"P3_{name}", real / padded)
        sizes = [batch.padded_tokens for batch in batches]
        place.report.tables[f"padding_{name}"] = {
            "corpus": corpora.described(texts),
            "window": WINDOW,
            "real_tokens": real,
            "padded_tokens": padded,
            "batches": len(batches),
            "padded_tokens_a_batch": {"p10": quantile(sizes, 0.1), "p50": quantile(sizes, 0.5), "max": max(sizes)},
        }
