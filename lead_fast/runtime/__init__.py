"""What a run stands on: ranks and hardware, journal and console, watchdog and health, signals."""
