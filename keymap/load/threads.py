"""Threads that have stopped when their caller goes on, whatever a signal handler raises, and at which moment.

A signal handler may raise between any two steps of the main thread, and inside a lock of Python's own pools, which
then blocks their threads for ever. So the main thread takes no lock here: it sets flags, which the threads read.
"""

from __future__ import annotations

from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch

__all__ = ["Task", "Tasks", "on_threads"]

_LOOK_AGAIN = 0.05  # seconds; only an interrupt at a bad moment makes a wait as long


class Task:
    """One call of a function on a thread; ``begun`` and ``done`` are set by that thread."""

    def __init__(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.begun = self.done = False
        self._function, self._arguments = function, arguments
        self._error: BaseException | None = None
        self._ended = allocate_lock()
        self._ended.acquire()

    def run(self, tasks: Tasks) -> None:
        """Call the function, unless no task may begin any more."""
        self.begun = True  # before `closed` is read: `Tasks.stop` sets `closed` before it reads `begun`
        try:
            if not tasks.closed:
                self._function(*self._arguments)
        except BaseException as error:
            self._error = error
        finally:
            self._arguments = ()  # the list of tasks keeps no tensors and no buffers
            self.done = True
            self._ended.release()

    def wait(self) -> None:
        """Wait until the function has returned."""
        while not self.done:
            self._ended.acquire(timeout=_LOOK_AGAIN)

    def result(self) -> None:
        """Wait, and raise what the function raised."""
        self.wait()
        if self._error is not None:
            raise self._error


class Tasks:
    """Tasks on some threads.

    Attributes:
        closed: True when no task may begin any more.
        stopped: True when, in addition, none runs any more.
        late: the first exception that a signal handler raised while the tasks were stopped.
    """

    def __init__(self) -> None:
        self.closed = self.stopped = False
        self.late: BaseException | None = None
        self._tasks: list[Task] = []
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        self._threads, self._most_threads = 0, torch.get_num_threads()

    def submit(self, function: Callable[..., None], *arguments: Any) -> Task:
        """Call a function on a thread. An interrupt in here loses no task: it is listed before a thread has it."""
        task = Task(function, arguments)
        self._tasks.append(task)
        self._queue.put(task)
        if self._threads < self._most_threads:
            try:
                start_new_thread(self._work, ())
            except RuntimeError:  # the system allows no more threads
                if not self._threads:
                    raise
                self._most_threads = self._threads
            else:
                self._threads += 1
        return task

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            task.run(self)
            del task  # a waiting thread keeps no task alive, nor the tensors of it

    def stop(self) -> None:
        """Let no task begin, and wait for those that run; to be called again after an interrupt."""
        self.closed = True
        for task in self._tasks:
            if task.begun:
                task.wait()
        for _ in range(self._most_threads):
            self._queue.put(None)
        self.stopped = True


def on_threads(work: Callable[[Tasks], None]) -> None:
    """Call ``work`` with tasks to submit; no task runs any more when this returns or raises.

    Raises:
        BaseException: the first that ``work`` or, during it or afterwards, a signal handler raises.
    """
    tasks = Tasks()
    try:
        work(tasks)
    finally:  # inline and nested: a signal handler may raise at any call, and at the jump back of a loop
        while not tasks.stopped:
            try:
                while not tasks.stopped:
                    try:
                        tasks.stop()
                    except BaseException as error:
                        tasks.late = tasks.late or error
            except BaseException as error:
                tasks.late = tasks.late or error
    if tasks.late is not None:
        raise tasks.late
