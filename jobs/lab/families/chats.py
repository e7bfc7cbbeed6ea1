"""Conversations of users, each with an answer: what every family is asked."""

from __future__ import annotations

from causalrm_ray.conversation import Conversation

_SECOND_TURN = [
    {"role": "user", "content": "Is the bridge closed?"},
    {"role": "assistant", "content": "Yes, until Monday."},
    {"role": "user", "content": "And the river?"},
]
CHATS: tuple[tuple[Conversation, str], ...] = (
    (Conversation.user("Tell me how the old mill works."), "Sure! The wheel turns the shaft, and the shaft turns the stone."),
    (Conversation.user("How many were late?"), "12 of them: the train had stopped twice.\n\n- one in the north\n- one here"),
    (Conversation.user("  Write it in Python, please.\n"), "```python\ndef area(width, height):\n    return width * height\n```"),
    (Conversation.of(_SECOND_TURN), "high after the rain"),
    (Conversation.user("Wie heißt die Mühle? 水车"), "„Größe“ — été, 水车 \N{THUMBS UP SIGN}"),
)
