"""What is looked at early is handed out in order, once."""

from itertools import count

from amid_trl.training.lookahead import Lookahead


def test_looking_ahead_changes_no_window():
    for looks in (False, True):
        ahead, windows, epoch = Lookahead(), [], iter(range(10))
        while window := ahead.take(epoch, 4):
            windows.append(window)
            if looks:
                later = ahead.peek(epoch, 4)
                assert later == list(range(4 * len(windows), min(10, 4 * len(windows) + 4)))
        assert windows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_no_more_is_fetched_than_is_looked_at():
    fetched = []

    def rows():
        for i in count():
            fetched.append(i)
            yield i

    ahead, epoch = Lookahead(), rows()
    assert ahead.take(epoch, 2) == [0, 1] and ahead.peek(epoch, 3) == [2, 3, 4] == ahead.peek(epoch, 3)
    assert fetched == [0, 1, 2, 3, 4]
    assert ahead.take(epoch, 0) == [] and ahead.take(epoch, 2) == [2, 3] and fetched == [0, 1, 2, 3, 4]


def test_another_epoch_begins_with_its_own():
    ahead, first = Lookahead(), iter(range(9))
    ahead.take(first, 2)
    ahead.peek(first, 2)
    assert ahead.take(iter([50, 51]), 4) == [50, 51]
