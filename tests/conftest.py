"""Options of the test run."""


def pytest_addoption(parser):
    parser.addoption(
        '--fuzz', type=int, default=60, help='cases of each fuzz test (default: 60; all: 500)'
    )
