"""Options of the job that looks at a log."""

from __future__ import annotations

import warnings

from pydantic import Field

from causalrm_ray.config.train import Config

with warnings.catch_warnings():  # pydantic's own deprecated method has this name
    warnings.simplefilter("ignore", UserWarning)

    class CheckConfig(Config):
        """Options of check-log: those of a fit, so that it reads the log as the fit would."""

        json: bool = Field(False, description="print one JSON object in the place of tables")  # type: ignore[assignment]
