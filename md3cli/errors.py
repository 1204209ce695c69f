"""The errors of md3: one tree, so that one place can turn any of them into a line and an exit status.

    Md3Error                    exit status 1: the run could not be done
      UsageError                exit status 2: what was typed does not make sense
        OutputMismatchError     OUTPUT was begun by another command (task, model, settings)
      ConfigError               md3.toml, MD3_* environment
      InputError                INPUT or a manifest as a whole cannot be read
        NoImageColumnError      a list has no column with the pictures; has the columns that it has
      OutputError               OUTPUT cannot be written: disk full, permission
        OutputHeldError         another run holds it
      CheckpointError           weights, config or tokenizer are missing, damaged or not understood
      EngineError               the model cannot run here: memory, device
      ExportError               records cannot be turned into the format asked for
      MissingExtraError         an optional dependency is not installed; names the extra

      RowError                  one record, never the run: carries the record's error type
        ImageError              the picture of one record cannot be read
        RequestError            the task, prompt or settings of one record make no sense

Every message says what happened, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class Md3Error(Exception):
    """Base of all expected failures; `str(error)` is the line the user reads."""

    exit_status = 1


class UsageError(Md3Error):
    """What was typed does not make sense; exit status 2."""

    exit_status = 2


class OutputMismatchError(UsageError):
    """OUTPUT was begun with another task, model or settings; the message names the difference."""


class ConfigError(Md3Error):
    """md3.toml or the environment holds an unknown key or a value of the wrong kind."""


class InputError(Md3Error):
    """INPUT as a whole cannot be read; a single bad row or file is an error record instead."""


class NoImageColumnError(InputError):
    """A list with columns has none with the pictures; `columns` are those that it has."""

    def __init__(self, message: str, columns: Sequence[str]) -> None:
        super().__init__(message)
        self.columns = tuple(columns)


class OutputError(Md3Error):
    """OUTPUT cannot be written; records that were counted as done are on disk."""


class DamagedPartError(OutputError):
    """A shard's records are missing, or are not what its marker says; the next start does the shard again, once."""


class OutputHeldError(OutputError):
    """Another run writes OUTPUT; the message names its process."""


class CheckpointError(Md3Error):
    """Weights, config.json or tokenizer.json are missing, damaged or not understood."""


class EngineError(Md3Error):
    """The model cannot run here."""


class ExportError(Md3Error):
    """Records cannot be turned into the format asked for."""


class MissingExtraError(Md3Error):
    """An optional dependency is missing.

    Args:
        feature: what was asked for, as the user names it (`a path with s3://`).
        extra: the extra of this package that brings it (`remote`).
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional part; install it with: pip install 'md3cli[{extra}]'")


class RowError(Md3Error):
    """One request failed: it becomes an error record of type `type`, and the run goes on."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type = type

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return (self.__class__, (self.type, str(self)))  # crosses the decode workers' pipe


class ImageError(RowError):
    """The picture cannot be read; `type` is one of `records.ERROR_TYPES`."""


class RequestError(RowError):
    """The task, prompt or settings of one request make no sense (`bad_request`)."""

    def __init__(self, message: str, type: str = "bad_request") -> None:
        super().__init__(type, message)

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str]]:
        return (self.__class__, (str(self), self.type))
