"""How fast each pass of a KNConv layer moves its maps, against a copy on the same device.

The layer runs as it does in a training, and each pass (mmseg_kn/ops/passes.py) is timed inside it.
Moved are the maps that a pass is given and those that it returns, each once; maps of one channel,
and what a pass reads twice, are not counted. On a GPU the clock is the GPU's, and the host is far
ahead.

    python tools/benchmarks/benchmark_passes.py --out passes.csv
"""
import argparse
import statistics
import time
from collections.abc import Iterable
from unittest import mock

import torch
from shared import device_name, markdown, versions, write_csv
from torch import Tensor

from mmseg_kn import KNConv2d
from mmseg_kn.ops import autograd, chosen_impl, ways
from mmseg_kn.ops.dispatch import passes_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'],
                        help='float32 on a CPU, bfloat16 on a GPU unless given')
    parser.add_argument('--shapes', type=int, nargs='+', default=[64, 256, 724, 2048],
                        help='channels of the layers (%(default)s)')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'), default=(128, 256),
                        help='of the maps (%(default)s)')
    parser.add_argument('--batch-size', type=int, default=2, help='(%(default)s)')
    parser.add_argument('--impl', choices=['auto', 'fused', 'triton'], default='auto')
    parser.add_argument('--rounds', type=int, default=11, help='(%(default)s)')
    parser.add_argument('--out', help='CSV to write')
    args = parser.parse_args()
    args.device = torch.device(args.device)
    args.dtype = getattr(torch, args.dtype or ('bfloat16' if args.device.type == 'cuda'
                                               else 'float32'))
    return args


def maps_of(value) -> Iterable[Tensor]:
    """The maps (N, C, H, W) within arguments or results."""
    if isinstance(value, Tensor):
        if value.dim() == 4 and value.size(1) > 1:
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from maps_of(part)


class TimedPasses:
    """The passes of an implementation, each timed and its bytes counted."""

    def __init__(self, passes, device: torch.device) -> None:
        self.passes = passes
        self.device = device
        self.calls = []  # (name, bytes, start, end)

    def __getattr__(self, name: str):
        function = getattr(self.passes, name)

        def timed(*args):
            given = {x.data_ptr(): x.nbytes for x in maps_of(args)}
            start = self._now()
            result = function(*args)
            end = self._now()
            put = {x.data_ptr(): x.nbytes for x in maps_of(result)}
            self.calls.append((name, sum(given.values()) + sum(put.values()), start, end))
            return result

        return timed

    def _now(self):
        if self.device.type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def taken(self) -> list[tuple[str, int, float]]:
        """(pass, bytes, milliseconds) of every call since the last time."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        calls, self.calls = self.calls, []
        return [(name, moved, start.elapsed_time(end) if self.device.type == 'cuda'
                 else 1e3 * (end - start)) for name, moved, start, end in calls]


def copy_rate(args: argparse.Namespace) -> float:
    """GB/s of a large copy, read and written."""
    x = torch.empty(2**28 if args.device.type == 'cuda' else 2**24, dtype=torch.uint8,
                    device=args.device)
    timed, y = TimedPasses(torch, args.device), torch.empty_like(x)
    rates = []
    for _ in range(args.rounds):
        start = timed._now()
        y.copy_(x)
        timed.calls.append(('copy', 2 * x.nbytes, start, timed._now()))
        (_, moved, milliseconds), = timed.taken()
        rates.append(moved / milliseconds / 1e6)
    return statistics.median(rates)


def measure(channels: int, relu: bool, args: argparse.Namespace) -> dict[str, list]:
    """{pass: [(bytes, milliseconds), ...]} over the rounds of one layer's training step."""
    layer = KNConv2d(channels, channels, 2, padding=1, impl=args.impl,
                     activation='relu' if relu else None).to(args.device, args.dtype)
    layer.to(memory_format=torch.channels_last)
    x = torch.rand(args.batch_size, channels, *args.size, device=args.device, dtype=args.dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn_like(layer(x))
    timed = TimedPasses(passes_of(chosen_impl(x, args.impl)), args.device)
    found = {}
    with mock.patch.object(autograd, 'passes_of', lambda impl: timed), \
            mock.patch.object(ways, 'passes_of', lambda impl: timed):
        for i in range(args.rounds + 2):
            if args.device.type == 'cuda':
                torch.cuda._sleep(10**7)  # cycles, in which the host enqueues the whole step
            layer(x).backward(grad)
            for name, moved, milliseconds in timed.taken():
                if i >= 2:
                    found.setdefault(name, []).append((moved, milliseconds))
    return found


def main() -> None:
    args = parse_args()
    rate, rows = copy_rate(args), []
    setting = dict(device=device_name(args.device), **versions())
    for channels in args.shapes:
        for relu in (False, True):
            for name, calls in measure(channels, relu, args).items():
                if name == 'draw_mask':  # only looks at the size of its map
                    continue
                milliseconds = statistics.median(ms for _, ms in calls)
                moved = calls[0][0]
                rows.append({
                    'channels': channels, 'relu': relu, 'pass': name,
                    'mib': f'{moved / 2**20:.2f}', 'ms': f'{milliseconds:.4f}',
                    'gb_per_s': f'{moved / milliseconds / 1e6:.1f}',
                    'of_a_copy': f'{moved / milliseconds / 1e6 / rate:.3f}'})
    print(', '.join(f'{name} {value}' for name, value in setting.items())
          + f', {str(args.dtype).removeprefix("torch.")}, a copy moves {rate:.1f} GB/s\n')
    print(markdown(rows))
    if args.out:
        write_csv([dict(row, copy_gb_per_s=f'{rate:.1f}', **setting) for row in rows], args.out)
        print(f'written to {args.out}')


if __name__ == '__main__':
    main()
