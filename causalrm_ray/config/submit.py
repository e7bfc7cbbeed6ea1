"""Options of submitting to a cluster, and of looking at what was submitted."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from causalrm_ray.config.base import Section

ADDRESS = Field(
    None,
    pattern=r"^https?://\S+$",
    description="http://host:port of the cluster's dashboard; null: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or http://127.0.0.1:8265",
)


class SubmitSection(Section):
    """How a job is submitted; everything else on the command line is the job's own."""

    address: str | None = ADDRESS
    working_dir: Path = Field(
        Path("."),
        description="folder that is sent for the job to run in, without runs/, .git, .venv, caches and what .gitignore names",
    )
    env: tuple[str, ...] = Field(
        (), description="environment variables to pass on, such as [HF_TOKEN]; everyone with access to the cluster can read them"
    )
    id: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]+$", description="name of the submission; null: a new one")
    follow: bool = Field(True, description="print the job's log until it ends, and exit with its status; false: return at once")


class SubmitConfig(Section):
    """A job for a cluster."""

    submit: SubmitSection = SubmitSection()


class SubmittedConfig(Section):
    """Jobs that were submitted."""

    address: str | None = ADDRESS
    id: str | None = Field(None, description="submission to show, with its files; null: all of them")
    follow: bool = Field(False, description="print its log until it ends, and exit with its status")
    stop: bool = Field(False, description="end it")

    @model_validator(mode="after")
    def _one_thing_about_one_job(self) -> SubmittedConfig:
        if (self.follow or self.stop) and self.id is None:
            raise ValueError("id: must be given with follow=true or stop=true")
        if self.follow and self.stop:
            raise ValueError("follow=true and stop=true exclude each other")
        return self
