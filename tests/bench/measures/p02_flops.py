"""P2: what share of the processor's peak the model uses, counting real tokens only."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from tests.bench.arithmetic import spread
from tests.bench.folders import SHAPE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.bench.contest import Contestant
    from tests.bench.workplace import Workplace

LINEAR_FLOPS = 42.5e6
"""A token, in the linear layers of gte-small: 12 layers of 384 by 384 (four times) and 384 by 1536 (twice)."""
ATTENTION_FLOPS = 18.4e3
"""A token and a token of its window, in the attention of gte-small: 12 layers of 2 products of 384."""
LAYERS = 12
PEAK_SECONDS = 1.0


def flops(lengths: Iterable[int], layers: int = LAYERS) -> float:
    """What the real tokens of windows of these lengths cost in a model of this width."""
    return sum(length * (LINEAR_FLOPS + ATTENTION_FLOPS * length) for length in lengths) * layers / LAYERS


async def run(place: Workplace) -> None:
    """Both precisions: each against the peak of its own."""
    texts = (await place.corpora()).named("docstrings", place.pick(24, 80, 400))
    for precision, runtime in place.precisions().items():
        async with AsyncExitStack() as stack:
            ours = await stack.enter_async_context(place.ours(SHAPE, runtime))
            torch = await stack.enter_async_context(await place.peer("torch-fp32")) if precision == "bf16" else None
            await _one(place, precision, ours, torch, texts)
    if "bf16" not in place.precisions():
        place.report.leave_out("P2_bf16", place.why_no_bf16())


async def _one(place: Workplace, precision: str, ours: Contestant, torch: Contestant | None, texts: list[str]) -> None:
    await ours.ask("texts", name="docstrings", texts=texts)
    work = flops(await ours.ask("tokens", texts=texts)) / 1e9
    shares, peaks, achieved = [], [], []
    for number in range(place.rounds):
        if torch is None:
            peak = (await place.calibrate(PEAK_SECONDS))["best"]
        else:
            peak = (await torch.ask("peak", dtype="bfloat16", seconds=PEAK_SECONDS))["gflops"]
        seconds = (await ours.ask("speed", name="docstrings"))["seconds"]
        if number:
            shares.append(work / seconds / peak)
            peaks.append(peak)
            achieved.append(work / seconds)
    found = spread(shares)
    place.say(f"  P2 {precision}: {found.median:.3f} of {spread(peaks).median:,.0f} GFLOP/s")
    place.report.figure(f"P2_{precision}", found.median)
    place.report.tables[f"flops_{precision}"] = {
        "share": found.rounded(),
        "peak_gflops": spread(peaks).rounded(1),
        "achieved_gflops": spread(achieved).rounded(1),
        "documents_a_second": round(len(texts) * spread(achieved).median / work, 1),
    }
