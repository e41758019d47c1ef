"""Progress reaches whoever listens, and nobody else."""

from optframe import progress


def test_only_the_innermost_listener_hears() -> None:
    outer: list[tuple[str, float]] = []
    inner: list[tuple[str, float]] = []
    progress.tell("nobody listens", 0.0)
    with progress.listening(lambda what, fraction: outer.append((what, fraction))):
        progress.tell("first", 0.1)
        with progress.listening(lambda what, fraction: inner.append((what, fraction))):
            progress.tell("second", 0.2)
        progress.tell("third", 0.3)
    progress.tell("nobody listens", 1.0)
    assert (outer, inner) == ([("first", 0.1), ("third", 0.3)], [("second", 0.2)])
