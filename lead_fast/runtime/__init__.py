"""Services of a run: ranks and hardware, journal and console, watchdog and health, signals."""
