"""Grading of responses: extraction, verification and reward terms."""
