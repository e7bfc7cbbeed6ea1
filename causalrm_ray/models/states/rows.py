"""Rows of a log as a backbone reads them: token ids, and where the answer begins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from causalrm_ray.conversation import Conversation, ConversationError
from causalrm_ray.errors import InputError
from causalrm_ray.models.states.pooled import Row
from causalrm_ray.models.text import encode_prompt, truncate_pair
from causalrm_ray.truncation import TooLongError
from causalrm_ray.types import Truncation


@dataclass(frozen=True, slots=True)
class ReadRow:
    """A row of a log, and the turns and tokens that it lost to be no longer than a model reads."""

    row: Row
    lost_turns: int
    lost_tokens: int


class RowReader:
    """Reads rows of a log as `model.max_length` and `model.truncation` say; of another caller, whose options are called so
    without `section`, other things than impressions, `what`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        truncation: Truncation,
        what: str = "impression",
        section: str = "model.",
    ) -> None:
        self._tokenizer, self._max_length, self._truncation = tokenizer, max_length, truncation
        self._what, self._section = what, section
        self._prompt_tokens = lru_cache(maxsize=4096)(lambda prompt: len(encode_prompt(tokenizer, prompt)))

    def read(self, impression: str, prompt: str, response: str) -> ReadRow:
        """Ids of a prompt (JSON of its messages), of the answer and of its end. Raises InputError that names the impression
        for a row that is too long, or that the chat template refuses."""
        try:
            found = truncate_pair(self._tokenizer, Conversation(prompt), response, self._max_length, self._truncation)
        except TooLongError as error:
            why = f"at most {self._max_length} tokens (model.max_length){error}".replace("model.", self._section)
            raise InputError(f"{self._what} {impression!r} must have {why}") from error
        except ConversationError as error:
            raise InputError(f"{self._what} {impression!r}: {error}") from error
        start = min(self._prompt_tokens(found.prompt), len(found.ids) - 1)  # a tokenizer may join the two where they meet
        return ReadRow(Row(found.ids[:start], found.ids[start:]), found.turns, found.tokens)
