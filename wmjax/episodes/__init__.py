"""Episodes outside of a run: written by `wmjax record`, read to train on (`docs/offline.md`).

`format` is what lies in a folder of them, `sources` where else records may come from, `data` what is demanded of them
and how they fill a replay.
"""

from wmjax.episodes.data import Data, stretches
from wmjax.episodes.format import Writer, space_of, spec_json, spec_of
from wmjax.episodes.sources import Source, open_source

__all__ = ["Data", "Source", "Writer", "open_source", "space_of", "spec_json", "spec_of", "stretches"]
