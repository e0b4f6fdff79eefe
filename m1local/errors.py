"""The errors whose messages are written for the user.

What it is: one exception per kind of mistake a user can mend. The front ends print the message
bare, so it says what is wrong, where, and what to do. What it is not: the place for a
programmer's mistakes, which stay `ValueError` and `TypeError` and keep their traceback.
"""


class M1Error(Exception):
    """An error whose message is written for the user; the front ends print it bare."""


class CheckpointError(M1Error):
    """A checkpoint's files are missing, damaged, foreign or unfinished."""


class ConfigError(CheckpointError):
    """config.json lacks a key, or holds a value this runtime does not compute."""


class TokenizerError(CheckpointError):
    """The tokenizer's files are missing, damaged or of another model."""


class RecipeError(M1Error):
    """A recipe does not exist, cannot be read, or does not fit the model."""


class CalibrationError(M1Error):
    """The text to measure or calibrate with is missing, binary, malformed or too short."""


class StorageError(M1Error):
    """The disk is full, read-only, or the target is occupied."""


class HubError(M1Error):
    """The model hub cannot be reached, refuses, or sent something else than it publishes."""


class ContextLengthError(M1Error):
    """More tokens than the context holds."""


class MemoryLimitError(M1Error):
    """What was asked for does not fit into memory; says needed, there, and what to try."""


class SamplingError(M1Error):
    """A sampling parameter is out of its range."""


class DependencyError(M1Error):
    """An optional package that this checkpoint or command needs is not installed."""
