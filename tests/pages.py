"""The README, the pages of docs/ and the cards of logs/, as the tests read them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')),
         *sorted((ROOT / 'logs').glob('*/README.md'))]


def text_of(path):
    """The text of a page, commands that go on in the next line as one line."""
    return (ROOT / path).read_text().replace('\\\n', ' ')


def blocks(path):
    """Lists the fenced blocks of a page: (language, text)."""
    return re.findall(r'^```(\w+)\n(.*?)^```', (ROOT / path).read_text(), re.M | re.S)


def commands():
    """Lists the words of every command that a page shows, in a block or, in backticks, in prose.

    Comments are left out, and so is what `...` stands for.
    """
    found = []
    for page in PAGES:
        text = text_of(page)
        lines = re.findall(r'^ {4}((?:python|torchrun|bash|pip|make) .*)$', text, re.M)
        for block in re.findall(r'^```bash\n(.*?)^```', text, re.M | re.S):
            lines += block.splitlines()
        prose = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S).replace('\n', ' ')
        lines += re.findall(r'`((?:python|torchrun|bash) [^`]+)`', prose)
        found += [shlex.split(line, comments=True) for line in lines]
    return [[word for word in words if '...' not in word] for words in found]
