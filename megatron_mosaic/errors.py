"""What a user is told when something cannot be done: where, got, expected, fix. One class per 'who must act'."""

_MAX_CHARACTERS = 10_000  # of one part: room for a traceback, none for a file that was quoted whole


class MosaicError(ValueError):
    """An error that the user can act on.

    `where` names the place (a file and a key, a rank and an action), `got` and `expected` the two values that
    disagree, `fix` the shortest way out.
    """

    def __init__(self, where: str, *, got: object, expected: str, fix: str) -> None:
        self.where, self.got, self.expected, self.fix = map(_cut, (where, str(got), expected, fix))
        super().__init__(f"{self.where}\n  got:      {self.got}\n  expected: {self.expected}\n  fix:      {self.fix}")

    def as_dict(self) -> dict[str, str]:
        """The four parts, for `--json`."""
        return {
            "error": type(self).__name__,
            "where": self.where,
            "got": self.got,
            "expected": self.expected,
            "fix": self.fix,
        }


def _cut(text: str) -> str:
    half = _MAX_CHARACTERS // 2
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


class ConfigError(MosaicError):
    """A workload, cluster or command-line override is wrong."""


class PlanError(MosaicError):
    """A plan file is wrong, or does not fit its workload or cluster."""


class ScheduleError(MosaicError):
    """A schedule is incomplete, deadlocks, cannot be parsed, or is not the plan's."""


class QuotaError(MosaicError):
    """Shares of a GPU cannot be granted."""


class ProfileError(MosaicError):
    """A measurement that the cost model needs is missing or out of its range."""


class VersionError(MosaicError):
    """The installed Megatron is not the one this code knows."""


class GroupError(MosaicError):
    """Code of a module reaches for process groups that are not its own."""


class BatchError(MosaicError):
    """Two ranks do not hold the same samples, or not the same rows of them."""


class RankFailure(MosaicError):
    """A worker process failed while it ran an action."""
