"""Times KNConv against convolution, BatchNorm, GroupNorm and the unfused layer, side by side.

Rows are interleaved: each round runs every row once, so that a slow moment of the machine hits
all of them. Shapes are those of KNResNet-18 and -50 at 512 x 1024, output stride 8, and of the
ASPP head, or small ones (--shapes small). Written as CSV: medians and 20 / 80 % quantiles of every
row, with device and versions.

Beside each time stand two floors: the multiply-adds of the convolutions over the rate of a large
1x1 convolution, and the bytes that the row must move at least over the bandwidth of a large copy,
both measured at the start of the run. On a GPU the work of a call waits until all of it is
launched, so that a time is the device's alone; the host's time of the launches has a column of its
own. cuDNN chooses its algorithms by trial, as in the configs.

    python tools/benchmarks/benchmark_knconv.py --out knconv.csv
"""
import argparse
import functools
import math
import statistics
import time

import torch
import torch.nn.functional as F
from shared import device_name, saved_bytes, spread, versions, write_csv
from torch import Tensor, nn

import mmseg_kn
from mmseg_kn.ops import chosen_impl

# name: (in, out, kernel, padding, dilation, H, W)
SHAPES = {
    'r18 stem (stride 2)': (3, 64, 7, 3, 1, 512, 1024),
    'r18 stage1 conv1': (64, 256, 2, 1, 1, 128, 256),
    'r18 stage1 conv2': (256, 64, 2, 0, 1, 129, 257),
    'r18 stage2 conv1': (256, 256, 2, 1, 1, 64, 128),
    'r18 stage3 conv1': (512, 512, 2, 2, 2, 64, 128),
    'r18 stage4 conv2': (724, 724, 2, 0, 4, 68, 132),
    'r50 stage1 conv2': (64, 64, 3, 1, 1, 129, 257),
    'r50 stage2 conv1': (512, 128, 2, 1, 1, 64, 128),
    'r50 stage3 conv2': (201, 201, 3, 2, 2, 66, 130),
    'r50 stage4 conv1': (2048, 512, 1, 0, 1, 64, 128),
    'r50 stage4 conv3': (512, 2048, 1, 0, 1, 64, 128),
    'aspp 1x1': (724, 512, 1, 0, 1, 64, 128),
    'aspp 3x3 rate 12': (724, 512, 3, 12, 12, 64, 128),
}
# Maps so small that calls and passes weigh as much as convolutions
SMALL = {
    'small 2x2, 64 to 256': (64, 256, 2, 1, 1, 64, 64),
    'small 2x2, 256 to 64': (256, 64, 2, 0, 1, 65, 65),
    'small 3x3, 64': (64, 64, 3, 1, 1, 64, 64),
    'small 3x3, 128': (128, 128, 3, 1, 1, 48, 48),
    'small 2x2, 256': (256, 256, 2, 0, 1, 32, 32),
    'small 3x3, 512': (512, 512, 3, 1, 1, 32, 32),
}
# Nearly no arithmetic: what the calls alone take
CALLS = {'calls 3x3, 16': (16, 16, 3, 1, 1, 4, 4)}
ALL = SHAPES | SMALL | CALLS


