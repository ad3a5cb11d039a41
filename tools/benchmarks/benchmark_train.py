"""Times whole training and inference steps of models, config against config, interleaved.

Images and labels are random and on the device already: what is measured is the model, its loss
and its optimizer, not the data pipeline. The multiply-adds are those of the backbone's
convolutions for one image. Kept is what a training step keeps for its backward pass, by layer with
--memory. Peak is the most that a step holds above what was there before, weights and momentum.
Private configs clip each sample and add noise as in training.

    python tools/benchmarks/benchmark_train.py \
        configs/deeplabv3/deeplabv3_knr18-d8_1xb2-400_camvid-160x160.py \
        configs/deeplabv3/deeplabv3_r18-d8_1xb2-400_camvid-160x160.py --shape 256 512
"""
import argparse
import logging
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from mmengine.structures import PixelData

import mmseg_kn  # noqa: F401 (first: it lets mmseg import beside mmcv-lite)

# isort: split
from mmengine.optim import build_optim_wrapper
from mmseg.structures import SegDataSample
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mmseg_kn.engine.channels_last_hook import use_channels_last
from mmseg_kn.engine.cuda_graph_hook import use_cuda_graphs
from mmseg_kn.models.example import image_channels

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, load_config  # noqa: E402
from memory import kept_by_layer, peak_bytes  # noqa: E402
from segmentors import build_segmentor, logits  # noqa: E402
from shared import device_name, giga_multiply_adds, spread, versions, write_csv  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_args(parser, 'ratios are to the last one', several=True)
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), default=(512, 1024),
                        help='crop size (%(default)s)')
    parser.add_argument('--batch-size', type=int, default=2, help='images per step (%(default)s)')
    parser.add_argument('--rounds', type=int, default=11, help='(%(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', action='store_true', help='train under AmpOptimWrapper, bfloat16')
    parser.add_argument('--channels-last', action=argparse.BooleanOptionalAction,
                        help='as ChannelsLastHook has it; on a GPU unless --no-channels-last')
    parser.add_argument('--graphs', action='store_true', help='as CudaGraphHook has it')
    parser.add_argument('--profile', type=int, default=0, metavar='OPS',
                        help='print how a training step divides among so many operators')
    parser.add_argument('--memory', type=int, default=0, metavar='LAYERS',
                        help='print so many layers of each config that keep most for backward')
    parser.add_argument('--out', help='CSV to write')
    args = parser.parse_args()
    args.device = torch.device(args.device)
    if args.channels_last is None:
        args.channels_last = args.device.type == 'cuda'
    if args.rounds < 3:
        parser.error(f'--rounds must be at least 3, got {args.rounds}')
    return args


