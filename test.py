"""Runs every test of tests/: the numbers that must hold.

Arguments are pytest's: `python test.py -k fold`.
"""

import sys
from pathlib import Path

import pytest

if __name__ == '__main__':
    sys.exit(pytest.main([str(Path(__file__).parent / 'tests'), *sys.argv[1:]]))
