"""Times the layers and networks that the authors released beside ours, interleaved.

    git clone https://github.com/reza-nasirigerdeh/norm-torch
    python tools/benchmarks/benchmark_norm_torch.py norm-torch --out norm_torch.csv

A time is that of a training step: forward and backward. Layers are those of benchmark_knconv.py
without dilation, which theirs lack; networks are KNResNet-18 and -50 as classifiers of 224 x 224
images. A ratio is theirs over ours.
"""
import argparse
import importlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmark_knconv import SHAPES, Timer, needs_gradient
from shared import device_name, spread, versions, write_csv
from torch import Tensor, nn

from mmseg_kn import KNConv2d, KNResNetClassifier

LAYERS = [name for name, shape in SHAPES.items() if shape[4] == 1]
NETWORKS = ['KNResNet-18', 'KNResNet-50']
FORMATS = {'channels_first': torch.contiguous_format, 'channels_last': torch.channels_last}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('norm_torch', metavar='FOLDER', help='a clone of norm-torch')
    parser.add_argument('--cases', nargs='+', choices=LAYERS + NETWORKS,
                        default=LAYERS + NETWORKS)
    parser.add_argument('--batch-size', type=int, default=2,
                        help='images in a step of a network; layers take one (%(default)s)')
    parser.add_argument('--rounds', type=int, default=7, help='(%(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', help='CSV to write')
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error(f'--rounds must be at least 3, got {args.rounds}')
    if not Path(args.norm_torch, 'layers/knconv.py').is_file():
        parser.error(f'FOLDER must hold layers/knconv.py; {args.norm_torch} does not. '
                     'Clone https://github.com/reza-nasirigerdeh/norm-torch')
    args.device = torch.device(args.device)
    return args


def build(case: str, batch_size: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """Their module, ours, and an input for both."""
    if case in NETWORKS:
        depth = case.split('-')[1]
        theirs = getattr(importlib.import_module('models.knresnet.knresnet'), f'KNResNet{depth}')
        return theirs(), KNResNetClassifier(int(depth), 1000), torch.rand(batch_size, 3, 224, 224)
    layers = importlib.import_module('layers.knconv')
    channels, out, kernel, padding, _, *size = SHAPES[case]
    if kernel == 1:
        theirs, ours = layers.KNConv2d1x1(channels, out), KNConv2d(channels, out, 1)
    else:
        theirs, ours = (layer(channels, out, kernel, 2 if kernel == 7 else 1, padding)
                        for layer in (layers.KNConv2d, KNConv2d))
    return theirs, ours, torch.rand(1, channels, *size)


def measure(case: str, memory_format: torch.memory_format,
            args: argparse.Namespace) -> Iterator[list[float]]:
    """Milliseconds of each round, of theirs and then of ours."""
    torch.manual_seed(0)
    *modules, x = build(case, args.batch_size)
    modules = [m.to(args.device, memory_format=memory_format).train() for m in modules]
    x = x.to(args.device, memory_format=memory_format).requires_grad_(needs_gradient(x.shape[1:]))
    timer, rounds = Timer(args.device), []
    for _ in range(args.rounds + 1):  # the first one warms up
        rounds.append([])
        for module in modules:
            took = timer(lambda: module(x).sum().backward())[0]  # noqa: B023 (called at once)
            rounds[-1].append(took)
            x.grad = None
            module.zero_grad(set_to_none=True)
    return zip(*rounds[1:], strict=True)


def main() -> None:
    args = parse_args()
    sys.path.insert(0, args.norm_torch)
    setting = dict(device=device_name(args.device), **versions())
    print(', '.join(f'{key}: {value}' for key, value in setting.items()))
    table, ratios = [], {}
    for layout, memory_format in FORMATS.items():
        for case in args.cases:
            theirs, ours = measure(case, memory_format, args)
            ratio = statistics.median(theirs) / statistics.median(ours)
            ratios.setdefault((layout, case in LAYERS), []).append(ratio)
            print(f'{layout:14} {case:20} theirs {statistics.median(theirs):9.2f} ms, '
                  f'ours {statistics.median(ours):9.2f} ms, ratio {ratio:.2f}', flush=True)
            table += [dict(**setting, layout=layout, case=case, row=row, **spread(samples, 3))
                      for row, samples in (('norm-torch', theirs), ('mmseg_kn', ours))]
    for (layout, layers), found in ratios.items():
        if layers:
            print(f'{layout:14} geometric mean of {len(found)} layers '
                  f'{statistics.geometric_mean(found):.2f} ({min(found):.2f} to {max(found):.2f})')
    if args.out:
        write_csv(table, args.out)
        print(f'written to {args.out}')


if __name__ == '__main__':
    main()
