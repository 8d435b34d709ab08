"""Tracks in threads: each follows its own actions in order; between tracks an action waits for what it needs.

No deadlock: every track's actions, and all needs, follow one total order, so the first action of it that is not done
can always run. The first error of any track stops the others at their next action and is raised.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager

from megatron_mosaic.colocation.program import RankProgram
from megatron_mosaic.schedules import Action

_PATIENCE_S = 2.0  # for lanes to see that another failed; one that waits for another rank never does


class Worker:
    """A thread that runs what it is given, in order, until the process ends."""

    def __init__(self, name: str, prepare: Callable[[], None]) -> None:
        """`prepare` runs in the thread first; what it raises is raised here."""
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(prepare, ready), name=name, daemon=True)
        self._thread.start()
        ready.result()

    @property
    def ident(self) -> int:
        """Of the thread."""
        return self._thread.ident or 0

    def submit(self, work: Callable[[], None]) -> None:
        """Run it after all that was given before. It must not raise."""
        self._work.put(work)

    def close(self) -> None:
        """End the thread once it has done its work."""
        self._work.put(None)
        self._thread.join()

    def _run(self, prepare: Callable[[], None], ready: Future[None]) -> None:
        try:
            prepare()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        while (work := self._work.get()) is not None:
            work()


class TrackRun:
    """One step of all tracks. Counts the tracks that are `_running`; `_stop`: the first error, which ends all."""

    def __init__(self, program: RankProgram, perform: Callable[[Action], None]) -> None:
        self._program, self._perform = program, perform
        self._changed = threading.Condition()
        self._done: set[Action] = set()
        self._running = len(program.tracks)
        self._stop: BaseException | None = None

    def follow(self, actions: Sequence[Action], around: Callable[[], AbstractContextManager[None]]) -> None:
        """What a track's thread does, inside `around()`. Never raises: `join` does."""
        try:
            with around():
                self._follow(actions)
        except BaseException as error:
            self.stop(error)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _follow(self, actions: Sequence[Action]) -> None:
        """Until the last action, or until something has failed."""
        for action in actions:
            if not self._wait_for_needs(action):
                return
            self._perform(action)
            if action in self._program.awaited:
                with self._changed:
                    self._done.add(action)
                    self._changed.notify_all()

    def stop(self, error: BaseException) -> None:
        """Let no track begin another action. The first error counts."""
        with self._changed:
            self._stop = self._stop or error
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for all tracks; the first error of any is raised, though others may still wait for other ranks."""
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._stop is not None or not self._running)
                if self._stop is not None:
                    self._changed.wait_for(lambda: not self._running, timeout=_PATIENCE_S)
        except BaseException as error:  # an interrupt: the lanes end as well
            self.stop(error)
            raise
        if self._stop is not None:
            raise self._stop

    def _wait_for_needs(self, action: Action) -> bool:
        """Whether to go on with the action: all that it needs of other tracks is done, and nothing has failed."""
        needs = self._program.waits.get(action, ())
        with self._changed:
            self._changed.wait_for(lambda: self._stop is not None or self._done.issuperset(needs))
            return self._stop is None
