"""All numeric bugs: importing a file of them puts them on the list."""

from tests.faults.bugs import gradients, messages, steps  # noqa: F401
from tests.faults.bugs.catalogue import BUGS, CASES

__all__ = ["BUGS", "CASES"]
