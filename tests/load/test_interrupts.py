"""When an exception of any kind reaches the caller, no thread writes to the model any more."""

from __future__ import annotations

import signal
import time

import pytest
from peers import big_vision, openclip
from peers.common import assert_unchanged, bits, same_bits
from safetensors.torch import save_file

import keymap
import keymap.load.direct
import keymap.load.execute
import keymap.load.threads

SLOW = 0.05  # seconds of a task


class Stop(BaseException):
    """What a signal handler of the user raises."""


@pytest.fixture
def slow(monkeypatch):
    """Each task takes its time, notes that it runs, and a small file takes many tasks."""
    running: list[int] = []

    def slowly(real):
        def task(*arguments):
            running.append(1)
            try:
                time.sleep(SLOW)
                return real(*arguments)
            finally:
                running.pop()

        return task

    monkeypatch.setattr(keymap.load.execute, "read_batch", slowly(keymap.load.execute.read_batch))
    monkeypatch.setattr(keymap.load.execute, "copy_strip", slowly(keymap.load.execute.copy_strip))
    monkeypatch.setattr(keymap.load.direct, "_MAX_BUFFERS", 1)
    return running


def native(folder):
    state = openclip.clip(seed=1).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "a.safetensors")
    return folder / "a.safetensors", openclip.clip(seed=2)


def transposed(folder):
    sizes = {"image_width": 192, "text_width": 192}
    big_vision.save(big_vision.init(seed=1, **sizes), folder / "a.npz")
    return folder / "a.npz", openclip.siglip(seed=2, **sizes)


FILES = {"native": native, "transposed": transposed}


def assert_at_rest(model, running):
    """No task runs, and nothing changes any more."""
    assert not running
    before = bits(model)
    time.sleep(4 * SLOW)
    assert all(same_bits(value, before[key]) for key, value in bits(model).items())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Stop, SystemExit])
@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("name", FILES)
def test_an_interrupt_between_submit_and_append_leaves_no_thread_behind(
    name, number, kind, slow, monkeypatch, tmp_path
):
    path, model = FILES[name](tmp_path)
    real, count = keymap.load.threads.Tasks.submit, [0]

    def interrupted(pool, *arguments):
        result = real(pool, *arguments)
        count[0] += 1
        if count[0] == number:
            raise kind
        return result

    monkeypatch.setattr(keymap.load.threads.Tasks, "submit", interrupted)
    with pytest.raises(kind):
        keymap.load_checkpoint(model, path)
    assert count[0] == number
    assert_at_rest(model, slow)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Stop, TimeoutError])
@pytest.mark.parametrize("name", FILES)
def test_signals_that_come_again_and_again_leave_no_thread_behind(name, kind, slow, tmp_path):
    path, model = FILES[name](tmp_path)
    raised = list[BaseException]()

    def handler(_, frame):
        while frame is not None and frame.f_code is not keymap.load.execute._copy_all.__code__:
            frame = frame.f_back
        if frame is not None:  # the load is at work
            raised.append(kind(f"number {len(raised)}"))
            raise raised[-1]

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.5 * SLOW, 0.003)
        with pytest.raises((kind, keymap.LoadError)) as caught:
            keymap.load_checkpoint(model, path)
        assert_at_rest(model, slow)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert raised
    assert caught.value is raised[0] or "half loaded" in str(caught.value)
    assert kind is not TimeoutError or caught.value.__cause__ is raised[0]


def test_an_interrupt_while_checksums_are_compared_leaves_no_thread_behind(monkeypatch, tmp_path):
    big_vision.save(big_vision.init(seed=1), tmp_path / "a.npz", compressed=True)
    model = openclip.siglip(seed=2)
    before, running = bits(model), list[int]()
    real, check = keymap.load.threads.Tasks.submit, keymap.read.lazy.Block.check

    def slowly(block):
        running.append(1)
        try:
            time.sleep(SLOW)
            check(block)
        finally:
            running.pop()

    def interrupted(pool, *arguments):
        real(pool, *arguments)
        raise Stop

    monkeypatch.setattr(keymap.read.lazy.Block, "check", slowly)
    monkeypatch.setattr(keymap.load.threads.Tasks, "submit", interrupted)
    with pytest.raises(Stop):
        keymap.load_checkpoint(model, tmp_path / "a.npz")
    assert not running
    assert all(same_bits(value, before[key]) for key, value in bits(model).items())


def test_an_error_of_a_thread_reaches_the_caller(monkeypatch, tmp_path):
    path, model = native(tmp_path)

    def fails(batch):
        raise MemoryError("no room")

    monkeypatch.setattr(keymap.load.execute, "read_batch", fails)
    with pytest.raises(keymap.LoadError, match="no room"):
        keymap.load_checkpoint(model, path)


def test_a_load_without_interrupts_is_whole(slow, tmp_path):
    path, model = native(tmp_path)
    keymap.load_checkpoint(model, path)
    assert_unchanged(model, bits(openclip.clip(seed=1)))
