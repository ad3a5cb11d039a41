"""Reads checkpoints without ever running code that they may carry.

torch >= 2.6 unpickles tensors and plain values only; the checkpoints of mmengine hold a few things
more. Each of those is read here as a harmless stand-in, and a file that asks for anything else is
refused by name.
"""
import contextlib
import errno
import functools
import os
import pickle
import re
import zipfile

import numpy as np
import torch

from .diagnose import CONVERTER


def setup() -> None:
    """Replaces each place where mmengine unpickles a checkpoint freely, or fails on its own.

    Called when mmseg_kn is imported; calling it again changes nothing.

    * Local files: with torch >= 2.6 mmengine 0.10.7 cannot read its own training checkpoints
      (numpy and HistoryBuffer in `message_hub`), so tools/test.py and --resume fail.
    * URLs, hence torchvision://, open-mmlab:// and mmcls://: torch.hub, which mmengine calls
      on both stacks, still defaults to weights_only=False and runs whatever the file holds.
    * The fork's _safe_torch_load: retries with weights_only=False what torch has refused.
    """
    from mmengine.runner import checkpoint

    checkpoint.CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
    checkpoint.load_url = _load_url
    if hasattr(checkpoint, '_safe_torch_load'):
        checkpoint._safe_torch_load = _load_file


def load_from_local(filename, map_location=None):
    """Loads a local checkpoint. mmengine logs the name of this function from 'local' on."""
    filename = os.path.expanduser(filename)
    if os.path.isdir(filename):
        raise ValueError(f'{filename} is a directory, not a checkpoint; name the .pth file in it')
    if not os.path.isfile(filename):
        raise FileNotFoundError(f'{filename} can not be found.')
    return _load_file(filename, map_location)


def _load_file(file, map_location=None):
    """Loads a checkpoint from a path, or from a file object in memory (the fork's s3://)."""
    def read():
        check_members(file)
        return torch.load(file, map_location=map_location, weights_only=True)

    return _load('the downloaded checkpoint' if hasattr(file, 'read') else file, read)


def check_members(file):
    """Refuses a zip file that unpacks to more than it holds; torch.save compresses nothing."""
    opened = contextlib.nullcontext(file) if hasattr(file, 'read') else open(file, 'rb')
    with opened as f:
        members, size = [], 0
        if f.read(4) == b'PK\x03\x04':  # by which torch knows the format
            members, size = zipfile.ZipFile(f).infolist(), f.seek(0, os.SEEK_END)
        f.seek(0)
    if any(m.compress_type for m in members) or sum(m.file_size for m in members) > size:
        raise ValueError('members that are compressed, or larger than the file')


def _load_url(url, model_dir=None, **kwargs):
    """torch.hub.load_state_dict_from_url without free unpickling."""
    folder = model_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')
    load = functools.partial(torch.hub.load_state_dict_from_url, url, model_dir, **kwargs)
    return _load(f'{url} (kept in {folder})', lambda: load(weights_only=True))


def _load(name, read):
    """Returns what read() loads under our safe globals; a bad file becomes a ValueError."""
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            return _without_source(plain(read()))
    except pickle.UnpicklingError as error:
        # torch wraps its reason in the advice to switch the protection off: take the reason.
        reason = str(error.__context__ or error)
        if not reason.startswith('Unsupported operand'):
            asked = re.search(r'GLOBAL (\S+)', reason)
            asked = f'the global {asked[1]}' if asked else reason
            if asked.endswith(' argparse.Namespace'):
                raise ValueError(
                    f"{name} was refused: it holds a command line ({asked}), as norm-torch's "
                    f'checkpoints do; {CONVERTER} converts those'
                ) from None
            asked = shown(asked)
            raise ValueError(
                f'{name} was refused: its pickle holds more than plain data ({asked}), which '
                'could run code. Get a file that holds only weights and plain values; or, if you '
                'trust its maker, allow that global with torch.serialization.add_safe_globals'
            ) from None
    except Exception as error:  # a damaged pickle can raise anything
        if _is_not_the_file(error):
            raise
        if isinstance(error, MemoryError) or 'DefaultCPUAllocator' in str(error):
            raise ValueError(
                f'{name} asks for more memory than there is; if it is not a large file, it is '
                'damaged or made to do harm: do not use it'
            ) from None
        reason = f'{type(error).__name__}: {error}'.split('\n')[0].split('. ')[0].rstrip(': ')
        if 'restore data location' in reason:
            raise ValueError(
                f"{name} holds tensors of a device that is not known here ({shown(reason)}); "
                "load it with map_location='cpu'"
            ) from None
    raise ValueError(
        f'{name} is damaged or not a checkpoint ({shown(reason)}); resume from an older one, or '
        'download it again'
    )


def shown(reason):
    """What a file made torch say, for a terminal: no escape codes, and not long."""
    return ''.join(c if c.isprintable() else '?' for c in reason[:300])


