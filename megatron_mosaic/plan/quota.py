"""Shares of a GPU -> counts of SMs (on a CPU: cores), at the granularity the hardware grants. Pure integers.

share 0.33 of 132 SMs, 8 at a time         ->  40 SMs       alone: never more than asked, never less than one grain
shares 0.5 and 0.5 beside each other       ->  64 + 68 SMs  jointly: nearest, and nothing left over
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mosaic.errors import PlanError, QuotaError

_ROUNDING = 1e-9  # a share written as granted / num_sms must be granted back in full


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
    return max(granularity, int(share * num_sms + _ROUNDING) // granularity * granularity)


def grantable_counts(num_sms: int, granularity: int) -> tuple[int, ...]:
    """Every count that can be granted, ascending; the last is the whole GPU."""
    _validate(num_sms, granularity)
    return (*range(granularity, num_sms, granularity), num_sms)


def shares_of_tracks(shares: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Track -> its share, from those of its modules (1: the module asks for none).

    A track takes its largest module's. Tracks on which no module asks for any divide what the others leave.
    """
    asked = {track: max([s for s in of_modules if s < 1], default=0.0) for track, of_modules in shares.items()}
    whole = [track for track, share in asked.items() if not share]
    rest = (1 - sum(asked.values())) / len(whole) if whole else 0.0
    if whole and rest <= 0:
        raise QuotaError(
            "quota",
            got=f"{1 - rest * len(whole):.4g} in all, and modules beside them that ask for none",
            expected="less than 1 in all, so that something is left",
            fix="lower a quota, or give every module beside others one",
        )
    return {track: share or rest for track, share in asked.items()}


def require_sum(shares: Mapping[str, float], where: str) -> None:
    """QuotaError if modules that run beside each other ask for more than the device; it names shares that would fit."""
    total = sum(shares.values())
    if total > 1 + _ROUNDING:
        fitting = ", ".join(f"{name}: {share / total:.3g}" for name, share in shares.items())
        raise QuotaError(
            f"quota of {' beside '.join(shares)} {where}",
            got=" + ".join(f"{share:.4g}" for share in shares.values()) + f" = {total:.4g}",
            expected="at most 1 in all",
            fix=f"lower them, for example to {fitting}; or give a module its own ranks",
        )


def grant_shares[K](shares: Mapping[K, float], num_sms: int, granularity: int) -> dict[K, int]:
    """SMs of lanes beside each other, granted jointly: each nearest to its share, none left over if shares add to 1.

    Whole grains by largest remainder, and what is left below a grain to the lane that is shortest of its share (the
    later on ties): 0.5 + 0.5 of 132 by 8 is 64 + 68. QuotaError, with the nearest legal shares, for a sum above 1 or a
    share below one grain.
    """
    _validate(num_sms, granularity)
    total, least = sum(shares.values()), granularity / num_sms
    if any(not 0 < share <= 1 for share in shares.values()) or total > 1 + _ROUNDING:
        raise _refused(shares, num_sms, granularity, "shares above 0, at most 1 in all")
    if any(share < least - _ROUNDING for share in shares.values()):
        raise _refused(shares, num_sms, granularity, f"at least one grain each: {granularity} of {num_sms} SMs")
    return _apportion(shares, num_sms, granularity)


def grant_cores[K](shares: Mapping[K, float], num_cores: int) -> dict[K, int]:
    """Cores of lanes that run beside each other: as `grant_shares`, but never less than one each, so that a plan of
    another machine runs here too. There must be a core for each."""
    if len(shares) > num_cores or sum(shares.values()) > 1 + _ROUNDING:
        raise _refused(shares, num_cores, 1, "a core for each lane, and shares of at most 1 in all", "cores")
    return _apportion(shares, num_cores, 1)


def _apportion[K](shares: Mapping[K, float], num_sms: int, granularity: int) -> dict[K, int]:
    """SMs nearest to the shares, at least one grain each."""
    total = sum(shares.values())
    whole = num_sms if total >= 1 - _ROUNDING else round(total * num_sms / granularity) * granularity
    whole = min(max(whole, len(shares) * granularity), num_sms)
    asked = {key: share * num_sms for key, share in shares.items()}
    grains = {key: max(1, int(sms / granularity + _ROUNDING)) for key, sms in asked.items()}

    def lacking(key: K) -> float:
        return round(asked[key] - grains[key] * granularity, 6)

    while sum(grains.values()) > whole // granularity:
        grains[min([key for key, count in grains.items() if count > 1], key=lacking)] -= 1
    while sum(grains.values()) < whole // granularity:
        grains[max(reversed(grains), key=lacking)] += 1
    granted = {key: count * granularity for key, count in grains.items()}
    granted[max(reversed(grains), key=lacking)] += whole % granularity
    return granted


def _refused[K](
    shares: Mapping[K, float], num_sms: int, granularity: int, expected: str, unit: str = "SMs"
) -> QuotaError:
    fix = "give a module its own ranks"
    if len(shares) * granularity <= num_sms:
        least, total = granularity / num_sms, max(1.0, sum(shares.values()))
        near = {key: max(least, min(1.0, share / total)) for key, share in shares.items()}
        over = max(1.0, sum(near.values()))
        granted = _apportion({key: share / over for key, share in near.items()}, num_sms, granularity)
        nearest = ", ".join(f"{key}: {sms / num_sms:.4g} ({sms} {unit})" for key, sms in granted.items())
        fix = f"nearest legal: {nearest}; or {fix}"
    return QuotaError(
        "quota of " + ", ".join(map(str, shares)),
        got=" + ".join(f"{share:.4g}" for share in shares.values())
        + f" = {sum(shares.values()):.4g} of {num_sms} {unit}",
        expected=f"{expected}; {granularity} at a time",
        fix=fix,
    )


def _validate(num_sms: int, granularity: int) -> None:
    if num_sms < 1 or not 1 <= granularity <= num_sms:
        raise QuotaError(
            "hardware granularity",
            got=f"{granularity} of {num_sms} SMs",
            expected="at least 1 SM, and a granularity from 1 to that",
            fix="correct the GPU type",
        )
