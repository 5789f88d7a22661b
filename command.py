"""How the commands end when something is wrong: one line on stderr, and an exit status."""

import argparse
import contextlib
import sys


class Options(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage, and exit status 2."""

    def error(self, message):
        self.exit(2, f'{self.prog}: {message}\n')


@contextlib.contextmanager
def errors_in_one_line(prog):
    """Turns the errors that a user can meet into one line on stderr, without a traceback.

    Exit status 2 for what the user can mend (ValueError, OSError), 1 for what is up to the world or
    to a result (RuntimeError).
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        message = str(error).strip().splitlines()[-1]  # a worker process sends its traceback first
        if isinstance(error, OSError) and error.filename:
            message = f'{error.filename}: {error.strerror}'
        print(f'{prog}: {message}', file=sys.stderr)
        sys.exit(1 if isinstance(error, RuntimeError) else 2)
