"""Interleaved rounds: A B B A, a calibration before each block, ratios within rounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.bench.arithmetic import Block, dropped, kept, palindrome, ratios, spread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from tests.bench.workplace import Workplace

    Turn = Callable[[], Awaitable[Mapping[str, float]]]
    """Does one block; answers with its ``amount`` and ``seconds``."""


@dataclass
class Rounds:
    """The blocks of one comparison."""

    workplace: Workplace
    label: str
    blocks: list[Block] = field(default_factory=list)

    async def play(self, turns: Mapping[str, Turn], count: int) -> None:
        """Let all contestants take their turns, forwards and backwards, ``count`` times. The first warms up."""
        for number in range(count):
            for contestant in palindrome(list(turns)):
                calibration = (await self.workplace.calibrate())["median"]
                done = await turns[contestant]()
                self.blocks.append(Block(contestant, number, done["amount"], done["seconds"], calibration))
            shown = ", ".join(f"{name} {self.rate(name, number):,.1f}/s" for name in turns)
            self.workplace.say(f"  {self.label}: round {number}{' (warms up)' if number == 0 else ''}: {shown}")

    def rate(self, contestant: str, number: int | None = None) -> float:
        """Amount a second of one contestant, in one round or as the median of all blocks that count."""
        if number is not None:
            mine = [b for b in self.blocks if b.contestant == contestant and b.round == number]
            return sum(b.amount for b in mine) / sum(b.seconds for b in mine)
        return spread(
            block.rate for block in kept(self.blocks, self.workplace.tolerance) if block.contestant == contestant
        ).median

    def ratio(self, ours: str, theirs: str) -> dict[str, float]:
        """Our rate over theirs: median of the ratios within rounds, with its spread.

        Raises:
            ValueError: too many blocks were dropped: no round has both.
        """
        found = ratios(kept(self.blocks, self.workplace.tolerance), ours, theirs)
        if not found:
            lost = dropped(self.blocks, self.workplace.tolerance)
            raise ValueError(
                f"{self.label}: no round has undisturbed blocks of both {ours} and {theirs}: {lost} of "
                f"{len(self.blocks)} blocks were dropped; run it on a quiet machine, or with --tolerance"
            )
        return spread(found).rounded()

    def summary(self) -> dict[str, Any]:
        """What the JSON keeps beside the ratios."""
        names = list(dict.fromkeys(block.contestant for block in self.blocks))
        counted = kept(self.blocks, self.workplace.tolerance)
        return {
            "rates": {
                name: spread(block.rate for block in counted if block.contestant == name).rounded()
                for name in names
                if any(block.contestant == name for block in counted)
            },
            "blocks": len(self.blocks),
            "dropped": dropped(self.blocks, self.workplace.tolerance),
            "rounds": len({block.round for block in self.blocks if block.round > 0}),
            "calibration_gflops": spread(block.calibration for block in self.blocks).rounded(1),
        }
