"""Options of erasing what a log, and a run's folder, hold of a person."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from causalrm_ray.config.base import RunFolder, Section


class ForgetConfig(Section):
    """Whom or what to forget, where."""

    user: str | None = Field(None, min_length=1, description="user all of whose impressions, and events about them, go")
    impression: str | None = Field(None, min_length=1, description="id of one impression that goes, with all events about it")
    url: str | None = Field(None, description="SQLAlchemy URL of the log; null: the log of the run")
    run: RunFolder = RunFolder()

    @field_validator("user", "impression", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:  # read as a number, an id would lose its zeros
        if value is not None and not isinstance(value, str):
            raise ValueError("must be text: put a number in quotes, such as user='\"007\"'")
        return value

    @model_validator(mode="after")
    def _one_thing(self) -> ForgetConfig:
        if (self.user is None) == (self.impression is None):
            raise ValueError("user or impression: exactly one must be given")
        return self
