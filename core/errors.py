"""Errors that the user can correct, and those that stop a run.

`train.py` and the command-line tools turn a `UserError` into one message and exit status 2; every other exception keeps
its traceback.
"""


class UserError(ValueError):
    """A request that cannot be met: says what was given, what is expected and what to do about it."""

    def __init__(self, given: str, *, expected: str, remedy: str) -> None:
        self.given, self.expected, self.remedy = given, expected, remedy
        super().__init__(f"{given}\n  expected: {expected}\n  remedy:   {remedy}")


class StoppedError(RuntimeError):
    """A run that a fault of the machine ended (no memory, no disk): says what happened, what to do, where it goes on.

    `train.py` turns it into one message and exit status 1.
    """

    def __init__(self, given: str, *, expected: str, remedy: str, continues: str) -> None:
        super().__init__(f"{given}\n  expected: {expected}\n  remedy:   {remedy}\n  then:     {continues}")


class CanaryError(RuntimeError):
    """The generator no longer samples from the policy that is being trained (stale weights or a lost adapter)."""


class NonFiniteError(ArithmeticError):
    """A log-prob, reward or loss is not a finite number."""
