"""SI inside, pretty outside: constants and the two formatters used wherever people read numbers."""

KB, MB, GB, TB = 1e3, 1e6, 1e9, 1e12
KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
US, MS = 1e-6, 1e-3

_BYTE_STEPS = ((TB, "TB"), (GB, "GB"), (MB, "MB"), (KB, "kB"))
_SECOND_STEPS = ((60.0, "min"), (1.0, "s"), (MS, "ms"), (US, "us"))


def format_bytes(num_bytes: float) -> str:
    """`61203283968` -> `61.20 GB` (decimal units)."""
    for size, name in _BYTE_STEPS:
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {name}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """`0.0123` -> `12.3 ms`."""
    for size, name in _SECOND_STEPS:
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {name}"
    return "0 s" if seconds == 0 else f"{seconds / US:.3g} us"
