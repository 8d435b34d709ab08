"""Shares of a GPU -> counts of SMs (on a CPU: cores), at the granularity the hardware grants. Pure integers.

share 0.33 of 132 SMs, 8 at a time  ->  40 SMs        (never more than asked, never less than one grain)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mosaic.errors import PlanError, QuotaError


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Share of a GPU's SMs (of a rank's cores on a CPU) that a module may use."""

    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise PlanError("quota", got=self.share, expected="a share in (0, 1]", fix="omit it for the whole GPU")


def grant_quota(share: float, num_sms: int, granularity: int) -> int:
    """SMs that a share is granted: rounded down to a multiple of `granularity`, at least one grain.

    The whole GPU (share 1) is granted whole, whether or not the grain divides it.
    """
    _validate(num_sms, granularity)
    if not 0 < share <= 1:
        raise QuotaError("quota", got=share, expected="a share in (0, 1]", fix="omit it for the whole GPU")
    if share == 1:
        return num_sms
    # 1e-9: a share written as granted / num_sms must be granted back in full
    return max(granularity, int(share * num_sms + 1e-9) // granularity * granularity)


def grantable_counts(num_sms: int, granularity: int) -> tuple[int, ...]:
    """Every count that can be granted, ascending; the last is the whole GPU."""
    _validate(num_sms, granularity)
    return (*range(granularity, num_sms, granularity), num_sms)


def validate_concurrent(shares: Mapping[str, float], num_sms: int, granularity: int) -> None:
    """Raise QuotaError unless modules that run beside each other on one GPU fit on it."""
    granted = {module: grant_quota(share, num_sms, granularity) for module, share in shares.items()}
    if sum(granted.values()) > num_sms:
        raise QuotaError(
            "quota of " + ", ".join(granted),
            got=" + ".join(map(str, granted.values())) + f" = {sum(granted.values())} SMs",
            expected=f"at most {num_sms} in all, {granularity} at a time",
            fix="lower a share, or give a module its own ranks",
        )


def _validate(num_sms: int, granularity: int) -> None:
    if num_sms < 1 or not 1 <= granularity <= num_sms:
        raise QuotaError(
            "hardware granularity",
            got=f"{granularity} of {num_sms} SMs",
            expected="at least 1 SM, and a granularity from 1 to that",
            fix="correct the GPU type",
        )
