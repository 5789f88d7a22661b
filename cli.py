"""How commands end, one line on stderr and an exit status, and how they print a table."""

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import sys

# what the user can mend: status 2; other errors are the world's, such as a full disk: status 1
USER_ERRORS = (
    ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError
)


class ArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage, and exit status 2."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for word in args:
            if re.fullmatch('-[^=]*=--', word):  # which argparse takes for an empty list
                self.error(f'{word}: expected another value than --')
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f'{self.prog}: {message}\n')


def _end(number, frame):
    os._exit(128 + number)


def exit_on_ctrl_c():
    """Has Ctrl-C end the process without a traceback, until exit_on_error sees to it.

    For what comes before, the import of torch above all. Where Ctrl-C is ignored it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def require_packages(prog, extra, *names):
    """Ends the process in one line, with status 2, where packages of an extra are missing.

    extra: of pyproject.toml, which installs them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{prog}: {', '.join(missing)} missing: expected pip install '.[{extra}]'",
              file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def exit_on_error(prog, expected=(ValueError, OSError, RuntimeError)):
    """Turns the errors that a user can meet into one line on stderr, without a traceback.

    expected: their classes; another one is a fault of the program, and keeps its traceback. Exit
    status: the error's own `status` if it has one, 2 for USER_ERRORS, 1 for the rest; 130 for
    Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except expected as error:
        print(f'{prog}: {_one_line(error)}', file=sys.stderr)
        sys.exit(getattr(error, 'status', 2 if isinstance(error, USER_ERRORS) else 1))


def _one_line(error):
    if isinstance(error, OSError) and error.filename:
        return f'{error.filename}: {error.strerror}'
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # a worker process sends its traceback first, which names the class before the message
    return re.sub(r'^[\w.]+Error: ', '', lines[-1]) if len(lines) > 1 else lines[0]


def say(*lines):
    """Prints lines that are only shown: where they cannot be, stderr says so, and all goes on."""
    try:
        print(*lines, sep='\n', flush=True)
    except OSError as error:  # a closed terminal, `| head -1`, a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # also for what comes
        with contextlib.suppress(OSError):
            print(f'no more is shown ({error.strerror})', file=sys.stderr)


def table(head, rows, left=()):
    """Returns the lines of a table in Markdown that reads well as it is: cells are text.

    left: titles of the columns that are aligned to the left, beside the first; the others to the
    right.
    """
    to_left = [i == 0 or title in left for i, title in enumerate(head)]
    widths = [max(3, *map(len, column)) for column in zip(head, *rows)]
    rule = ['-' * width if is_left else '-' * (width - 1) + ':'
            for width, is_left in zip(widths, to_left)]
    return [
        '| ' + ' | '.join(cell.ljust(width) if is_left else cell.rjust(width)
                          for cell, width, is_left in zip(cells, widths, to_left)) + ' |'
        for cells in (head, rule, *rows)
    ]


def print_table(head, rows, left=()):
    """Prints a `table`."""
    for line in table(head, rows, left):
        print(line, flush=True)