def _is_not_the_file(error):
    """Whether the system, the network or the device is to blame: such errors pass unchanged."""
    if isinstance(error, OSError):
        return error.errno != errno.EINVAL  # what seeking by a damaged offset gives
    absent = 'map_location' in str(error) and 'restore data location' not in str(error)
    return absent or isinstance(error, torch.OutOfMemoryError)


def _without_source(checkpoint):
    """Drops meta['config'], which Runner.resume runs as Python to compare numbers of GPUs.

    mmcv 1.x wrote it; mmengine writes meta['cfg'] and does not run that when it resumes.
    """
    # Subscripts only: a pickled OrderedDict may bring its own `get` and `pop`.
    meta = checkpoint['meta'] if isinstance(checkpoint, dict) and 'meta' in checkpoint else None
    if isinstance(meta, dict) and 'config' in meta:
        del meta['config']
    return checkpoint


class _SavedDtype:
    """Stands for numpy.dtype in a checkpoint: numbers, booleans, text; no objects, no fields.

    numpy's own dtypes and arrays are not let near a pickle: a crafted dtype state makes numpy
    take bytes of the file for object pointers.
    """

    def __init__(self, code, align=False, copy=False):
        if not re.fullmatch(r'b1|[iufcSU]\d+', code):
            raise pickle.UnpicklingError(f'a numpy array or scalar of dtype {code!r}')
        self.value = np.dtype(code)

    def __setstate__(self, state):
        self.value = self.value.newbyteorder(state[1])


class _SavedArray:
    """Stands for numpy.ndarray and, called, for its `_reconstruct`; `plain` unwraps it."""

    def __init__(self, kind, shape, code):
        pass  # an empty array; the pickle's BUILD brings the contents

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.value = _array(shape, dtype, data, 'F' if fortran else 'C')


def _saved_scalar(dtype, data):
    return _array((), dtype, data)[()]


def _array(shape, dtype, data, order='C'):
    if not isinstance(dtype, _SavedDtype):
        raise pickle.UnpicklingError('a numpy array or scalar with a crafted dtype')
    return np.ndarray(shape, dtype.value, data, order=order).copy('K')


def _no_bytes():
    """Stands for bytes, the data of an empty array; bytes(2**40) would take that much memory."""
    return b''


def plain(value, seen=None):
    """Replaces the stand-ins in the containers that checkpoints consist of.

    Each container once (``seen``, by id): a few that hold each other twice are 2**60 in all.
    """
    if isinstance(value, (_SavedArray, _SavedDtype)):
        return value.value
    if not isinstance(value, dict) and type(value) not in (list, tuple):
        return value
    seen = {} if seen is None else seen
    if id(value) not in seen:
        seen[id(value)] = value, value
        if type(value) is tuple:
            seen[id(value)] = value, tuple(plain(item, seen) for item in value)
        elif type(value) is list:
            value[:] = [plain(item, seen) for item in value]
        else:
            for key in value:
                value[key] = plain(value[key], seen)
            if getattr(value, '__dict__', None):
                _check_attributes(value, vars(value))
                plain(vars(value), seen)
    return seen[id(value)][1]


def _check_attributes(ordered, attributes):
    """Only torch's own attribute may come along: others could replace `get` or `items`."""
    if set(attributes) - {'_metadata'}:
        raise pickle.UnpicklingError(
            f'a {type(ordered).__name__} with attributes {sorted(map(str, attributes))}'
        )


def numpy_globals():
    """What numpy's pickles name, and the harmless stand-in for each."""
    # numpy 1.x and 2.x write different module names.
    arrays = [
        (function, f'numpy.{core}.multiarray.{name}')
        for core in ('core', '_core')
        for function, name in ((_SavedArray, '_reconstruct'), (_saved_scalar, 'scalar'))
    ]
    return arrays + [(_SavedArray, 'numpy.ndarray'), (_SavedDtype, 'numpy.dtype')]


@functools.cache
def _safe_globals():
    """What mmengine's checkpoints need beyond torch's own list, each as a harmless stand-in."""
    from mmengine.logging import HistoryBuffer

    class SavedHistory(HistoryBuffer):
        """Takes values only: mmengine would let the file replace methods of all buffers."""

        def __init__(self):
            pass  # the pickle's BUILD brings the values

        def __setstate__(self, state):
            values = {key: state[key] for key in ('max_length', '_log_history', '_count_history')}
            if set(state) - set(values) - {'statistics_methods'}:
                raise pickle.UnpicklingError(f'a HistoryBuffer with attributes {sorted(state)}')
            # From here on it is an ordinary HistoryBuffer, and saved again as one.
            self.__class__ = HistoryBuffer
            self.__setstate__(plain(values))

    def saved_getattr(owner, name):
        # Buffers name their statistics this way. They set their own, so a name will do.
        if owner is SavedHistory and name in ('min', 'max', 'current', 'mean'):
            return name
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr (of {name!r})')

    return numpy_globals() + [
        (_no_bytes, 'builtins.bytes'),
        (SavedHistory, 'mmengine.logging.history_buffer.HistoryBuffer'),
        (saved_getattr, 'builtins.getattr'),
    ]
