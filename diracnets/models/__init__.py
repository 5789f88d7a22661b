"""Architectures by name, one file for each, and the blocks that replace their convolutions."""
