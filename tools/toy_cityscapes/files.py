"""Sets of scenes on disk: names, writing, and what keeps other people's files safe."""
import contextlib
import functools
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from .compose import check_size, draw
from .labels import COLOURS, KINDS, TRAIN_IDS

CITIES = {'train': ('lindorf', 'marbeck', 'osthafen'), 'val': ('kranfurt', 'seestadt')}
MANIFEST = 'toy_cityscapes.json'


def paths(split, index):
    """Return a scene's files below the root: image, train ids, label ids, colours."""
    city = CITIES[split][index % len(CITIES[split])]
    stem = f'{split}/{city}/{city}_{index:06d}_000019'
    truth = f'gtFine/{stem}_gtFine_'
    return (f'leftImg8bit/{stem}_leftImg8bit.png', f'{truth}labelTrainIds.png',
            f'{truth}labelIds.png', f'{truth}color.png')


def all_scenes(train, val):
    """Return (split, index) of every scene of a set, in the order of writing."""
    return [('train', index) for index in range(train)] + [('val', index) for index in range(val)]


def write_scene(root, size, seed, job):
    """Draw and write scene job, (split, index); return the pixels of every label id, (256,)."""
    split, index = job
    key = (list(CITIES).index(split), index)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))
    image, label = draw(rng, size, index)
    pictures = (image, TRAIN_IDS[label], label, np.ascontiguousarray(COLOURS[label][..., ::-1]))
    for path, picture in zip(paths(split, index), pictures, strict=True):
        if not cv2.imwrite(str(root / path), picture):
            raise OSError(f'cannot write {root / path}')
    return np.bincount(label.ravel(), minlength=256)


def clear_root(root, new, force):
    """Make room for the `new` relative paths, deleting only an older set of this tool.

    Raises ValueError where a file that this tool did not write is in the way.
    """
    if root.exists() and not root.is_dir():
        raise ValueError(f'{root} is not a folder')
    if not root.exists() or not any(root.iterdir()):
        return
    if not (root / MANIFEST).is_file():
        raise ValueError(f'{root} holds other files; name a new or empty folder')
    if not force:
        raise ValueError(f'{root} already holds a toy set; use --force to replace it')
    try:
        before = json.loads((root / MANIFEST).read_text())
        old = {path for job in all_scenes(before['train'], before['val'])
               for path in paths(*job)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{root / MANIFEST} is damaged; name a new folder') from error
    foreign = [path for path in new if path not in old and (root / path).exists()]
    if foreign:
        raise ValueError(f'{root / foreign[0]} was not written by this tool; name a new folder')
    for path in old:
        (root / path).unlink(missing_ok=True)


def generate(root, train=400, val=100, size=(128, 256), seed=0, workers=1, force=False,
             progress=False):
    """Write a set of street scenes in the Cityscapes layout.

    Any 4 or more scenes of a split show all 19 classes. The same seed gives the same bytes for
    any number of workers, and scene i is the same in a smaller or larger set.

    Args:
        root (str | Path): Folder to write, new or empty (see `force`).
        train (int): Number of training scenes. Default 400.
        val (int): Number of validation scenes. Default 100.
        size (tuple[int]): (H, W) in pixels, at least (64, 96). Default (128, 256).
        seed (int): Not negative. Default 0.
        workers (int): Processes. Default 1, none in addition to this one.
        force (bool): Replace a set that this tool wrote at root; other files stay. Default False.
        progress (bool): Show a progress line on stderr. Default False.

    Returns:
        dict: 'files', the number of PNG files, and 'shares', {split: {class name or 'void':
        fraction of the split's pixels}}.

    Raises:
        ValueError: A bad count, size or seed, or a root that holds other files.
    """
    for name, value, least in (('train', train, 0), ('val', val, 0), ('seed', seed, 0),
                               ('workers', workers, 1), ('train + val', train + val, 1)):
        if value < least:
            raise ValueError(f'{name} must be at least {least}, got {value}')
    check_size(size)
    root, jobs = Path(root), all_scenes(train, val)
    names = [path for job in jobs for path in paths(*job)]
    clear_root(root, names, force)
    for folder in {(root / name).parent for name in names}:
        folder.mkdir(parents=True, exist_ok=True)
    about = {'train': train, 'val': val, 'size': [int(n) for n in size], 'seed': seed}
    (root / MANIFEST).write_text(json.dumps(about) + '\n')

    pixels = {split: np.zeros(256, np.int64) for split in CITIES}
    pool = None
    if workers > 1:
        # Spawned, because a fork hangs where this process's OpenCV has run threads; with one
        # thread each, because the processes already use the cores.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'),
                                   cv2.setNumThreads, (1,))
    with pool or contextlib.nullcontext():
        write = functools.partial(write_scene, root, size, seed)
        counts = pool.map(write, jobs) if pool else map(write, jobs)
        for done, ((split, _), count) in enumerate(zip(jobs, counts, strict=True), 1):
            pixels[split] += count
            if progress:
                print(f'\r{done}/{len(jobs)} scenes', end='', file=sys.stderr, flush=True)
    if progress:
        print(file=sys.stderr)
    shares = {}
    for split, count in pixels.items():
        part = count / max(count.sum(), 1)
        shares[split] = {kind.name: float(part[kind.id]) for kind in KINDS if kind.train_id < 255}
        shares[split]['void'] = float(part[TRAIN_IDS == 255].sum())
    return {'files': len(names), 'shares': shares}
