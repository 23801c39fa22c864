"""Names of checkpoints for people: links in a run directory to its checkpoint directories.

A callback's formatted file name becomes such a link once the checkpoint is durable. Stillframe
itself never reads them, as it never reads `latest` and `best`.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from stillframe._core.warn import log


class Links:
    """The links of one run directory that one callback makes."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._names: set[str] = set()

    def point(self, name: str, checkpoint: Path) -> None:
        """Let `name` lead to `checkpoint`, in place of what it led to before.

        Not durable itself: a link that a power failure takes away costs nobody a checkpoint. What
        stands under the name and is no link is left alone, and said.
        """
        link = self._run / name
        if link.exists() and not link.is_symlink():
            log.warning("%s is not a link: it is left as it is, see %s", link, checkpoint)
            return
        new = self._run / f".{name}.{secrets.token_hex(4)}"
        try:
            os.symlink(checkpoint.name, new)
            os.replace(new, link)
        except OSError as error:
            log.warning("no link %s to %s: %s", link, checkpoint.name, error)
            return
        self._names.add(name)
        self._drop_dangling()

    def _drop_dangling(self) -> None:
        for name in sorted(self._names):
            link = self._run / name
            if link.is_symlink() and not link.exists():
                link.unlink(missing_ok=True)
                self._names.discard(name)
