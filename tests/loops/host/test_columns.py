"""What several processes agree on about the files of replay; the other one is played here."""

import numpy as np
import pytest

from wmjax import distributed
from wmjax.loops.host import columns
from wmjax.replay import chunks

DIGESTS = np.arange(2 * 32, dtype=np.uint8).reshape(2, 32) + 1
DIGESTS[1] = 0  # a block that is not complete


@pytest.fixture
def first_of_two(monkeypatch):
    """This is the first of two processes; the other says what this one does, and has the same block."""
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "exchange", lambda value: [value, value])


def test_a_list_of_files_that_is_gone_is_written_again_and_blocks_that_are_gone_are_forgotten(first_of_two, tmp_path):
    known = {b"of an earlier block": b"x" * 32}
    table, names = columns.list_files(tmp_path, DIGESTS, known)
    listed = table[0].tobytes()
    assert not table[1].any() and names == {listed, DIGESTS[0].tobytes()}
    assert chunks.parts(tmp_path, listed) == [DIGESTS[0].tobytes()] * 2
    assert list(known.values()) == [listed]
    chunks.path_of(tmp_path, listed).unlink()
    assert (columns.list_files(tmp_path, DIGESTS, known)[0] == table).all()
    assert chunks.path_of(tmp_path, listed).is_file()
    assert columns.files_of(tmp_path, table) == names


def test_what_the_first_process_cannot_write_or_remove_is_an_error_in_all(first_of_two, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("read-only")

    monkeypatch.setattr(chunks, "write", fail)
    with pytest.raises(OSError, match="read-only"):
        columns.list_files(tmp_path, DIGESTS, {})
    monkeypatch.setattr(chunks, "keep", fail)
    with pytest.raises(OSError, match="read-only"):
        columns.keep_files(tmp_path, set(), set())
    columns.keep_files(tmp_path, set(), None)  # nothing is removed
    # In another one that removes nothing, but hears of it.
    monkeypatch.setattr(distributed, "leads", lambda: False)
    monkeypatch.setattr(distributed, "exchange", lambda value: ["failed" if value == "" else value, value])
    with pytest.raises(OSError, match="failed"):
        columns.keep_files(tmp_path, set(), set())