class UnfusedKNConv(nn.Module):
    """KNConv as the paper's text says it: drop, unfold, normalize each unit, convolve."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, padding: int,
                 dilation: int, dropout_p: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride=kernel)
        self.geometry = dict(kernel_size=kernel, stride=stride, dilation=dilation)
        self.kernel, self.padding, self.dropout_p = kernel, padding, dropout_p

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, [self.padding] * 4)
        reach = self.geometry['dilation'] * (self.kernel - 1) + 1
        height, width = ((size - reach) // self.geometry['stride'] + 1 for size in x.shape[2:])
        dropped = F.unfold(F.dropout(x, self.dropout_p), **self.geometry)
        var, mean = torch.var_mean(dropped, dim=1, unbiased=False, keepdim=True)
        units = (F.unfold(x, **self.geometry) - mean) / torch.sqrt(var + 1e-5)
        # lay the units side by side, for a convolution whose stride is its kernel
        size = (height * self.kernel, width * self.kernel)
        return self.conv(F.fold(units, size, self.kernel, stride=self.kernel))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'],
                        help='float32 on a CPU, bfloat16 on a GPU unless given')
    parser.add_argument('--amp', action='store_true',
                        help='float32 weights under autocast, as a training with AMP has them')
    parser.add_argument('--channels-last', action=argparse.BooleanOptionalAction,
                        help='memory format; on a GPU unless --no-channels-last')
    parser.add_argument('--batch-sizes', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--shapes', nargs='+', choices=['small', *ALL], default=list(SHAPES),
                        help="'small' stands for the six of small maps (the layers of a network)")
    parser.add_argument('--rounds', type=int, default=9, help='(%(default)s)')
    parser.add_argument('--skip', nargs='+', default=[], choices=['reference', 'unfused'],
                        help='rows to leave out, as they need much time and memory')
    parser.add_argument('--out', help='CSV to write')
    args = parser.parse_args()
    args.device = torch.device(args.device)
    args.shapes = [s for shape in args.shapes for s in (SMALL if shape == 'small' else [shape])]
    if args.rounds < 3:
        parser.error(f'--rounds must be at least 3, got {args.rounds}')
    args.dtype = getattr(torch, args.dtype or ('bfloat16' if args.amp
                                               or args.device.type == 'cuda' else 'float32'))
    if args.amp and args.dtype == torch.float32:
        parser.error('--amp computes in half precision; leave out --dtype float32')
    if args.channels_last is None:
        args.channels_last = args.device.type == 'cuda'
    return args


def build_rows(shape: tuple, dropout_p: float = 0.05) -> dict[str, nn.Module]:
    channels, out, kernel, padding, dilation = shape[:5]
    stride = 2 if kernel == 7 else 1

    def conv(bias):
        return nn.Conv2d(channels, out, kernel, stride, padding, dilation, bias=bias)

    def kn(**options):
        return mmseg_kn.KNConv2d(channels, out, kernel, stride, padding, dilation, **options)

    return {
        'conv': conv(True),
        'conv+bn': nn.Sequential(conv(False), nn.BatchNorm2d(out)),
        'conv+gn': nn.Sequential(conv(False), nn.GroupNorm(math.gcd(32, out), out)),
        'reference': kn(impl='reference', dropout_p=dropout_p),
        'unfused': UnfusedKNConv(channels, out, kernel, stride, padding, dilation, dropout_p),
        'knconv p=0': kn(dropout_p=0.0),
        'knconv': kn(dropout_p=dropout_p),
        'conv+bn+relu': nn.Sequential(conv(False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)),
        'knconv+relu': kn(dropout_p=dropout_p, activation='relu'),
    }


# Cycles that a GPU sleeps before a call: some 12 ms, longer than the host launches it
LEAD = 2 * 10**7


class Timer:
    """Milliseconds of a call; on a GPU its peak memory (MiB above what was there), and the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call) -> tuple[float, float, float]:
        if self.device.type != 'cuda':
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3, math.nan, math.nan
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(LEAD)
        events[0].record()
        start = time.perf_counter()
        call()
        host = (time.perf_counter() - start) * 1e3
        events[1].record()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        return events[0].elapsed_time(events[1]), peak / 2**20, host


def measure_peaks(args: argparse.Namespace) -> tuple[float, float]:
    """Multiply-adds per ms of a large 1x1 convolution, and bytes per ms of a large copy."""
    timer, channels = Timer(args.device), 4096 if args.device.type == 'cuda' else 1024
    x = torch.randn(1, channels, 64, 64, device=args.device, dtype=args.dtype)
    weight = torch.randn(channels, channels, 1, 1, device=args.device, dtype=args.dtype)
    if args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    source = torch.ones(2**28, dtype=torch.uint8, device=args.device)
    target = source.clone()
    products = [timer(lambda: F.conv2d(x, weight))[0] for _ in range(7)]
    copies = [timer(lambda: target.copy_(source))[0] for _ in range(7)]
    return channels**2 * 64**2 / min(products), 2 * source.numel() / min(copies)


