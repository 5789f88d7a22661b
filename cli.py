"""Argument parsing, errors, exit status and printing of the commands."""

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import sys

# errors that the user can fix: exit status 2; environment errors, such as a full disk: status 1
USER_ERRORS = (
    ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError
)


class ArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser that prints errors as one line, without usage, and exits with status 2."""

    @classmethod
    def of_script(cls, prog, description, **kwargs):
        """Returns a parser whose help shows the docstring of a script with its line breaks."""
        return cls(prog=prog, description=description,
                   formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = [expand_home(word) for word in (sys.argv[1:] if args is None else args)]
        for word in args:
            if re.fullmatch('-[^=]*=--', word):  # argparse would parse it as an empty list
                self.error(f'{word}: expected a value other than --')
        return super().parse_known_args(args, namespace)

    def _get_option_tuples(self, option_string):
        """Resolves an abbreviation that matches several names of one option."""
        matches = super()._get_option_tuples(option_string)
        return matches[:1] if len({id(action) for action, *_ in matches}) == 1 else matches

    def error(self, message):
        self.exit(2, f'{self.prog}: {printable(message)}\n')


def expand_home(word):
    """Expands ~ or ~user in an argument, also in --to=~/x.onnx and in quotes, unlike shells."""
    return re.sub('^(-[^=]*=)?(~[^/]*)(?=/|$)',
                  lambda match: (match[1] or '') + os.path.expanduser(match[2]), word)


def _exit_now(number, frame):
    os._exit(128 + number)


def _open_closed_streams():
    """Opens the null device as each closed standard stream; files would get its descriptor."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, 'w'), sys.stderr or os.fdopen(2, 'w')


def exit_on_ctrl_c():
    """Makes Ctrl-C exit without a traceback until `exit_on_error` takes over.

    A command calls it before slow imports, such as torch. Where Ctrl-C is ignored it stays ignored.
    Standard streams that are closed become the null device.
    """
    _open_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_now)


def require_packages(prog, extra, *names):
    """Exits with one line on stderr and status 2 if a package is not installed.

    extra: the extra of pyproject.toml that installs the packages.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{prog}: {', '.join(missing)} missing; pip install '.[{extra}]'", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def exit_on_error(prog, expected=(ValueError, OSError, RuntimeError)):
    """Turns errors of the given classes into one line on stderr and an exit status.

    Errors of other classes are bugs and keep their traceback. The exit status is the error's
    `status` if it has one, 2 for USER_ERRORS, 1 for other errors, and 130 for Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is _exit_now:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except expected as error:
        warn(f'{prog}: {_one_line(error)}')
        sys.exit(getattr(error, 'status', 2 if isinstance(error, USER_ERRORS) else 1))


@contextlib.contextmanager
def exit_on_signals():
    """Makes Ctrl-C, SIGTERM and SIGHUP end the block, with its cleanup, and exit with 128 + signal.

    Only the first signal counts: a second one would end the cleanup. The exit status is the same if
    a package turns the KeyboardInterrupt into another error, such as a failed import.
    """
    received = []

    def stop(number, frame):
        if not received:
            received.append(number)
            raise KeyboardInterrupt

    handled = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
               if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores SIGHUP
    previous = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    except BaseException:
        if received:
            sys.exit(128 + received[0])
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _one_line(error):
    if isinstance(error, OSError) and error.filename:
        return f'{error.filename}: {error.strerror}'
    text = str(error).strip() or type(error).__name__
    lines = text.splitlines()
    if text.startswith('Caught '):  # in a DataLoader worker: the last line is class and message
        return re.sub(r'^[\w.]+Error: ', '', lines[-1])
    return lines[0] if isinstance(error, RuntimeError) else text  # torch appends hints


def printable(text: str) -> str:
    """Returns text on one line, with backslash escapes for unprintable characters.

    These are control characters, which could forge a line or change the terminal, and characters
    that the encoding of stdout lacks.
    """
    text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
    encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
    return text.encode(encoding, 'backslashreplace').decode(encoding)


def say(*lines: str) -> None:
    """Prints `printable` lines; if stdout is closed, warns once on stderr and continues."""
    try:
        print(*map(printable, lines), sep='\n', flush=True)
    except OSError as error:  # a closed terminal, `| head -1`, a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for all later output
        warn(f'stdout: cannot be written ({error.strerror}); output is discarded')


def warn(line: str) -> None:
    """Prints a `printable` line to stderr, unless stderr is closed."""
    with contextlib.suppress(OSError):
        if sys.stderr:  # else print would write to stdout
            print(printable(line), file=sys.stderr, flush=True)


def table(header, rows, left=()):
    """Returns the lines of an aligned Markdown table; header and rows are lists of strings.

    left: titles of the columns to align left in addition to the first; others are aligned right.
    """
    is_left = [i == 0 or title in left for i, title in enumerate(header)]
    widths = [max(3, *map(len, column)) for column in zip(header, *rows)]
    rule = ['-' * width if to_left else '-' * (width - 1) + ':'
            for width, to_left in zip(widths, is_left)]
    return [
        '| ' + ' | '.join(cell.ljust(width) if to_left else cell.rjust(width)
                          for cell, width, to_left in zip(cells, widths, is_left)) + ' |'
        for cells in (header, rule, *rows)
    ]


def print_table(header, rows, left=()):
    """Prints a `table`."""
    say(*table(header, rows, left))
