"""The page that follows a run: `python -m lead_fast.report RUN_DIR --serve` starts its server."""