def needs_gradient(shape: tuple) -> bool:
    return shape[0] > 3


def floors(shape: tuple, batch: int, row: str, mode: str, peaks: tuple, itemsize: int) -> tuple:
    """Milliseconds that the multiply-adds take at least, and the bytes; (None, None) if unknown.

    A convolution reads its input and writes its output; its two gradients read and write two
    more of each. KNConv reads x for the statistics, reads z and writes y; back, it reads g and
    z and writes h, reads x and reads and writes dx. BatchNorm reads z twice and writes y; back,
    it reads g and z twice and writes their gradient. An image needs no gradient. Products with
    padding are counted, which a convolution may leave out.
    """
    extra = {'conv': (0, 0, 0, 0), 'conv+bn': (0, 3, 0, 5), 'knconv': (1, 2, 3, 3)}.get(row)
    if extra is None:
        return None, None
    channels, out, kernel, padding, dilation, height, width = shape
    stride = 2 if kernel == 7 else 1
    ho, wo = ((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
              for size in (height, width))
    x, y = batch * channels * height * width, batch * out * ho * wo
    macs, moved = y * channels * kernel**2, (1 + extra[0]) * x + (1 + extra[1]) * y
    if mode == 'train':
        moved += (2 + extra[3]) * y + ((2 + extra[2]) * x if needs_gradient(shape) else x)
        macs *= 3 if needs_gradient(shape) else 2
    return macs / peaks[0], moved * itemsize / peaks[1]


def measure(shape: tuple, batch: int, args: argparse.Namespace) -> dict:
    """(row, mode) -> list of what :class:`Timer` returns, and (row, 'saved') -> bytes."""
    torch.manual_seed(0)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    x = torch.rand(batch, shape[0], *shape[5:], device=args.device, dtype=args.dtype)
    x = (x - 0.5).relu().contiguous(memory_format=layout).requires_grad_(needs_gradient(shape))
    weights = torch.float32 if args.amp else args.dtype
    rows = {name: layer.to(args.device, weights, memory_format=layout)
            for name, layer in build_rows(shape).items() if name not in args.skip}
    autocast = functools.partial(torch.autocast, args.device.type, args.dtype, enabled=args.amp)
    with torch.no_grad(), autocast():
        grad = torch.randn_like(next(iter(rows.values()))(x))
    timer, results = Timer(args.device), {}

    def train(layer):
        with autocast():
            y = layer(x)
        y.backward(grad)

    def forward(layer):
        with torch.no_grad(), autocast():
            layer(x)

    for mode, call, training in (('train', train, True), ('forward', forward, True),
                                 ('eval', forward, False)):
        for layer in rows.values():
            layer.train(training)
        for i in range(args.rounds + 2):
            for name, layer in rows.items():
                if name in SLOW and i >= max(args.rounds // 2, 2) + 2:
                    continue
                sample = timer(lambda: call(layer))  # noqa: B023 (called at once)
                x.grad = None
                layer.zero_grad(set_to_none=True)
                if i >= 2:
                    results.setdefault((name, mode), []).append(sample)
    with autocast():
        for name, layer in rows.items():
            results[name, 'saved'] = saved_bytes(layer.train(), x)
    return results


def describe(args: argparse.Namespace) -> dict[str, str]:
    probe = torch.empty(1, 1, 1, 1, device=args.device, dtype=args.dtype)
    dtype = str(args.dtype).removeprefix('torch.') + (' AMP' if args.amp else '')
    return dict(device=device_name(args.device), dtype=dtype,
                layout='channels_last' if args.channels_last else 'channels_first',
                impl=chosen_impl(probe), **versions())


SLOW = ('reference', 'unfused')  # in half of the rounds only
# name of the ratio, its rows and mode
RATIOS = (
    ('training step, KNConv p = 0.05 / conv + BatchNorm', 'knconv', 'conv+bn', 'train'),
    ('training step, KNConv p = 0 / conv + BatchNorm', 'knconv p=0', 'conv+bn', 'train'),
    ('training step, KNConv p = 0.05 / conv + GroupNorm', 'knconv', 'conv+gn', 'train'),
    ('training step, KNConv + ReLU / conv + BatchNorm + ReLU', 'knconv+relu', 'conv+bn+relu',
     'train'),
    ('evaluation, KNConv / plain conv', 'knconv', 'conv', 'eval'),
    ('training step, unfused / KNConv', 'unfused', 'knconv', 'train'),
    ('training step, definition / KNConv', 'reference', 'knconv', 'train'),
    ('saved activations, + ReLU, where in == out, KNConv / BatchNorm', 'knconv+relu',
     'conv+bn+relu', 'saved'),
)


def median(samples) -> float:
    return samples if isinstance(samples, int) else statistics.median(s[0] for s in samples)


def main() -> None:
    args = parse_args()
    torch.backends.cudnn.benchmark = True
    setting = describe(args)
    print(', '.join(f'{k}: {v}' for k, v in setting.items()))
    peaks = measure_peaks(args)
    print(f'{peaks[0] * 1e-9:.3f} T multiply-adds/s in a 1x1 convolution, '
          f'{peaks[1] * 1e-6:.1f} GB/s in a copy')
    table, ratios = [], {name: [] for name, *_ in RATIOS}
    print('\n                              training step, ms               evaluation, ms\n'
          'shape                batch  conv + BN    KNConv  floor        conv    KNConv  floor')
    for batch in args.batch_sizes:
        for name in args.shapes:
            shape = ALL[name]
            results = measure(shape, batch, args)
            for (row, mode), samples in results.items():
                if mode == 'saved':
                    continue
                compute, memory = floors(shape, batch, row, mode, peaks, args.dtype.itemsize)
                table.append(dict(
                    **setting, shape=name, batch=batch, row=row, mode=mode,
                    **spread([s[0] for s in samples], 3),
                    host_ms='' if math.isnan(samples[0][2]) else (
                        f'{statistics.median(s[2] for s in samples):.3f}'),
                    peak_mib='' if math.isnan(samples[0][1]) else f'{samples[0][1]:.1f}',
                    saved_mib=f'{results[row, "saved"] / 2**20:.2f}',
                    compute_floor_ms='' if compute is None else f'{compute:.3f}',
                    memory_floor_ms='' if memory is None else f'{memory:.3f}'))
            for title, a, b, mode in RATIOS:
                # activations compare at equal widths
                if a in args.skip or b in args.skip or (mode == 'saved' and shape[0] != shape[1]):
                    continue
                ratios[title].append(median(results[a, mode]) / median(results[b, mode]))
            cells = []
            for mode, base in (('train', 'conv+bn'), ('eval', 'conv')):
                own = median(results['knconv', mode])
                floor = max(floors(shape, batch, 'knconv', mode, peaks, args.dtype.itemsize))
                cells.append(f'{median(results[base, mode]):9.2f} {own:9.2f} {own / floor:6.2f}')
            print(f'{name:20} {batch:5}  {"   ".join(cells)}', flush=True)
    print('floor: KNConv over the higher of its two floors')
    print(f'\ngeometric means over {len(args.shapes) * len(args.batch_sizes)} cases (range)')
    for title, values in ratios.items():
        if values:
            print(f'{title:64} {statistics.geometric_mean(values):6.3f}  '
                  f'({min(values):.2f} .. {max(values):.2f})')
    if args.out:
        write_csv(table, args.out)
        print(f'written to {args.out}')


if __name__ == '__main__':
    main()
