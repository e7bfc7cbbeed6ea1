"""Control tokens that people write (`<|im_end|>`, `</s>`): text, and never what they control.

text --mark--> a private character in the place of each --chat template--> text --parts--> what is template's, what was people's
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from causalrm_ray.conversation import ConversationError

_FIRST = 0x100000  # of the last plane of characters that Unicode leaves to private use: nobody writes them


class ControlTokens:
    """The special tokens of a tokenizer, as texts; the longest of those that begin alike are found."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = sorted({text for text in texts if text.strip()}, key=len, reverse=True)
        self._places = {text: chr(_FIRST + place) for place, text in enumerate(self._texts)}
        self._written = re.compile("|".join(map(re.escape, self._texts)) or "(?!)")
        self._marks = re.compile(f"[{chr(_FIRST)}-{chr(_FIRST + max(len(self._texts), 1) - 1)}]")

    def found_in(self, text: str) -> bool:
        """Whether a text holds one."""
        return self._written.search(text) is not None

    def mark(self, text: str) -> str:
        """A text with a mark in the place of each. Raises ConversationError for one that holds a mark of its own."""
        if not text.isascii() and self._marks.search(text):
            raise ConversationError(f"a text must hold no characters for private use from U+{_FIRST:X} on, got one")
        return self._written.sub(lambda found: self._places[found[0]], text)

    def mark_all(self, value: Any) -> Any:
        """The same of all texts in a list of messages or tools."""
        if isinstance(value, Mapping):
            return {key: self.mark_all(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.mark_all(inner) for inner in value]
        return self.mark(value) if isinstance(value, str) else value

    def unmark(self, text: str) -> str:
        """What `mark` was given."""
        return text if text.isascii() else self._marks.sub(lambda found: self._texts[ord(found[0]) - _FIRST], text)

    def parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """The parts of a marked text, and whether each is a control token that was marked."""
        place = 0
        for found in () if text.isascii() else self._marks.finditer(text):
            if found.start() > place:
                yield text[place : found.start()], False
            yield self._texts[ord(found[0]) - _FIRST], True
            place = found.end()
        if place < len(text) or not text:
            yield text[place:], False


@lru_cache(maxsize=32)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Those of a tokenizer, once it is as `load_tokenizer` makes it."""
    return ControlTokens([added.content for added in tokenizer.added_tokens_decoder.values() if added.special])
