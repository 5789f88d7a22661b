"""What was trained or timed to find something out; each runs as `python -m experiments.NAME`."""
