"""Errors that a user can cause: one line for the person, one exit code for the script.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a defect in bnrnn: please report it, with the traceback |
| 2 | the command or its settings are wrong; nothing was started |
| 3 | data are missing, could not be fetched, or are not what they should be |
| 4 | a checkpoint or run directory cannot be used |
| 5 | training stopped because a loss or gradient was not finite |
| 6 | nothing can be written: disk full, read-only folder |
| 130, 143 | stopped by Ctrl-C or SIGTERM; the checkpoint is saved |
"""


class BnrnnError(Exception):
    """What is wrong, which setting or file, what to do: in one line."""

    exit_code = 1


class ConfigError(BnrnnError):
    exit_code = 2


class DataError(BnrnnError):
    exit_code = 3


class CheckpointError(BnrnnError):
    exit_code = 4


class NonFiniteError(BnrnnError):
    exit_code = 5


class OutputError(BnrnnError):
    exit_code = 6
