"""P4: the model only, against what a user would pick instead: same texts, same threads, each peer at its best."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.bench.accuracy import accuracy
from tests.bench.contest import ContestantError
from tests.bench.folders import TRAINED
from tests.bench.machine import NO_BF16, has_bf16, second_runtime
from tests.bench.measures.p02_flops import flops
from tests.bench.peers import PeersError
from tests.bench.rounds import Rounds

if TYPE_CHECKING:
    from tests.bench.contest import Contestant
    from tests.bench.workplace import Workplace

TRAINED_LAYERS = 6
BATCHES = (1, 4, 8, 16, 32, 64)
FEWER_BATCHES = (1, 8, 32)
"""For the corpora on which no goal stands."""
PEERS = {
    "fastembed_tuned": "fastembed",
    "sentence_transformers_fp32": "torch-fp32",
    "sentence_transformers_bf16": "torch-bf16",
    "sentence_transformers_onnx": "onnx",
}
GATED = {
    "sentence_transformers_fp32": "ours_fp32",
    "sentence_transformers_bf16": "ours_bf16",
    "fastembed_tuned": "ours_fp32",
}
"""Each peer is held against ours in its own precision."""
SIZES = {"docstrings": 240, "titles": 600, "500_tokens": 16, "bimodal": 80, "constant_128": 80}
"""Documents of one block at full size: some seconds each."""
DEFAULT = "fastembed_default"
DEFAULT_BATCH = 256


async def run(place: Workplace) -> None:
    """All contestants that can be had here, on all corpora."""
    async with AsyncExitStack() as stack:
        contestants = await _contestants(place, stack)
        table: dict[str, Any] = {"contestants": {name: await one.ask("about") for name, one in contestants.items()}}
        place.report.tables["model_only"] = table
        table["accuracy"] = await accuracy(await place.corpora(), contestants, place.pick(6, 8, 96))
        names = place.pick(["docstrings"], ["docstrings"], list(SIZES))
        table["corpora"] = {}
        for name in names:
            table["corpora"][name] = await _corpus(place, name, contestants)
        if "fastembed_tuned" in contestants:
            table["corpora"]["docstrings"][DEFAULT] = await _default(place, contestants)


async def _contestants(place: Workplace, stack: AsyncExitStack) -> dict[str, Contestant]:
    """Ours on each runtime, and every peer that can be installed; a peer that cannot is broken, not left out."""
    await place.corpora()
    wanted = {"ours_fp32": place.ours(TRAINED)}
    precision, why = second_runtime()
    if precision is None:
        place.report.left_out["ours on the second runtime"] = why
    else:
        wanted[f"ours_{precision}" if precision == "bf16" else "ours_second_runtime"] = place.ours(TRAINED, "openvino")
    for name, kind in PEERS.items():
        if kind == "torch-bf16" and not has_bf16():
            place.report.left_out[name] = NO_BF16
            continue
        if name not in GATED and place.report.profile == "quick":
            place.report.left_out[name] = "a quick run measures only what a goal stands on"
            continue
        try:
            wanted[name] = await place.peer(kind)
        except PeersError as error:
            place.report.broken[name] = str(error)
    found = {}
    for name, contestant in wanted.items():
        try:
            found[name] = await stack.enter_async_context(contestant)
            await found[name].ask("about")
        except ContestantError as error:
            place.report.broken[name] = str(error)
            found.pop(name, None)
    if "ours_bf16" not in found:
        place.report.leave_out("P4_sentence_transformers_bf16", place.why_no_bf16())
    return found


async def _corpus(place: Workplace, name: str, contestants: dict[str, Contestant]) -> dict[str, Any]:
    corpora = await place.corpora()
    texts = corpora.named(name, place.pick(12, 120, SIZES[name]))
    place.say(f"  P4 {name}: {corpora.described(texts)}")
    for contestant in contestants.values():
        await contestant.ask("texts", name=name, texts=texts)
    tuned, tried = await _tune(place, name, contestants, max(8, len(texts) // 3))
    rounds = Rounds(place, f"P4 {name}")
    turns = {
        one: partial(contestant.ask, "speed", name=name, batch=tuned.get(one))
        for one, contestant in contestants.items()
    }
    await rounds.play(turns, place.rounds)
    ratios: dict[str, Any] = {}
    for peer in PEERS:
        ours = GATED.get(peer, "ours_fp32")
        if peer in contestants and ours in contestants:
            ratios[peer] = {"against": ours, **rounds.ratio(ours, peer)}
            if name == "docstrings" and peer in GATED:
                place.report.figure(f"P4_{peer}", ratios[peer]["median"])
    work = flops(await contestants["ours_fp32"].ask("tokens", texts=texts), TRAINED_LAYERS) / len(texts) / 1e9
    summary = rounds.summary()
    return {
        "corpus": corpora.described(texts),
        "ours_over": ratios,
        "achieved_gflops": {one: round(rate["median"] * work, 1) for one, rate in summary["rates"].items()},
        "best_batch": tuned,
        "tuning_documents_a_second": tried,
        **summary,
    }


async def _tune(
    place: Workplace, name: str, contestants: dict[str, Contestant], count: int
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """The best batch size of every peer, on the corpus's first texts; and what each size gave."""
    sizes = place.pick((1, 8), (1, 8, 32), BATCHES if name == "docstrings" else FEWER_BATCHES)
    best, tried = {}, {}
    for peer in PEERS:
        if peer not in contestants:
            continue
        await contestants[peer].ask("speed", name=name, batch=sizes[0], count=min(4, count))  # warms up
        rates = {}
        for size in sizes:
            done = await contestants[peer].ask("speed", name=name, batch=size, count=count)
            rates[size] = done["amount"] / done["seconds"]
        best[peer] = max(rates, key=lambda size, rates=rates: rates[size])  # type: ignore[misc]  # the default binds
        tried[peer] = {str(size): round(rate, 1) for size, rate in rates.items()}
        place.say(f"  P4 {name}: {peer} is best with batches of {best[peer]}")
    return best, tried


async def _default(place: Workplace, contestants: dict[str, Contestant]) -> dict[str, Any]:
    """How fastembed comes: batches of 256 in file order, padded to the longest. Slow, so fewer texts and by itself."""
    texts = (await place.corpora()).named("docstrings", place.pick(12, 24, DEFAULT_BATCH // 2))
    both = {"ours_fp32": contestants["ours_fp32"], DEFAULT: contestants["fastembed_tuned"]}
    for contestant in both.values():
        await contestant.ask("texts", name="default", texts=texts)
    rounds = Rounds(place, "P4 fastembed's default")
    await rounds.play({name: partial(one.ask, "speed", name="default") for name, one in both.items()}, place.rounds)
    ratio = rounds.ratio("ours_fp32", DEFAULT)
    place.report.figure(f"P4_{DEFAULT}", ratio["median"])
    return {"ratio": ratio, "texts": len(texts), **rounds.summary()}
