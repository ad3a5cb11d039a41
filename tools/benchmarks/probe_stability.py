"""Shows what the first iterations of a training do to each KNConv, and where they do harm.

Trains a config as it stands, on its own data, and prints for every KNConv

    flat      share of windows whose variance is below eps: they pass their gradient on
              1 / sqrt(eps) = 316 times larger; the largest share of any iteration
    gradient  norm of the weight's gradient before clipping: at first, at its largest, at last
    signal    share of the output's variance that depends on the position rather than being the
              same everywhere (mmseg_kn.engine.stem_signal_hook.signal_share): at first, at last
    size      standard deviation of the output: at first, at last

"At last" is the median of the last five iterations. Medians over the seeds, then a line for each
seed. Nothing is saved.

    python tools/benchmarks/probe_stability.py \\
        configs/deeplabv3/deeplabv3_knr18-d8_1xb2-400_camvid-160x160.py \\
        --cfg-options optim_wrapper.clip_grad=None
"""
import argparse
import logging
import math
import statistics
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmseg_kn import KNConv2d
from mmseg_kn.engine.stem_signal_hook import signal_share
from mmseg_kn.ops.geometry import make_geometry, pad

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, load_config  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_args(parser, 'train config file path')
    parser.add_argument('--iterations', type=int, default=30, help='(%(default)s)')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2],
                        help='(%(default)s)')
    args = parser.parse_args()
    if args.iterations < 5:
        parser.error(f'--iterations must be at least 5, got {args.iterations}')
    return args


@torch.no_grad()
def flat_share(layer: KNConv2d, x: torch.Tensor) -> float:
    """Share of the windows of x (N, C, H, W) whose variance is below the layer's eps."""
    geometry = make_geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    x = pad(x.detach().double(), geometry)
    maps = torch.stack([x.mean(1), x.square().mean(1)], 1)
    box = torch.full_like(maps[:1, :1, :1, :1], 1 / math.prod(geometry.kernel))
    mean, square = F.conv2d(maps, box.expand(2, 1, *geometry.kernel), None, geometry.stride, 0,
                            geometry.dilation, groups=2).unbind(1)
    return (square - mean**2 < layer.eps).float().mean().item()


class Probe(Hook):
    """Records the columns for every KNConv that trains, and the loss."""

    def __init__(self) -> None:
        self.flat, self.gradient = defaultdict(list), defaultdict(list)
        self.signal, self.size = defaultdict(list), defaultdict(list)
        self.loss = []

    def before_train(self, runner) -> None:
        for name, layer in runner.model.named_modules():
            if isinstance(layer, KNConv2d) and layer.weight.requires_grad:  # not frozen
                layer.register_forward_hook(self.forward_hook(name))
                layer.weight.register_hook(
                    lambda grad, name=name: self.gradient[name].append(grad.norm().item()))

    def forward_hook(self, name: str):
        def record(layer, args, output):
            self.flat[name].append(flat_share(layer, args[0]))
            self.signal[name].append(signal_share(output))
            self.size[name].append(output.detach().std().item())
        return record

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.loss.append(outputs['loss'].item())


def train(config: str, seed: int, args: argparse.Namespace) -> Probe:
    cfg = load_config(config, args.cfg_options)
    cfg.train_cfg.update(max_iters=args.iterations, val_interval=args.iterations + 1)
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)
    cfg.randomness = dict(seed=seed)
    # mmengine keeps one visualizer and one experiment of a name
    cfg.visualizer.name = cfg.experiment_name = f'probe_{seed}'
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        runner = Runner.from_cfg(cfg)
        probe = Probe()
        runner.register_hook(probe)
        runner.train()
    return probe


def last(values: list[float]) -> float:
    return statistics.median(values[-5:])


def summary(probe: Probe, name: str) -> tuple[float, ...]:
    """The row of a layer."""
    gradient, signal, size = probe.gradient[name], probe.signal[name], probe.size[name]
    return (max(probe.flat[name]), gradient[0], max(gradient), last(gradient), signal[0],
            last(signal), size[0], last(size))


def main() -> None:
    args = parse_args()
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    probes = {seed: train(args.config, seed, args) for seed in args.seeds}

    names = list(next(iter(probes.values())).flat)
    if not names:
        raise SystemExit(f'{args.config} has no KNConv that trains')
    width = max(map(len, names))
    print(f'{"":{width}}   flat  gradient: first  largest     last  signal: first  last  '
          'size: first   last')
    for name in names:
        rows = zip(*(summary(probe, name) for probe in probes.values()), strict=True)
        print('{:{}} {:6.3f}  {:15.3f} {:8.2f} {:8.3f}  {:13.2f} {:5.2f}  {:11.2f} {:6.2f}'.format(
            name, width, *map(statistics.median, rows)))
    for seed, probe in probes.items():
        peak, name, i = max((g, name, i) for name, values in probe.gradient.items()
                            for i, g in enumerate(values))
        signal = probe.signal[names[0]]
        print(f'seed {seed}: loss {probe.loss[0]:.2f} -> {last(probe.loss):.2f}, stem signal '
              f'{signal[0]:.2f} -> {last(signal):.2f}, largest gradient {peak:.1f} in {name} at '
              f'iteration {i + 1}')


if __name__ == '__main__':
    main()
