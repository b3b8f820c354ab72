"""Prefetched results come in order, few of them wait, and an exception comes in its item's turn."""

import threading

import pytest

from runtime.prefetching import prefetch


def test_results_come_in_order_and_at_most_ahead_of_them_wait():
    made = []

    def work(number: int) -> int:
        made.append(number)
        return number * number

    results = prefetch(work, iter(range(100)), ahead=4)
    for number in range(100):
        assert next(results) == (number, number * number)
        assert len(made) <= number + 5
    assert next(results, None) is None


def test_the_next_items_are_worked_on_while_one_result_is_used():
    begun, used = threading.Event(), threading.Event()

    def work(number: int) -> bool:
        if number == 0:
            return True
        begun.set()
        return used.wait(20)

    results = prefetch(work, range(2), ahead=2)
    assert next(results) == (0, True)
    assert begun.wait(20)
    used.set()
    assert next(results) == (1, True)  # nothing waited for it before


def test_an_exception_comes_in_its_turn_and_closing_does_not_wait():
    results = prefetch(lambda number: 1 // number, [2, 1, 0, 1])
    assert [next(results)[1], next(results)[1]] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    prefetch(abs, range(10**9)).close()
