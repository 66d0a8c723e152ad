"""The bound on what is under way, against a link that is computed: bandwidth and latency."""

import math

import pytest

from migkit.migration.window import Window

BATCH = 4096


def send_over(window, rate, latency, n_bytes, most_rate=math.inf):
    """Send ``n_bytes``; return how long it took and the most that was under way at once."""
    now, sent, free_at, next_at, peak = 0.0, 0, 0.0, 0.0, 0
    arrivals = []  # (when the PONG is back, its value, bytes)
    window.begin(0, now)
    while sent < n_bytes:
        if window.has_room(sent) and now >= next_at:
            n = max(BATCH, int(min(window.bytes / 2, 1 << 20)) // BATCH * BATCH)
            sent += n
            next_at = now + n / most_rate
            free_at = max(now, free_at) + n / rate
            if window.ping_due(sent):
                arrivals.append((free_at + 2 * latency, window.ping(sent, now), sent))
        elif arrivals and (window.has_room(sent) is False or arrivals[0][0] <= next_at):
            now = max(now, arrivals[0][0])
            _, value, _ = arrivals.pop(0)
            window.confirm(value, now)
        else:
            now = next_at
        peak = max(peak, sent - window._confirmed)
    return free_at, peak


@pytest.mark.parametrize("rate", [5e6, 25e6, 125e6])
@pytest.mark.parametrize("latency", [0.0, 100e-6, 1e-3, 20e-3])
def test_a_link_is_kept_busy_with_little_under_way(rate, latency):
    window = Window(0, 2 * BATCH)
    n_bytes = int(rate * (2 + 200 * latency))
    took, _ = send_over(window, rate, latency, n_bytes)
    assert took < 1.2 * n_bytes / rate
    carried = rate * (2 * latency + 2e-3)
    _, peak = send_over(window, rate, latency, n_bytes // 4)
    assert peak <= 3 * carried + 8 * BATCH


def test_a_fast_link_is_not_bounded_and_is_still_looked_at_now_and_then():
    window = Window(0, 2 * BATCH)
    send_over(window, 2e9, 20e-6, 256 << 20)
    assert math.isinf(window.bytes)
    window.begin(0, 0.0)
    assert not window.ping_due(1 << 20)
    assert window.ping_due(16 << 20)


def test_a_sender_that_is_slow_itself_does_not_make_the_link_look_slow():
    window = Window(0, 2 * BATCH)
    send_over(window, 50e6, 100e-6, 20 << 20)
    before = window.bytes
    send_over(window, 50e6, 100e-6, 2 << 20, most_rate=5e6)
    assert window.bytes >= before / 2


def test_pongs_of_pings_that_were_overtaken_confirm_all_before_them():
    window = Window(7, BATCH)
    window.begin(0, 0.0)
    values = [window.ping(n * BATCH, n * 1e-3) for n in range(1, 4)]
    assert values == [8, 9, 10]
    window.confirm(values[2], 1.0)
    assert window.has_room(3 * BATCH + BATCH // 2)
    window.confirm(values[0], 1.1)  # of no consequence
    assert window.has_room(3 * BATCH)


def test_what_others_send_on_the_channel_is_followed_by_a_ping_when_it_fills_the_window():
    window = Window(0, 2 * BATCH)
    window.begin(0, 0.0)
    assert not window.has_room(8 * BATCH)
    assert window.ping_due(8 * BATCH)
    value = window.ping(8 * BATCH, 0.0)
    assert not window.ping_due(8 * BATCH)
    window.confirm(value, 0.001)
    assert window.has_room(8 * BATCH)
