"""Writes the configs of the paper's Tables 1 and 2: one for each network, batch size and data set.

    python tools/misc/paper_configs.py work_dirs/paper
    python tools/train.py work_dirs/paper/resnet34-gn_1xb256_cifar100.py

Table 1 is CIFAR-100 with KNResNet, and with ResNet and PreActResNet of BatchNorm, GroupNorm (32
groups) and LayerNorm (one group), at depths 18, 34 and 50 and batch sizes 2, 32 and 256: 63
configs. Table 2 is ImageNet with KNResNet and ResNet on eight GPUs: 12 configs. Learning rates are
those of the authors' scripts (repository norm-torch, folder reproducibility). A config inherits
from configs/classification and states what differs; they need mmpretrain, as those do.
"""
import argparse
import itertools
import os
from pathlib import Path

CLASSIFICATION = Path(__file__).parents[2] / 'configs/classification'
NORMS = {'KN': None, 'BN': dict(type='BN'), 'GN': dict(type='GN', num_groups=32),
         'LN': dict(type='GN', num_groups=1)}
KINDS = {'resnet': 'ResNetCls', 'preactresnet': 'PreActResNetCls'}  # of the twins
DEPTHS = (18, 34, 50)
BATCH_SIZES = (2, 32, 256)
# Of Table 1, at the batch sizes above.
RATES = {
    ('KN', 18): (0.0015625, 0.05, 0.2),
    ('KN', 34): (0.0015625, 0.05, 0.2),
    ('KN', 50): (0.0015625, 0.025, 0.2),
    ('BN', 18): (0.00078125, 0.025, 0.2),
    ('BN', 34): (0.00078125, 0.025, 0.1),
    ('BN', 50): (0.000390626, 0.0125, 0.1),
    ('GN', 18): (0.0015625, 0.025, 0.1),
    ('GN', 34): (0.0015625, 0.025, 0.1),
    ('GN', 50): (0.00078125, 0.0125, 0.05),
    ('LN', 18): (0.0015625, 0.0125, 0.05),
    ('LN', 34): (0.0015625, 0.0125, 0.05),
    ('LN', 50): (0.00078125, 0.0125, 0.05),
}
PREACT_RATES = {
    ('BN', 18): (0.00078125, 0.025, 0.2),
    ('BN', 34): (0.000390625, 0.025, 0.2),
    ('BN', 50): (0.000195313, 0.0125, 0.2),
    **{('GN', depth): (0.0015625, 0.025, 0.1) for depth in DEPTHS},
    **{('LN', depth): (0.0015625, 0.0125, 0.05) for depth in DEPTHS},
}
# Images of KNResNet are neither shifted nor scaled. Times 255:
STATISTICS = {'cifar100': ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
              'in1k': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}


def name_of(kind: str, norm: str, depth: int, batch_size: int | None) -> str:
    """The name of a config; ``batch_size=None`` is Table 2."""
    network = f'kn{kind}{depth}' if norm == 'KN' else f'{kind}{depth}-{norm.lower()}'
    return f'{network}_' + ('8xb32_in1k' if batch_size is None else f'1xb{batch_size}_cifar100')


def config_of(kind: str, norm: str, depth: int, batch_size: int | None, folder: Path) -> str:
    """The text of that config, which is to stand in ``folder``."""
    imagenet = batch_size is None
    base = CLASSIFICATION / f'knresnet18_{"8xb32_in1k" if imagenet else "1xb32_cifar100"}.py'
    settings = dict(
        _base_=Path(os.path.relpath(base, folder)).as_posix(),
        model=dict(backbone=dict(depth=depth),
                   head=dict(in_channels=2048 if depth == 50 else 512)))
    if norm != 'KN':
        settings['custom_imports'] = dict(imports=['mmseg_kn', 'mmseg_kn.baselines'])
        settings['model']['backbone'] = dict(
            _delete_=True, type=KINDS[kind], depth=depth, norm_cfg=NORMS[norm],
            low_resolution=not imagenet)
        mean, std = STATISTICS['in1k' if imagenet else 'cifar100']
        settings['data_preprocessor'] = dict(mean=[round(255 * m, 4) for m in mean],
                                             std=[round(255 * s, 4) for s in std])
    if not imagenet:
        rates = RATES if kind == 'resnet' else PREACT_RATES
        rate = rates[norm, depth][BATCH_SIZES.index(batch_size)]
        settings['optim_wrapper'] = dict(optimizer=dict(lr=rate))
        settings['train_dataloader'] = dict(batch_size=batch_size)
    return f'# Table {2 if imagenet else 1} of the paper.\n' + ''.join(
        f'{key} = {value!r}\n' for key, value in settings.items())


def write(folder: Path, tables: list[int]) -> list[Path]:
    """Writes the configs of ``tables`` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    batch_sizes = [size for table in tables for size in (BATCH_SIZES if table == 1 else (None, ))]
    paths = []
    for cell in itertools.product(KINDS, NORMS, DEPTHS, batch_sizes):
        kind, norm, _, batch_size = cell
        if kind == 'preactresnet' and (norm == 'KN' or batch_size is None):
            continue  # no such network, and none in Table 2
        path = folder / f'{name_of(*cell)}.py'
        path.write_text(config_of(*cell, folder.resolve()))
        paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='where to write them')
    parser.add_argument('--tables', type=int, nargs='+', choices=(1, 2), default=[1, 2])
    args = parser.parse_args()
    print(f'{len(write(args.folder, args.tables))} configs in {args.folder}')


if __name__ == '__main__':
    main()
