"""Pickles of data sets: plain values come out as they are, all else is refused and not run."""
import collections
import os
import pickle

import numpy as np
import pytest

from mmseg_kn.checkpoints.safe_pickle import load_pickle


@pytest.mark.parametrize('protocol', [3, 4])
def test_plain_values(tmp_path, protocol):
    content = dict(data=np.arange(24, dtype=np.uint8).reshape(4, 6), labels=[1, 2, 3],
                   mean=np.linspace(0, 1, 5), scalar=np.float32(2.5), text='a', none=None,
                   column=np.asfortranarray(np.eye(3, 2)), empty=np.zeros((0, 3)))
    (tmp_path / 'a').write_bytes(pickle.dumps(content, protocol))
    loaded = load_pickle(tmp_path / 'a')
    assert loaded.keys() == content.keys()
    for key, value in content.items():
        np.testing.assert_array_equal(loaded[key], value)
        assert type(loaded[key]) is type(value)
    assert loaded['data'].dtype == np.uint8 and loaded['data'].flags.writeable


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path), )


@pytest.mark.parametrize('content, asked', [
    (lambda path: dict(data=Runs(path)), 'posix.mkdir'),
    (lambda path: np.array([Runs(path)], dtype=object), "dtype 'O8'"),
    (lambda path: collections.Counter(), 'collections.Counter'),
    (lambda path: bytearray(b'x'), 'builtins.bytearray'),
    (lambda path: eval, 'builtins.eval'),
])
def test_anything_else_is_refused_and_not_run(tmp_path, content, asked):
    (tmp_path / 'a').write_bytes(pickle.dumps(content(tmp_path / 'ran'), 4))
    with pytest.raises(ValueError, match=f'a was refused: .*plain values .*{asked}'):
        load_pickle(tmp_path / 'a')
    assert not (tmp_path / 'ran').exists()


def test_damaged_files(tmp_path):
    data = pickle.dumps(dict(data=np.zeros((100, 30), np.uint8), labels=list(range(100))), 4)
    for damaged in (b'', data[:50], data[:-200], b'not a pickle', b'\x80\x04\x8e' + b'\xff' * 8,
                    data.replace(b'K\x1e', b'K\xff', 1)):
        (tmp_path / 'a').write_bytes(damaged)
        with pytest.raises(ValueError, match='a (of .* is damaged or not a pickle|was refused).*'
                                             'get it again'):
            load_pickle(tmp_path / 'a')
    with pytest.raises(FileNotFoundError):
        load_pickle(tmp_path / 'absent')
