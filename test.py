"""Runs the tests in tests/.

    python test.py                  # all tests, except those that need a GPU
    python test.py -m "not slow"    # the fast tests
    python test.py -m gpu           # the tests that need a GPU
    python test.py -k fold          # tests with this in their names
    python test.py tests/test_fold.py
    python test.py --fuzz 500       # 500 examples in each fuzz test

All arguments are those of pytest: `python -m pytest --help` lists them.
"""

import os
import sys

from cli import ArgumentParser, require_packages


def main():
    parser = ArgumentParser.of_script('test.py', __doc__, usage='%(prog)s [ARGUMENT ...]')
    _, arguments = parser.parse_known_args()
    require_packages('test.py', 'test', 'pytest')
    import pytest

    # processes of one thread compute the same bits as the process that starts them
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # read when torch is imported
    os.chdir(os.path.dirname(os.path.abspath(__file__)))  # where pytest reads pyproject.toml
    sys.exit(pytest.main(arguments))


if __name__ == '__main__':
    main()
