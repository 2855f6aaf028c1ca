"""Predict a run's needs and the time of a step by counting and simulating: the library of lead_fast/plan.py."""