class Contender:
    """A config's model with its optimizer, and one batch."""

    def __init__(self, path: str, args: argparse.Namespace) -> None:
        self.name = Path(path).stem
        cfg = load_config(path, args.cfg_options)
        self.model = build_segmentor(cfg, device=args.device)
        # training crops are sized already
        self.model.data_preprocessor.size = tuple(args.shape)
        self.model.data_preprocessor.size_divisor = None
        if args.channels_last:
            use_channels_last(self.model)
        self.graphs = use_cuda_graphs(self.model, training=None) if args.graphs else None
        wrapper = dict(cfg.optim_wrapper)
        if args.amp:
            wrapper.update(type='AmpOptimWrapper', dtype='bfloat16')
        private = wrapper['type'] == 'DPOptimWrapper'
        if private:
            wrapper.update(target_epsilon=None, noise_multiplier=1.0)
        self.wrapper = build_optim_wrapper(self.model, wrapper)
        if private:
            self.wrapper.attach(self.model, sample_rate=0.01, batch_size=args.batch_size,
                                steps=1, num_items=100 * args.batch_size)
        self.autocast = partial(torch.autocast, args.device.type, torch.bfloat16,
                                enabled=args.amp)
        generator = torch.Generator().manual_seed(0)
        samples = []
        for _ in range(args.batch_size):
            labels = torch.randint(self.model.num_classes, (1, *args.shape),
                                   generator=generator)
            labels = labels.to(args.device)
            sample = SegDataSample(gt_sem_seg=PixelData(data=labels),
                                   gt_edge_map=PixelData(data=labels.new_zeros(labels.shape)))
            sample.set_metainfo(dict(img_shape=args.shape, ori_shape=args.shape,
                                     pad_shape=args.shape))
            samples.append(sample)
        channels = image_channels(self.model)
        images = [torch.randint(256, (channels, *args.shape), dtype=torch.uint8,
                                generator=generator)
                  .to(args.device) for _ in samples]
        self.batch = dict(inputs=images, data_samples=samples)

    def train(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        self.model.train()
        self.model.train_step(self.batch, self.wrapper)

    @torch.no_grad()
    def infer(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        self.model.eval()
        data = self.model.data_preprocessor(self.batch, training=True)
        with self.autocast():
            if isinstance(self.model.decode_head, nn.ModuleList):
                logits(self.model, data['inputs'])  # mode='tensor' knows no point heads
            else:
                self.model(data['inputs'], mode='tensor')

    def kept_mib(self) -> dict[str, float]:
        """Kept by each layer for the backward pass of a training step."""
        data = self.model.train().data_preprocessor(self.batch, training=True)

        def loss():
            with self.autocast():
                return self.model.parse_losses(
                    self.model.loss(data['inputs'], data['data_samples']))[0]

        kept = kept_by_layer(self.model, loss, leave_out=(data['inputs'], ))
        return {name: count / 2**20 for name, count in kept.most_common()}

    def multiply_adds(self) -> float:
        """Of the backbone's convolutions for one image, in 10 ** 9."""
        if self.graphs:
            self.graphs.remove()  # compiled code says nothing of its operations
            self.graphs = None
        self.model.eval()
        image = self.model.data_preprocessor(self.batch, training=True)['inputs'][:1]
        return giga_multiply_adds(lambda: self.model.backbone(image))


def timed(call, device: torch.device) -> float:
    """Seconds."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def times_of_operators(contender: Contender, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds in a training step of each kernel on a GPU, of each operator on the CPU.

    An operator's time is without that of the operators it calls.
    """
    gpu, steps = args.device.type == 'cuda', 3
    contender.train()  # after another's steps the first is not like the others
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            contender.train()
        if gpu:
            torch.cuda.synchronize(args.device)
    kind = 'device' if gpu else 'cpu'
    return {event.key: getattr(event, f'self_{kind}_time_total') / 1e3 / steps
            for event in profiler.key_averages() if not event.is_user_annotation}


def print_profile(contenders: list[Contender], args: argparse.Namespace) -> None:
    columns = [times_of_operators(contender, args) for contender in contenders]
    names = sorted(set().union(*columns), key=lambda name: -max(c.get(name, 0) for c in columns))
    shown, rest = names[:args.profile], names[args.profile:]
    rows = [(name, [c.get(name, 0) for c in columns]) for name in shown]
    rows += [(f'{len(rest)} others', [sum(c.get(name, 0) for name in rest) for c in columns]),
             ('all', [sum(c.values()) for c in columns])]
    print('\ntraining step, ms in each operator, configs in the order above')
    for name, values in rows:
        print(f'{name[:50]:50}' + ''.join(f'{value:10.1f}' for value in values))


def print_kept(name: str, kept: dict[str, float], count: int) -> None:
    shown, rest = list(kept.items())[:count], list(kept.items())[count:]
    print(f'\n{name}: MiB kept for backward, by layer')
    for layer, mib in [*shown, (f'{len(rest)} others', sum(mib for _, mib in rest)),
                       ('all', sum(kept.values()))]:
        print(f'{layer or "loss":50}{mib:10.2f}')


def main() -> None:
    args = parse_args()
    logging.disable(logging.INFO)  # mmengine's line for every initialised weight
    torch.backends.cudnn.benchmark = True  # as the configs have it
    contenders = [Contender(path, args) for path in args.configs]
    setting = dict(device=device_name(args.device), **versions())
    print(', '.join(f'{name} {value}' for name, value in setting.items())
          + f', batch {args.batch_size}, {args.shape[0]} x {args.shape[1]}'
          + (', bfloat16 AMP' if args.amp else '')
          + (', channels_last' if args.channels_last else '')
          + (', graphs' if args.graphs else ''))
    samples = {}
    for i in range(args.rounds + 2):
        for mode in ('train', 'infer'):
            for j, contender in enumerate(contenders):
                sample = timed(getattr(contender, mode), args.device)
                if i >= 2:
                    samples.setdefault((j, mode), []).append(sample)
    rows, kept = [], [contender.kept_mib() for contender in contenders]
    for j, contender in enumerate(contenders):
        macs = contender.multiply_adds()
        for mode in ('train', 'infer'):
            times = samples[j, mode]
            median = statistics.median(times)
            base = statistics.median(samples[len(contenders) - 1, mode])
            peak = peak_bytes(getattr(contender, mode), args.device) / 2**20
            rows.append(dict(config=contender.name, step=mode, **setting, batch=args.batch_size,
                             height=args.shape[0], width=args.shape[1],
                             dtype='bfloat16 AMP' if args.amp else 'float32',
                             layout='channels_last' if args.channels_last else 'channels_first',
                             **spread([1e3 * seconds for seconds in times], 1),
                             images_per_s=f'{args.batch_size / median:.3f}',
                             kept_mib=f'{sum(kept[j].values()):.1f}' if mode == 'train' else '',
                             peak_mib=f'{peak:.1f}',
                             backbone_gmacs=f'{macs:.2f}', ratio=f'{median / base:.3f}'))
    width = max(len(row['config']) for row in rows)
    print(f'{"config":{width}}  step   median ms (20 .. 80 %)     images/s   kept MiB  peak MiB  '
          'backbone GMAC  ratio')
    for row in rows:
        times = f'{row["median_ms"]} ({row["p20_ms"]} .. {row["p80_ms"]})'
        print(f'{row["config"]:{width}}  {row["step"]:5}  {times:25} {row["images_per_s"]:>9} '
              f'{row["kept_mib"] or "-":>10} {row["peak_mib"]:>9} '
              f'{row["backbone_gmacs"]:>14} {row["ratio"]:>6}')
    if args.out:
        write_csv(rows, args.out)
        print(f'written to {args.out}')
    if args.memory:
        for contender, layers in zip(contenders, kept, strict=True):
            print_kept(contender.name, layers, args.memory)
    if args.profile:
        print_profile(contenders, args)


if __name__ == '__main__':
    main()
