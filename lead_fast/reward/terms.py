"""Terms of the reward beside right and wrong: what a wrong response costs, and the soft overlong penalty."""

from ..config import Config
from ..records import Score


def soft_overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """0 up to max_tokens - buffer tokens, then linearly down to -1 at max_tokens (DAPO, soft overlong punishment)."""
    return -min(1.0, max(0.0, (length - (max_tokens - buffer)) / buffer))


def wrong_reward(s: Score, c: Config) -> float:
    """Reward this response gets if it is incorrect: plain, truncated, degenerate, or with repeated n-grams."""
    r = c.reward
    if r.repetition is not None and s.degenerate:
        return r.repetition
    if not s.truncated:
        return r.wrong
    truncated = r.wrong if r.truncated is None else r.truncated
    return r.degenerate if s.degenerate and r.degenerate is not None else truncated
