"""The parts of a training run: options, setup, data, computation, checkpoints, log, meters."""
