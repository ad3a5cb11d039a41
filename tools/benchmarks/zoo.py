"""Converts one network of every family of mmseg to kernel normalization, and trains it for a step.

For each folder of the installed mmseg's configs, in a process of its own with a time limit:

    knconv, kernelnorm   layers that took the place of BatchNorm; left: BatchNorms that stayed
    other_norms          layers that kernelize leaves alone by default
    bare_convs           convolutions that had no normalization behind them and still have none
    meets                the first layer whose output of an image depends on the other image of a
                         batch of two, in training mode; state: buffers that training changes
    images_per_s         of training steps with one image, per second of CPU time
    error                what could not be done; else the step's loss and gradients are finite

Weights are random, images and labels too, and nothing is downloaded. Families that stand in OUT
already are not run again, so a run that was interrupted continues: delete lines to repeat them.

    OMP_NUM_THREADS=1 python tools/benchmarks/zoo.py --out zoo.csv
"""
import argparse
import copy
import csv
import json
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import mmseg_kn
from mmseg_kn.models.kernelize import KINDS, is_kind

# isort: split
import mmseg
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from shared import device_name, markdown, versions, write_csv  # noqa: E402

CONFIGS = Path(mmseg.__file__).parent / '.mim/configs'
# A family's config is the first by name among those that have the first of these in it.
SMALL_FIRST = ('r18', 'mit-b0', 'vit-t', 'mscan-t', 'tiny', 'pcpvt-s_fpn', 's16_', 'r50-d8_fcn',
               'r50', 'scratch-s', 'base', '')
SIZES = (128, 256)  # of the images, the first that the network takes; then the config's own
COLUMNS = ('family', 'config', 'size', 'batchnorms', 'knconv', 'kernelnorm', 'left', 'other_norms',
           'bare_convs', 'meets', 'state', 'loss', 'images_per_s', 'error', 'torch', 'mmseg',
           'device')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('families', nargs='*', help='folders of configs (all of them)')
    parser.add_argument('--out', help='CSV to write and to continue')
    parser.add_argument('--limit', type=float, default=600, help='seconds of each (%(default)s)')
    parser.add_argument('--one', metavar='CONFIG', help='measure this config here, and print JSON')
    args = parser.parse_args()
    if not args.one and not args.out:
        parser.error('--out must name the CSV to write')
    unknown = set(args.families) - set(families())
    if unknown:
        parser.error(f'families must be folders of {CONFIGS}, got {", ".join(sorted(unknown))}')
    return args


def families() -> list[str]:
    return sorted(path.name for path in CONFIGS.iterdir() if path.name[0] != '_')


def config_of(family: str) -> Path:
    """The config that stands for a family, a small one."""
    paths = sorted((CONFIGS / family).glob('*.py'))
    return next(path for part in SMALL_FIRST for path in paths if part in path.name)


def offline(value):
    """A config without weights to download."""
    if isinstance(value, dict):
        return type(value)({key: None if key == 'pretrained' or isinstance(part, dict)
                            and part.get('type') == 'Pretrained' else offline(part)
                            for key, part in value.items()})
    return type(value)(map(offline, value)) if isinstance(value, (list, tuple)) else value


