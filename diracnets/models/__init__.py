"""The architectures: a registry, one file for each, and the blocks that they are built with."""
