"""Strips a checkpoint of training to what inference needs, for publication. See --help."""
import argparse

import numpy as np
from torch import Tensor

from mmseg_kn.checkpoints.files import save_with_hash

# isort: split
from mmengine.runner import CheckpointLoader  # which mmseg_kn keeps from unpickling freely

META = ('cfg', 'dataset_meta', 'CLASSES', 'PALETTE', 'epoch', 'iter', 'mmengine_version',
        'privacy')


def plain(value):
    """Arrays, at any depth, become lists, which torch.load(weights_only=True) takes."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def publish(in_file: str, out_file: str):
    """Writes the weights and the meta data of inference; returns the path.

    Raises:
        ValueError: There is no segmentor's state dict in ``in_file``, or it is damaged or holds
            more than plain data.
        FileNotFoundError: There is no ``in_file``.
    """
    checkpoint = CheckpointLoader.load_checkpoint(in_file, 'cpu', logger='silent')
    weights = checkpoint.get('state_dict') if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not weights or not all(
            isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f'{in_file} must hold the weights of a model under state_dict, as the '
                         'checkpoints of tools/train.py do')
    meta = checkpoint.get('meta') or {}
    meta = {key: plain(meta[key]) for key in META if key in meta}
    return save_with_hash(dict(meta=meta, state_dict=weights), out_file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Keeps a checkpoint's weights, config text and classes; drops optimizer, "
        'schedules and message hub. The name of the file written ends in the first eight digits '
        'of its SHA-256.')
    parser.add_argument('in_file', help='checkpoint of tools/train.py')
    parser.add_argument('out_file', help='file to write, NAME.pth')
    args = parser.parse_args()
    try:
        path = publish(args.in_file, args.out_file)
    except (ValueError, OSError) as error:
        parser.exit(1, f'{error}\n')
    print(f'{path}: {path.stat().st_size / 2**20:.1f} MiB')


if __name__ == '__main__':
    main()
