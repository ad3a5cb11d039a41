"""Files are whole or not there, whatever happens while they are written."""
import hashlib
import os
import signal
from unittest import mock

import pytest
import torch

from mmseg_kn.checkpoints.files import save_with_hash, sha256, write_atomically


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_an_ordinary_one(tmp_path):
    mask = os.umask(0o027)
    try:
        write_atomically(tmp_path / 'new/a.bin', b'one')
        (tmp_path / 'b.bin').write_bytes(b'two')
    finally:
        os.umask(mask)
    assert (tmp_path / 'new/a.bin').read_bytes() == b'one' and names(tmp_path / 'new') == ['a.bin']
    assert (tmp_path / 'new/a.bin').stat().st_mode == (tmp_path / 'b.bin').stat().st_mode
    write_atomically(str(tmp_path / 'b.bin'), b'three')
    assert (tmp_path / 'b.bin').read_bytes() == b'three'


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_an_error_leaves_what_was_there(call, error, tmp_path):
    (tmp_path / 'a.bin').write_bytes(b'old')
    with mock.patch.object(os, call, side_effect=error), pytest.raises(type(error)):
        write_atomically(tmp_path / 'a.bin', b'new')
    assert names(tmp_path) == ['a.bin'] and (tmp_path / 'a.bin').read_bytes() == b'old'


def test_a_kill_leaves_what_was_there_and_the_part(tmp_path):
    (tmp_path / 'a.bin').write_bytes(b'old')
    child = os.fork()
    if not child:
        try:
            with mock.patch('os.fsync', lambda _: os.kill(os.getpid(), signal.SIGKILL)):
                write_atomically(tmp_path / 'a.bin', b'new')
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert names(tmp_path) == ['a.bin', 'a.bin.part']
    assert (tmp_path / 'a.bin').read_bytes() == b'old'


def test_the_name_of_a_checkpoint_tells_its_contents(tmp_path):
    path = save_with_hash(dict(weight=torch.ones(3)), tmp_path / 'new/a.pth')
    digits = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sha256(path) == digits and path == tmp_path / f'new/a-{digits[:8]}.pth'
    assert torch.equal(torch.load(path, weights_only=True)['weight'], torch.ones(3))
    with pytest.raises(ValueError, match='the name of a checkpoint ends in .pth, got .*a.bin'):
        save_with_hash({}, tmp_path / 'a.bin')