def random_batch(n: int, size: tuple[int, int], classes: int, rng: torch.Generator
                 ) -> tuple[Tensor, list[SegDataSample]]:
    """Normalized images (n, 3, H, W) and labels, of patches of 8 x 8 pixels."""
    def patches(x: Tensor) -> Tensor:
        x = x.repeat_interleave(8, -2).repeat_interleave(8, -1)
        return x[..., :size[0], :size[1]]

    grid = [-(-side // 8) for side in size]
    samples = []
    for _ in range(n):
        label = patches(torch.randint(classes, (1, *grid), generator=rng))
        sample = SegDataSample(gt_sem_seg=PixelData(data=label),
                               gt_edge_map=PixelData(data=(label == 0).float()))
        sample.set_metainfo(dict(img_shape=size, ori_shape=size, pad_shape=size))
        samples.append(sample)
    images = patches(torch.randn(n, 3, *grid, generator=rng))
    return images + 0.1 * torch.randn(n, 3, *size, generator=rng), samples


def outputs(model: nn.Module, images: Tensor, samples: list) -> list[tuple[str, list[Tensor]]]:
    """What layers put out for the first of two images in training, but those of losses.

    One tensor of a layer, or two, of which one is the first image's: it is not known whether the
    images come first, windows of one together, or second, as in sequences.
    """
    found, handles = [], []

    def keep(name: str, layer: nn.Module, args, y) -> None:
        if isinstance(y, Tensor) and y.dim() > 1:
            found.append((name, [y[:len(y) // 2]] * (len(y) % 2 == 0)
                          + [y[:, 0]] * (y.size(1) == 2)))

    for name, layer in model.named_modules():
        if next(layer.children(), None) is None and 'loss' not in name:
            handles.append(layer.register_forward_hook(partial(keep, name)))
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            model.loss(images, copy.deepcopy(samples))
    finally:
        for handle in handles:
            handle.remove()
    return found


def meeting(model: nn.Module, images: Tensor, samples: list) -> tuple[str, list[str]]:
    """The first layer in which the first image meets its neighbour, and buffers that change.

    ``images`` and ``samples`` are three: the first is seen beside the second and the third.
    """
    model.train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    runs, changed = [], []
    for pair in ([0, 1], [0, 2]):
        runs.append(outputs(model, images[pair], [samples[i] for i in pair]))
        now = dict(model.named_buffers())
        changed = [name for name, before in buffers.items() if not torch.equal(now[name], before)]
        with torch.no_grad():
            for name, before in buffers.items():
                now[name].copy_(before)
    for (name, first), (_, second) in zip(*runs, strict=True):
        if first and not any(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5)
                             for a, b in zip(first, second, strict=True)):
            return name, changed
    return '', changed


def train_step(model: nn.Module, images: Tensor, samples: list, steps: int = 3
               ) -> tuple[float, float]:
    """Loss of the first training step, and images per second of CPU time of those after it."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses, spent = [], []
    for _ in range(steps):
        start = time.process_time()
        loss, _ = model.parse_losses(model.loss(images, copy.deepcopy(samples)))
        loss.backward()
        bad = [name for name, p in model.named_parameters()
               if p.grad is not None and not p.grad.isfinite().all()]
        if bad or not loss.isfinite():
            raise ArithmeticError(f'not finite: {(bad or ["loss"])[0]}')
        nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        spent.append(time.process_time() - start)
    return losses[0], len(images) / min(spent[1:])


def measure(path: Path) -> dict:
    """A row of the table."""
    row = dict.fromkeys(COLUMNS, '')
    row.update(family=path.parent.name, config=path.stem, torch=versions()['torch'],
               mmseg=mmseg.__version__, device=device_name(torch.device('cpu')))
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    try:
        cfg = Config.fromfile(path)
        network = ConfigDict(offline(cfg.model.to_dict()))
        if 'img_size' in network.get('backbone', {}):  # a table of positions of fixed size
            network['backbone']['img_size'] = (SIZES[0], ) * 2
        with DefaultScope.overwrite_default_scope('mmseg'):
            model = MODELS.build(network)
            row['batchnorms'] = sum(is_kind(m, ['BN']) for m in model.modules())
            mmseg_kn.kernelize(model)
            model.init_weights()
        became = Counter(r.became.split()[0] for r in model.conversion)
        others = Counter(type(m).__name__ for m in model.modules()
                         if is_kind(m, set(KINDS) - {'BN'}))
        row.update(
            knconv=sum(isinstance(m, mmseg_kn.KNConv2d) for m in model.modules()),
            kernelnorm=sum(n for kind, n in became.items() if kind.startswith('KernelNorm')),
            left=sum(is_kind(m, ['BN']) for m in model.modules()), bare_convs=became['as'],
            other_norms=', '.join(f'{n} {kind}' for kind, n in sorted(others.items())))
        own = getattr(model.data_preprocessor, 'size', None) or SIZES[:1] * 2
        for size in dict.fromkeys([*((side, side) for side in SIZES), tuple(own)]):
            classes = min(model.num_classes, 19)
            images, samples = random_batch(3, size, max(classes, 2), rng)
            try:
                with DefaultScope.overwrite_default_scope('mmseg'):
                    row['meets'], changed = meeting(model, images, samples)
                    loss, speed = train_step(model, images[:1], samples[:1])
            except (RuntimeError, ValueError, AssertionError, IndexError) as error:
                fault = error
                continue
            row.update(size='x'.join(map(str, size)), state=', '.join(changed),
                       loss=f'{loss:.4g}', images_per_s=f'{speed:.3g}')
            break
        else:
            raise fault
    except Exception as error:  # noqa: BLE001 (a family that fails is a row)
        row['error'] = f'{type(error).__name__}: {error}'.split('\n')[0][:200]
    return row


def run_apart(path: Path, limit: float) -> dict:
    """:func:`measure` in another process, which may crash or take too long."""
    row = dict(dict.fromkeys(COLUMNS, ''), family=path.parent.name, config=path.stem)
    command = [sys.executable, __file__, '--one', str(path)]
    try:
        done = subprocess.run(command, timeout=limit, text=True, capture_output=True)
    except subprocess.TimeoutExpired:
        return dict(row, error=f'took more than {limit:g} s')
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return dict(row, error=(done.stderr.strip().splitlines() or ['no output'])[-1][:200])
    return json.loads(lines[-1])


def table(rows: list[dict]) -> str:
    """What the page of the documentation shows of the rows that have no error."""
    return markdown([{
        'family': row['family'], 'config': row['config'], 'BatchNorm': row['batchnorms'],
        'KNConv': row['knconv'], 'KernelNorm': row['kernelnorm'],
        'other norms, as they were': row['other_norms'],
        'images meet': row['meets'] or ('in ' + row['state'] if row['state'] else 'no'),
        'size': row['size'], 'images/s': row['images_per_s']} for row in rows if not row['error']])


def main() -> None:
    args = parse_args()
    if args.one:
        print(json.dumps(measure(Path(args.one))))
        return
    rows = {}
    if Path(args.out).exists():
        with open(args.out, newline='') as file:
            rows = {row['family']: row for row in csv.DictReader(file)}
    for family in args.families or families():
        if family not in rows:
            row = rows[family] = run_apart(config_of(family), args.limit)
            write_csv([rows[name] for name in sorted(rows)], args.out)
            print(f"{family}: {row['error'] or 'trains'}", flush=True)
    rows = [rows[name] for name in sorted(rows)]
    print(table(rows))
    for row in rows:
        if row['error']:
            print(f"{row['family']}: {row['error']}")


if __name__ == '__main__':
    main()
