"""A fitted reward model, as a user calls it: messages and an answer in, the probability that a user likes the answer out.

folder --load--> RewardModel          messages, answer --chat template--> token ids --model--> logit --> P(r* = 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from causalrm_ray.conversation import Conversation
from causalrm_ray.models.kernels import text_config
from causalrm_ray.models.states.rows import RowReader
from causalrm_ray.models.states.scorer import RowScorer, backbone_of, load_scorer
from causalrm_ray.models.text import load_tokenizer
from causalrm_ray.types import Truncation

Messages = str | Sequence[Mapping[str, Any]]


class RewardModel:
    """Scores answers with a model that `causalrm-ray fit-reward` wrote; `load` makes one."""

    def __init__(self, scorer: RowScorer, reader: RowReader) -> None:
        self._scorer, self._reader = scorer, reader

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        backbone: str | None = None,
        max_length: int | None = None,
        truncation: Truncation = "refuse",
        device: str = "cpu",
    ) -> RewardModel:
        """The model in a folder, or of a hub id, on a torch `device`; `backbone` is where the language model of its heads is now,
        if it was moved.

        `max_length` is the longest prompt and answer, in tokens (None: what the backbone can read); `truncation` says whether
        what is longer is refused, or read without its "oldest" turns. Raises CheckpointError for a head whose backbone is gone
        or another one, InputError for a folder without a model.
        """
        scorer = load_scorer(folder, device, backbone=backbone)
        model = backbone or backbone_of(folder)
        longest = max_length or getattr(text_config(model), "max_position_embeddings", None)
        if longest is None:
            raise ValueError(f"max_length must be given: the configuration of {model} does not say how long a text may be")
        reader = RowReader(load_tokenizer(str(folder)), longest, truncation, what="answer", section="")
        return cls(scorer, reader)

    def score(self, messages: Messages, answer: str) -> float:
        """P(a user likes `answer`), in (0, 1). `messages` are what it replies to: OpenAI's form, or the text of one user turn.

        Raises ConversationError for messages that are no conversation, InputError for what is too long.
        """
        return float(self.score_batch([messages], [answer])[0])

    def score_batch(self, messages: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        """The same [N] (float32) of N answers."""
        return torch.sigmoid(torch.from_numpy(self.logits(messages, answers))).numpy()

    def logits(self, messages: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        """Their logits [N] (float32), what a policy is rewarded by."""
        pairs = enumerate(zip(messages, answers, strict=True))
        rows = [self._reader.read(str(number), _prompt(asked).json, answer).row for number, (asked, answer) in pairs]
        return self._scorer.score(rows).numpy()


def _prompt(messages: Messages) -> Conversation:
    return Conversation.user(messages) if isinstance(messages, str) else Conversation.of(messages)
