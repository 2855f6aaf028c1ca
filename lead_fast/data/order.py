"""Order of the training problems, as a function of seed and step."""

import numpy as np


class ProblemStream:
    """Shuffled epochs in which the position in the data is simply the step: `batch(step)` depends on nothing else.

    Args:
        n: number of problems.
        size: problems per batch.
        seed: of the shuffles; every epoch is shuffled differently.
    """

    def __init__(self, n: int, size: int, seed: int):
        self.n, self.size, self.seed = n, size, seed
        self.orders: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> list[int]:
        """Indices of the problems of `step`; an epoch's end may fall inside a batch."""
        first = step * self.size
        return [int(self._order(at // self.n)[at % self.n]) for at in range(first, first + self.size)]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self.orders:
            if len(self.orders) > 2:
                self.orders.clear()
            self.orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        return self.orders[epoch]


class SolveRateStream:
    """Draw distinct problems by how often they were solved when last sampled: weight 4 r (1 - r), at least `floor`.

    A problem not yet sampled has weight 1. A draw depends on the seed, the step and the solve rates recorded so far.

    Args:
        n: number of problems.
        size: problems per batch, at most n.
        seed: of the draws.
    """

    def __init__(self, n: int, size: int, seed: int, floor: float = 0.05):
        self.size, self.seed, self.floor = size, seed, floor
        self.drawn: tuple[int, list[int]] = (-1, [])
        self.weights = np.ones(n)

    def tell(self, index: int, rate: float) -> None:
        """Record that problem `index` was just solved in this fraction of its responses."""
        self.weights[index] = max(self.floor, 4 * rate * (1 - rate))

    def batch(self, step: int) -> list[int]:
        """Indices of the problems of `step`, the same however often it is called."""
        if self.drawn[0] != step:
            draws = np.random.default_rng([self.seed, step])
            chance = self.weights / self.weights.sum()
            indices = draws.choice(len(chance), self.size, replace=False, p=chance)
            self.drawn = step, [int(i) for i in indices]
        return self.drawn[1]
