"""The threads beside the calling one: order, bounds, errors, and that none is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from softlabels.engines.beside import Ahead, Behind


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_ahead_gives_every_item_in_order_and_is_one_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    with Ahead(items(), name="test") as ahead:
        for number in ahead:
            time.sleep(0.001)
            assert made[number] == number and len(made) <= number + 2


def test_ahead_hands_over_the_error_of_its_iterator() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    seen = []
    with pytest.raises(ValueError, match="broken"), Ahead(items(), name="test") as ahead:
        for item in ahead:
            seen.append(item)
    assert seen == [1]


def test_ahead_may_be_left_early() -> None:
    with Ahead(iter(range(100)), name="test") as ahead:
        assert next(ahead) == 0


@pytest.mark.parametrize("room", [1, 3])
def test_behind_keeps_the_order_and_its_bound(room: int) -> None:
    waiting, most = 0, 0
    order: list[int] = []

    def step(number: int) -> int:
        nonlocal waiting
        time.sleep(0.0005)
        waiting -= 1
        return number

    with Behind(order.append, room=room, name="test") as behind:
        for number in range(50):
            waiting += 1
            most = max(most, waiting)
            behind.give([lambda number=number: step(number)])  # type: ignore[misc]
        behind.finish()
        assert order == list(range(50))
    assert most <= room + 1  # those inside, and the one that was just made


def test_behind_hands_over_the_first_error_and_takes_no_further_step() -> None:
    taken: list[int] = []

    def step(number: int) -> None:
        if number == 3:
            raise OSError(28, "No space left on device")
        taken.append(number)

    with (
        pytest.raises(OSError, match="No space left"),
        Behind(lambda told: None, room=2, name="test") as behind,
    ):
        assert not behind.ended
        for number in range(100):
            behind.give([lambda number=number: step(number)])  # type: ignore[misc]
    assert taken == [0, 1, 2] and behind.ended


def test_what_follows_comes_after_the_results_can_be_heard_and_not_after_a_failure() -> None:
    heard: list[str] = []
    with Behind(heard.append, room=1, name="test") as behind:
        for count in range(50):
            follows = threading.Event()
            behind.give([lambda: "done"], then=follows.set)
            assert follows.wait(10)
            behind.listen()
            assert len(heard) == count + 1

    def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), Behind(heard.append, room=1, name="test") as behind:
        behind.give([fail], then=lambda: heard.append("never"))
        behind.finish()
    assert "never" not in heard and behind.ended


def test_behind_drops_what_waits_when_the_calling_thread_fails() -> None:
    begun, taken = threading.Event(), []

    def slow() -> None:
        begun.set()
        time.sleep(0.05)
        taken.append("first")

    with pytest.raises(KeyboardInterrupt), Behind(lambda told: None, room=3, name="test") as behind:
        behind.give([slow])
        behind.give([lambda: taken.append("second")])
        begun.wait()
        raise KeyboardInterrupt
    assert taken == ["first"]


def test_behind_leaves_the_cores_to_the_others() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    torch.set_num_threads(3)
    try:
        with Behind(seen.append, room=1, name="test") as behind:
            behind.give([torch.get_num_threads])
            behind.finish()
            assert torch.get_num_threads() == 3
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
        assert seen == [1, 3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
