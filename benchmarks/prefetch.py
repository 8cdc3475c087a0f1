"""AsyncDataLoader against the plain loader, where making a batch and using it take equally long."""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.log import console
from optimization import AsyncDataLoader

NUM_BATCHES, MAKE_S, USE_S = 40, 0.02, 0.02


class Batches:
    def __iter__(self) -> Iterator[int]:
        for i in range(NUM_BATCHES):
            time.sleep(MAKE_S)
            yield i


def seconds_of(loader: Iterable[int]) -> float:
    started = time.perf_counter()
    for _ in loader:
        time.sleep(USE_S)
    return time.perf_counter() - started


def main() -> None:
    plain_s, prefetched_s = seconds_of(Batches()), seconds_of(AsyncDataLoader(Batches()))
    console.print(f"{NUM_BATCHES} batches: {plain_s:.2f} s one after the other, {prefetched_s:.2f} s prefetched")
    console.print(f"ratio {prefetched_s / plain_s:.2f} (1/2 is the limit)")


if __name__ == "__main__":
    main()
