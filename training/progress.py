"""Progress of a long loop on stderr: a bar on a terminal, elsewhere a plain line a minute."""

import io
import sys
from collections.abc import Iterable

from tqdm import tqdm

from cli import printable, warn
from training.distributed import rank

SECONDS_PER_LINE = 60


class Progress(tqdm):
    """A tqdm bar, which disappears at its end; plain lines if stderr is not a terminal.

    A file of nohup or Slurm gets the state of the bar as a line, the first after a minute. Only
    rank 0 shows anything.
    """

    def __init__(self, iterable: Iterable | None = None, desc: str = '', total: float | None = None,
                 unit: str = 'it', initial: float = 0):
        self.is_plain = sys.stderr is None or not sys.stderr.isatty()
        plain = {'file': io.StringIO(), 'mininterval': SECONDS_PER_LINE, 'delay': SECONDS_PER_LINE,
                 'miniters': 0, 'smoothing': 0}  # smoothing 0: the mean rate
        super().__init__(iterable, printable(desc), total, unit=unit, initial=initial, leave=False,
                         disable=rank() > 0, **(plain if self.is_plain else {}))

    def display(self, msg=None, pos=None):  # tqdm's method for other ways to show the state
        if not self.is_plain:
            return super().display(msg, pos)
        if msg is None:  # '' clears the bar
            warn(self.line())
        return True

    def line(self) -> str:
        """Returns the state as text: 'epoch 2/9: 40 %, loss 0.123, 95.1 img/s, 01:10 left'."""
        state = self.format_dict
        rate = (self.n - self.initial) / state['elapsed'] if state['elapsed'] else 0
        left = self.format_interval((self.total - self.n) / rate) if rate else '?'
        parts = [f'{100 * self.n / self.total:.0f} %', self.postfix,
                 f'{rate:,.1f} {self.unit}/s' if rate >= 0.1 else '', f'{left} left']
        return f'{self.desc}: {", ".join(filter(None, parts))}'
