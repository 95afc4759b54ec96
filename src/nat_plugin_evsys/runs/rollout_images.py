"""``rollouts/images/`` of a run directory: each image that a rollout shows, once, named by the hash of its file.

    rollouts/images/<sha256>.png

Rollouts name an image by its path from ``rollouts/``.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

from nat_plugin_evsys.call_images import IMAGES_DIRECTORY, CallImage, call_image, file_of, image_path
from nat_plugin_evsys.files import atomic_write

_DATA_URL = re.compile(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/]+={0,2})")


class RolloutImages:
    """The images of one run's rollouts. A file is whole or absent, and never changes.

    Args:
        rollouts: the directory that holds the rollouts.
    """

    def __init__(self, rollouts: Path) -> None:
        self._rollouts = rollouts
        self._kept: set[str] = set()

    def keep(self, image: CallImage) -> str:
        """Write an image unless it is there; its path from the rollouts' directory."""
        path = image_path(image)
        if path not in self._kept:
            (self._rollouts / IMAGES_DIRECTORY).mkdir(parents=True, exist_ok=True)
            if not (self._rollouts / path).is_file():
                atomic_write(self._rollouts / path, file_of(image))
            self._kept.add(path)
        return path

    def keep_named(self, text: str) -> str:
        """``text`` with the path of a kept file in place of each image in a ``data:`` URL; others stay as they are.

        Datasets and workflows may carry images in such URLs, in fields of any name.
        """
        return _DATA_URL.sub(self._named, text) if "data:image/" in text else text

    def _named(self, found: re.Match[str]) -> str:
        try:
            data = base64.b64decode(found[2], validate=True)
        except ValueError:
            return found[0]
        return self.keep(call_image(0, 0, data, "png" if found[1] == "png" else "jpeg"))
