"""Errors that a user can fix: each names the thing, the rule and the value. Loads nothing."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used (a log, a prompt file, a run folder): names the thing, the rule and the value."""


class ConfigError(ValueError):
    """A configuration that cannot run: names the key, the rule and the value."""
