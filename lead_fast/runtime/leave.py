"""Leave a run between two steps, when it is asked to stop."""

import signal


def stop_on_sigterm() -> list[int]:
    """A list that is empty until SIGTERM arrives; the loop looks at it after every step."""
    caught: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    return caught
