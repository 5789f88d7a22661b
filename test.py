"""Runs every test of tests/: the numbers that must hold.

    python test.py              # all of them
    python test.py -k fold      # those with this in their names
    python test.py --fuzz 500   # with so many cases of each that draws nonsense at random

Arguments are pytest's, which `python -m pytest --help` lists.
"""

import argparse
import sys
from pathlib import Path

from cli import ArgumentParser, require_packages


def main():
    parser = ArgumentParser(prog='test.py', usage='%(prog)s [ARGUMENT ...]', description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    _, arguments = parser.parse_known_args()
    require_packages('test.py', 'test', 'pytest')
    import pytest

    sys.exit(pytest.main([str(Path(__file__).parent / 'tests'), *arguments]))


if __name__ == '__main__':
    main()
