"""Writing files that are whole or not there, and checkpoints named after their contents."""
import contextlib
import hashlib
import io
import os
from pathlib import Path

import torch

PART = '.part'


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a file so that there is never half of one under its name.

    The data go to ``NAME.part`` in the same folder and to the disk, and only then is the file
    renamed. A process that is killed meanwhile leaves ``NAME.part`` and whatever ``path`` held
    before; an error removes ``NAME.part``.

    Args:
        path: File to write; its folder is made if need be.
        data: What it will hold.
    """
    part = Path(f'{path}{PART}')
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def save_with_hash(checkpoint: dict, dst: str | Path) -> Path:
    """Saves a checkpoint all at once, under a name that tells its contents.

    Args:
        checkpoint: What to save.
        dst: File to write, ``NAME.pth``; it is called ``NAME-HASH.pth``, with the first eight
            digits of its own SHA-256. Its folder is made if need be.

    Returns:
        The file written.

    Raises:
        ValueError: ``dst`` does not end in ``.pth``.
    """
    dst = Path(dst).expanduser()
    if dst.suffix != '.pth':
        raise ValueError(f'the name of a checkpoint ends in .pth, got {dst}')
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    digits = hashlib.sha256(buffer.getbuffer()).hexdigest()[:8]
    path = dst.with_name(f'{dst.stem}-{digits}.pth')
    write_atomically(path, buffer.getbuffer())
    return path


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
