"""What a run needs and how long a step takes, by counting and simulating: the library of lead_fast/plan.py."""
