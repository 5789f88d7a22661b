"""Runs train.py with a fault at one of the file operations in the folder of its run.

    python tests/faulty_train.py FOLDER POINT FAULT OPTIONS...

FOLDER is the --save of the run. POINT counts from 1 the operations that open, link, rename or
remove a file there. FAULT is `kill` (SIGKILL before the operation), `half` (death in the middle of
writing the file that it opens) or `full` (a full disk from there on). With POINT 0 there is no
fault, and the last line on stderr is the number of operations.
"""

import os
import resource
import signal
import sys

import train

EVENTS = ('open', 'os.link', 'os.mkdir', 'os.remove', 'os.rename')  # of Python's audit hooks
BYTES = 50  # that can still be written after the fault


def limit_writing(path, deadly):
    """Limits the size of files: beyond it the process dies, or gets the error of a full disk."""
    if deadly:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it by default
    size = os.path.getsize(path) if os.path.exists(path) else 0
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + BYTES, resource.RLIM_INFINITY))


def main():
    folder, point, fault, *options = sys.argv[1:]
    folder = os.path.realpath(folder)
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event not in EVENTS or not str(arguments[0]).startswith(folder):
            return
        count += 1
        if count == int(point) and fault == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if count == int(point):
            limit_writing(arguments[0], deadly=fault == 'half')

    sys.addaudithook(hook)
    train.main([*options, '--save', folder])
    print(count, file=sys.stderr)


if __name__ == '__main__':
    main()
