"""Graded groups to new weights: advantages, packs, policy, loss, optimiser, checkpoints."""
