"""Runs train.py, and attacks it at one of the points where it touches the folder of its run.

    python -m experiments.inject_fault FOLDER POINT HOW FLAGS...

FOLDER: that of --save; POINT: counted from 1, in the order in which files there are opened, renamed
or removed; HOW: `kill` ends the process with SIGKILL before it, `half` in the middle of writing
the file that is opened there, `full` lets the disk be full from there on; FLAGS: of train.py. With
POINT 0 nothing happens, and the last line on stderr is the number of points.
"""

import argparse
import os
import resource
import signal
import sys

import train
from cli import ArgumentParser

EVENTS = ('open', 'os.link', 'os.mkdir', 'os.remove', 'os.rename')  # of Python's audit hooks
BYTES = 50  # that are still written


def limit_writing(path, deadly):
    """Leaves so many bytes to be written; beyond, the process dies, or meets a full disk."""
    if deadly:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
    size = os.path.getsize(path) if os.path.exists(path) else 0
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + BYTES, resource.RLIM_INFINITY))


def attack(folder, point, how):
    """Watches what is done in the folder: returns a function that tells how many points passed."""
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event not in EVENTS or not str(arguments[0]).startswith(folder):
            return
        seen += 1
        if seen == point and how == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if seen == point:
            limit_writing(arguments[0], how == 'half')

    sys.addaudithook(watch)
    return lambda: seen


def main():
    parser = ArgumentParser(prog='experiments.inject_fault', description=__doc__,
                     usage='%(prog)s FOLDER POINT HOW FLAGS...',
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=os.path.realpath, help='that of --save')
    parser.add_argument('point', type=int, help='at which it is attacked')
    parser.add_argument('how', choices=('kill', 'half', 'full'), help='what is done there')
    parser.add_argument('flags', nargs=argparse.REMAINDER, help='of train.py')
    args = parser.parse_args()
    points = attack(args.folder, args.point, args.how)
    train.main([*args.flags, '--save', args.folder])
    print(points(), file=sys.stderr)


if __name__ == '__main__':
    main()
