"""Terms of the reward besides correctness: the price of a wrong response, and bonuses on any response.

The kernels give a response  R = exp(-alpha z) if it is correct (1 if L is off), else wrong_reward;  + bonus.  The
value v of the user's own function enters through these two terms:

- mode `add`: v is part of the bonus.
- mode `replace`: a wrong response (v at most reward.correct_above) has wrong_reward v. A correct one has the bonus
  v - 1, so that R = v if L is off, to float32's rounding, and v + exp(-alpha z) - 1 with L: brevity among the correct
  responses then has the same weight relative to v as to GRPO-LEAD's reward of 1, whatever the scale or sign of v. (A
  product v exp(-alpha z) would reward length where v is negative, and not reward brevity where v is near 0.)
"""

from ..config import Config
from ..records import Score


def soft_overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """0 up to max_tokens - buffer tokens, then linearly down to -1 at max_tokens (DAPO, soft overlong punishment)."""
    return -min(1.0, max(0.0, (length - (max_tokens - buffer)) / buffer))


def wrong_reward(s: Score, c: Config) -> float:
    """Reward of this response if it is wrong: plain, truncated, degenerate, with repeated n-grams, or v."""
    r = c.reward
    if s.terms and r.mode == "replace":
        return s.terms["reward"]
    if r.repetition is not None and s.degenerate:
        return r.repetition
    if not s.truncated:
        return r.wrong
    truncated = r.wrong if r.truncated is None else r.truncated
    return r.degenerate if s.degenerate and r.degenerate is not None else truncated


def bonus(s: Score, length: int, c: Config) -> float:
    """Bonus on this response's reward: the soft overlong penalty, and the contribution of the user's own function."""
    r, total = c.reward, 0.0
    if r.overlong_buffer:
        total += soft_overlong_penalty(length, c.rollout.max_tokens, r.overlong_buffer)
    if s.terms and r.mode == "add":
        total += s.terms["reward"]
    elif s.terms and s.correct:
        total += s.terms["reward"] - 1.0
    return total
