"""Do tokenizer, chat template and generation settings go with the embedding?"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from causalrm_ray.conversation import ConversationError
from causalrm_ray.errors import InputError
from causalrm_ray.models.text import encode_pair, generation_stops

_PROBES = (("Hello", "Yes, of course."), ("What is 2 + 2?", "- 4"))  # prompts, and answers as they begin


def check_tokens(model: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise InputError unless every id that prompts, answers and their ends can hold is one of the `rows` of the embedding.

    Tokens beyond them are tolerated where nothing can produce them: special ones that the template does not write, since those
    that users write are read as text.
    """
    try:
        written = [encode_pair(tokenizer, prompt, answer) for prompt, answer in _PROBES]
    except ConversationError as error:
        raise InputError(f"{model}: {error}") from error
    reached = {token for ids in written for token in ids}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    beyond = [(token, text) for text, token in tokenizer.get_vocab().items() if token >= rows]
    if wrong := sorted((token, text) for token, text in beyond if token not in special or token in reached):
        raise InputError(
            f"{model}: the embedding must have a row for every token that a text can become, {len(wrong)} of the tokenizer are "
            f"beyond its {rows} rows, such as {wrong[0][1]!r}, {wrong[0][0]}: resize it (resize_token_embeddings) and train "
            "them, or take the tokenizer that the model was trained with"
        )
    _check_ids(model, "generation_config.json: eos_token_id", generation_stops(model), rows)


def _check_ids(model: str, what: str, ids: Iterable[int], rows: int) -> None:
    for token in ids:
        if not 0 <= token < rows:
            raise InputError(f"{model}: {what} must be ids of the {rows} rows of the embedding, got {token}")
