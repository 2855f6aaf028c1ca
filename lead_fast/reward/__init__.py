"""From a response to right or wrong, and what it is worth."""
