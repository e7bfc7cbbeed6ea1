"""A step's scored answers on disk, every log-probability to its last bit: what the learner was given, to give it again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from causalrm_ray.conversation import Conversation
from causalrm_ray.data.parquet import read_parquet, write_parquet
from causalrm_ray.errors import InputError
from causalrm_ray.types import Completion, Prompt, Scored, Span

ROLLOUT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float64())),
        ("stop_reason", pa.string()),
        ("policy_version", pa.int64()),
        ("span_versions", pa.list_(pa.int64())),
        ("span_tokens", pa.list_(pa.int32())),
        ("reward", pa.float64()),
        ("reward_version", pa.int64()),
    ]
)


def write_rollout(scored: Sequence[Scored], path: Path) -> None:
    """Write a step's answers as Parquet, whole or not at all."""
    rows = [
        {
            "id": answer.completion.prompt.id,
            "prompt": answer.completion.prompt.conversation.json,
            "prompt_ids": answer.completion.prompt.token_ids,
            "response": answer.completion.response,
            "token_ids": answer.completion.token_ids,
            "logprobs": answer.completion.logprobs,
            "stop_reason": answer.completion.stop_reason,
            "policy_version": answer.completion.policy_version,
            "span_versions": [span.version for span in answer.completion.spans],
            "span_tokens": [span.tokens for span in answer.completion.spans],
            "reward": answer.reward,
            "reward_version": answer.reward_version,
        }
        for answer in scored
    ]
    write_parquet(pa.Table.from_pylist(rows, ROLLOUT_SCHEMA), path)


def read_rollout(path: Path) -> list[Scored]:
    """What `write_rollout` wrote. Raises InputError for a file that is no rollout."""
    table = read_parquet(path, "a rollout in Parquet")
    if not table.schema.equals(ROLLOUT_SCHEMA):
        raise InputError(f"{path} must have the columns {', '.join(ROLLOUT_SCHEMA.names)}, got {', '.join(table.schema.names)}")
    for name in table.column_names:
        column = table[name].combine_chunks()
        if nulls := column.null_count + (column.flatten().null_count if pa.types.is_list(column.type) else 0):
            raise InputError(f"{path}: {name} must be given in every row, got {nulls} nulls")
    return [_scored(row) for row in table.to_pylist()]


def _scored(row: dict) -> Scored:
    completion = Completion(
        prompt=Prompt(row["id"], Conversation(row["prompt"]), tuple(row["prompt_ids"])),
        response=row["response"],
        token_ids=tuple(row["token_ids"]),
        logprobs=tuple(row["logprobs"]),
        stop_reason=row["stop_reason"],
        policy_version=row["policy_version"],
        spans=tuple(map(Span, row["span_versions"], row["span_tokens"])),
    )
    return Scored(completion, row["reward"], row["reward_version"])


def kept_steps(folder: Path) -> list[int]:
    """Steps whose rollouts are kept, in order."""
    names = [re.fullmatch(r"step-(\d+)\.parquet", file.name) for file in (folder / "rollouts").glob("step-*.parquet")]
    return sorted(int(name[1]) for name in names if name)


def rollout_path(folder: Path, step: int) -> Path:
    """Where the rollout of a step lies."""
    return folder / "rollouts" / f"step-{step}.parquet"


def forget_rollouts(folder: Path, before: int) -> None:
    """Delete the rollouts of earlier steps."""
    for step in kept_steps(folder):
        if step < before:
            rollout_path(folder, step).unlink()
