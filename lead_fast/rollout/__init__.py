"""Sampling: engines, groups collected over ranks, and the transfer of weights to the engine."""
