"""Engines that sample, groups collected over ranks, weights on their way to the engine."""
