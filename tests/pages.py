"""Reads the README, the pages of docs/ and the model cards of logs/ for the tests."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CHANGELOG.md', ROOT / 'CONTRIBUTING.md',
         *sorted((ROOT / 'docs').glob('*.md')), *sorted((ROOT / 'logs').glob('*/README.md'))]


def text_of(path):
    """Returns the text of a page, with continued command lines joined."""
    return (ROOT / path).read_text().replace('\\\n', ' ')


def blocks(path):
    """Returns the fenced code blocks of a page as (language, text)."""
    return re.findall(r'^```(\w+)\n(.*?)^```', (ROOT / path).read_text(), re.M | re.S)


def commands():
    """Returns the words of every command on the pages, in code blocks or in backticks.

    Comments and words that contain `...` are left out.
    """
    shown = []
    for page in PAGES:
        text = text_of(page)
        lines = re.findall(r'^ {4}((?:python|torchrun|bash|pip|make) .*)$', text, re.M)
        for block in re.findall(r'^```bash\n(.*?)^```', text, re.M | re.S):
            lines += block.splitlines()
        prose = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S).replace('\n', ' ')
        lines += re.findall(r'`((?:python|torchrun|bash) [^`]+)`', prose)
        shown += [shlex.split(line, comments=True) for line in lines]
    return [[word for word in words if '...' not in word] for words in shown]
