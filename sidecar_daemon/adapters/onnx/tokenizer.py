"""Text to windows of token ids, exactly as the model was trained, whatever the length of the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from sidecar_daemon.domain.errors import Fatal, Poison
from sidecar_daemon.domain.messages import TokenWindow

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Encoding


@dataclass(frozen=True, slots=True)
class WindowTokenizer:
    """Cuts texts into windows of at most ``max_tokens`` ids: opening tokens, prefix, content, closing tokens.

    Windows do not overlap and their texts join to the whole text. A cut falls between words where a word begins in
    the second half of the window: no word is torn, and a window's text, tokenized alone, gives the window's ids.
    """

    tokenizer: Tokenizer
    before: tuple[int, ...]
    """Opening special tokens and the prefix's tokens."""
    after: tuple[int, ...]
    """Closing special tokens."""
    room: int
    """Content tokens that one window holds."""

    @classmethod
    def load(cls, path: Path, *, max_tokens: int, prefix: str) -> WindowTokenizer:
        """Read a ``tokenizer.json``. Raises ``Fatal`` when it cannot be read or the prefix leaves no room."""
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            # The library raises bare Exception for everything; the path says enough.
            raise Fatal("tokenizer_bad", f"{path} is not a readable tokenizer.json.") from error
        # A pinned file may carry its training set-up's cut at 128 tokens; windows are ours to make.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        before, after = _special_tokens(tokenizer)
        before += tuple(tokenizer.encode(prefix, add_special_tokens=False).ids)
        room = max_tokens - len(before) - len(after)
        if room < 1:
            raise Fatal(
                "prefix_too_long", f"{max_tokens} tokens leave no room beside {len(before + after)} fixed ones."
            )
        return cls(tokenizer=tokenizer, before=before, after=after, room=room)

    def windows(self, text: str) -> list[TokenWindow]:
        """Cut a text. At least one window, also for ``""``.

        Raises:
            Poison: the text is not valid Unicode (a lone surrogate), or the library refuses it or panics at it.
        """
        try:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            # Without the cause: a UnicodeEncodeError carries the text.
            raise Poison("not_unicode", f"the text cannot be encoded as UTF-8 ({type(error).__name__})") from None
        except BaseException as error:
            if not _is_of_the_library(error):
                raise
            # Without what it says: that may quote the text.
            raise Poison("tokenizer_failed", f"the tokenizer failed on the text ({type(error).__name__})") from None
        ids, starts = encoding.ids, [start for start, _ in encoding.offsets]
        cuts = [0, *_cuts(encoding, self.room), len(ids)]
        places = [0, *(starts[cut] for cut in cuts[1:-1]), len(text)]
        return [
            TokenWindow(
                ids=np.array([*self.before, *ids[cuts[number] : cuts[number + 1]], *self.after], dtype=np.int64),
                content_tokens=cuts[number + 1] - cuts[number],
                start=places[number],
                end=places[number + 1],
            )
            for number in range(len(cuts) - 1)
        ]


def _is_of_the_library(error: BaseException) -> bool:
    """Whether an error is the library's own: a bare ``Exception``, or a panic, which is not even that."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _cuts(encoding: Encoding, room: int) -> list[int]:
    """Where windows after the first begin, as token positions."""
    words, cuts, begin = encoding.word_ids, [], 0
    while len(words) - begin > room:
        cut = begin + room
        while cut > begin + room // 2 and words[cut] is not None and words[cut] == words[cut - 1]:
            cut -= 1
        if cut == begin + room // 2:
            cut = begin + room
        cuts.append(cut)
        begin = cut
    return cuts


def _special_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer's template puts before and after a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True)
    inside = [place for place, special in enumerate(full.special_tokens_mask) if not special]
    if not inside or [full.ids[place] for place in inside] != plain:
        raise Fatal("tokenizer_bad", "The tokenizer's template mixes special tokens into the text.")
    return tuple(full.ids[: inside[0]]), tuple(full.ids[inside[-1] + 1 :])
