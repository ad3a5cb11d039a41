"""What a training on a GPU would cost, as far as it can be seen without one.

Triton compiles for compute capability 9.0 and launches nothing (fake_gpu.py), so this runs on any
machine: it counts launches, the bytes they move, compiled variants and instructions in the machine
code, and times the host. It says nothing about how long a GPU takes.

    TRITON_INTERPRET=0 python tools/benchmarks/gpu_dry_run.py --out gpu_dry_run.csv

Rows are metric, case, value:

    launches_layer_step     kernels and torch operations that run something on the GPU, in a
                            training step of KNConv + ReLU, 256 -> 256 channels, 2x2; one that ends
                            in a residual; KernelNorm2d; conv_bn is convolution + BatchNorm + ReLU
    operations_layer_step   the same with torch's views and allocations, which cost the host time
    mib_layer_step          what these read and write for a map of 2 x 256 x 128 x 256
    variants_one_size       kernels that a training of a network compiles
    variants_ten_sizes      ... of ten sizes of images
    min_load_bits_C         the narrowest access of a thread to a map of C channels
    registers_KERNEL        of a thread, of 255; registers_most of the kernels of other layers
    instructions_KERNEL     in its loop over channels, for each element
    shuffles_KERNEL         ... of these, exchanges between threads
    spills                  bytes of registers that did not fit, over all these kernels
    host_us                 the host's time of a step on tiny tensors, launches through Triton's
                            binder included, in microseconds of this thread
    host_ratio_to_conv_bn   ... over that of convolution + BatchNorm + ReLU

Maps are bfloat16 and channels_last and weights float32, as AMP has them, unless the case says so.
"""
import argparse
import statistics
import time

import fake_gpu
import torch
import torch.nn.functional as F
from shared import write_csv
from torch import nn

import mmseg_kn
from mmseg_kn.ops import triton_passes, ways
from mmseg_kn.ops.closed_form import Options
from mmseg_kn.ops.geometry import make_geometry

SIZES = [(512, 1024), (480, 480), (360, 480), (769, 769), (321, 643), (160, 160), (333, 500),
         (512, 512), (480, 854), (129, 257)]
# Kernels with a loop over channels, and how many maps a round of it reads at least
LOOPS = dict(channel_sums=1, scale_grad=2, add_moment_grads=2, pixel_grad=2)
MAPS = {'x_ptr', 'dx_ptr', 'z_ptr', 'y_ptr', 'residual_ptr', 'grad_ptr', 'kept_ptr', 'h_ptr'}
TWICE = {'dx_ptr'}  # read and written


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=200,
                        help='of the timing, 0 for none (%(default)s)')
    parser.add_argument('--channels', type=int, nargs='+', default=[256, 724, 810, 201],
                        help='of which the machine code is read (%(default)s)')
    parser.add_argument('--depths', type=int, nargs='+', default=[18, 50],
                        help='of the KNResNets whose variants are counted (%(default)s)')
    parser.add_argument('--list', action='store_true', help='print every launch of a step')
    parser.add_argument('--out', help='CSV to write')
    return parser.parse_args()


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    empty = torch.empty(shape, device='meta', dtype=dtype)
    return (empty.contiguous(memory_format=torch.channels_last) if len(shape) == 4
            else empty).requires_grad_()


def kn_step(channels: int, dtype: torch.dtype = torch.bfloat16, activation: str | None = 'relu'):
    """A training step of one layer on the meta device."""
    x = meta(2, channels, 128, 256, dtype=dtype)
    # ChannelsLastHook leaves the parameters as they are.
    weight = torch.empty(channels, channels, 2, 2, device='meta', requires_grad=True)
    bias, grad = meta(channels, dtype=torch.float32), meta(2, channels, 129, 257, dtype=dtype)
    residual = None if activation else meta(2, channels, 129, 257, dtype=dtype)
    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    options = Options(make_geometry(2, padding=1), 1, 0.05, True)

    def step():
        with fake_gpu.Operations() as operations:
            y = ways.kn_conv2d(x, weight, bias, residual, options, 1e-5, activation == 'relu',
                               True, 'triton')[0]
            torch.autograd.grad(y, leaves, grad)
        return operations

    return step


def norm_step(channels: int):
    """As :func:`kn_step`, of KernelNorm2d and its relu."""
    x, grad = meta(2, channels, 128, 256), meta(2, channels, 128, 256)
    norm = mmseg_kn.KernelNorm2d(channels, impl='triton', activation='relu')

    def step():
        with fake_gpu.Operations() as operations:
            torch.autograd.grad(norm(x), x, grad)
        return operations

    return step


def conv_bn_step(channels: int, dtype: torch.dtype = torch.bfloat16):
    x, grad = meta(2, channels, 128, 256, dtype=dtype), meta(2, channels, 129, 257, dtype=dtype)
    weight = meta(channels, channels, 2, 2, dtype=torch.float32)
    scale, shift, mean, var = (meta(channels, dtype=torch.float32).detach() for _ in range(4))
    leaves = [x, weight, scale.requires_grad_(), shift.requires_grad_()]

    def step():
        with fake_gpu.Operations() as operations:
            z = F.conv2d(x, weight.to(dtype), padding=1)
            y = F.batch_norm(z, mean, var, scale, shift, training=True).relu_()
            torch.autograd.grad(y, leaves, grad)
        return operations

    return step


def count_layer(driver: fake_gpu.FakeDriver, show: bool):
    for case, step in (('bfloat16', kn_step(256)), ('float32', kn_step(256, torch.float32)),
                       ('bfloat16 + residual', kn_step(256, activation=None)),
                       ('KernelNorm2d + ReLU', norm_step(256)),
                       ('bfloat16, conv_bn', conv_bn_step(256)),
                       ('float32, conv_bn', conv_bn_step(256, torch.float32))):
        driver.launches.clear()
        operations = step()
        yield 'launches_layer_step', case, len(driver.launches) + len(operations.run)
        yield 'operations_layer_step', case, len(driver.launches) + len(operations.all)
        moved = sum(nbytes for _, nbytes in operations.run) + sum(
            tensor.nbytes * (1 + (name in TWICE))
            for launch in driver.launches for name, tensor in launch.tensors.items())
        yield 'mib_layer_step', case, f'{moved / 2**20:.0f}'
        if show:
            print(case, *(launch.kernel for launch in driver.launches), '+', *operations.all)


def count_variants(depth: int):
    net = mmseg_kn.KNResNet(depth, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)).to(
        'meta', torch.bfloat16)
    for module in net.modules():
        if hasattr(module, 'impl'):
            module.impl = 'triton'

    def train(size):
        with fake_gpu.Operations():
            outputs = net(meta(2, 3, *size).detach())
            sum(y.float().sum() for y in outputs).backward()

    found = set()
    for i, size in enumerate(SIZES):
        found |= fake_gpu.variants_asked(lambda size=size: train(size))
        if i in (0, 9):
            yield f'variants_{"ten_sizes" if i else "one_size"}', f'KNResNet-{depth}', len(found)


def read_machine_code(channels: int):
    spills, narrowest, seen = 0, {}, set()
    for case, step in (('', kn_step(channels)),
                       (' + residual', kn_step(channels, activation=None)),
                       (', KernelNorm2d', norm_step(channels))):
        for kernel in triton_passes.KERNELS:
            kernel.device_caches.clear()
        step()
        for variant in fake_gpu.compiled_variants(*triton_passes.KERNELS):
            if variant.hash in seen:
                continue
            seen.add(variant.hash)
            name, label = variant.src.fn.__name__, f'{channels} channels{case}'
            registers, stack = fake_gpu.resources(variant)
            spills += stack
            yield f'registers_{name}', label, registers
            bits = [width for pointer, widths in fake_gpu.access_bits(variant).items()
                    if pointer in MAPS for width in widths]
            if bits:
                narrowest[name] = min([*bits, narrowest.get(name, 128)])
            if name in LOOPS:
                loop, constants = fake_gpu.largest_loop(variant), fake_gpu.constants(variant)
                elements = constants['P'] * (constants['B'] if 'B' in constants
                                             else 4 * constants['C4'])
                elements //= fake_gpu.THREADS * variant.metadata.num_warps
                # a round is not unrolled, and is the one that is meant
                assert 1 <= fake_gpu.moved_bits(loop) / (16 * elements * LOOPS[name]) < 4
                yield f'instructions_{name}', label, f'{len(loop) / elements:.1f}'
                shuffles = sum(opcode.startswith('SHFL') for opcode in loop)
                yield f'shuffles_{name}', label, f'{shuffles / elements:.2f}'
    for name, bits in narrowest.items():
        yield f'min_load_bits_{channels}', name, bits
    yield 'spills', f'{channels} channels', spills


def compile_others():
    """Layers, dtypes and memory formats that are no rule: that they compile at all."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    usual, last = torch.contiguous_format, torch.channels_last
    for name, channels, size, dtype, layout, layer in (
            ('stem', 3, (64, 64), bfloat16, usual, mmseg_kn.KNConv2d(3, 64, 7, 2, 3)),
            ('groups, strided', 8, (9, 9), float32, usual,
             mmseg_kn.KNConv2d(8, 12, 3, 2, 1, groups=4)),
            ('p = 0', 33, (9, 8), float32, last, mmseg_kn.KNConv2d(33, 66, 3, dropout_p=0.0)),
            ('pixels beyond int32', 4, (32768, 16385), bfloat16, last,
             mmseg_kn.KNConv2d(4, 4, 2, activation='relu')),
            ('KernelNorm2d, p = 0', 4, (9, 8), float32, usual,
             mmseg_kn.KernelNorm2d(4, dropout_p=0.0))):
        layer.impl = 'triton'
        x = torch.empty(2, channels, *size, device='meta', dtype=dtype).contiguous(
            memory_format=layout).requires_grad_()
        for kernel in triton_passes.KERNELS:
            kernel.device_caches.clear()
        with fake_gpu.Operations():
            y = layer.to('meta', dtype)(x)
            torch.autograd.grad(y, [x, *layer.parameters()], torch.empty_like(y))
        variants = fake_gpu.compiled_variants(*triton_passes.KERNELS)
        yield ('registers_most', name,
               max(fake_gpu.resources(variant)[0] for variant in variants))


def time_host(driver: fake_gpu.FakeDriver, rounds: int):
    """Interleaved, on tensors of the CPU whose convolutions cost little."""
    driver.launches = None

    def build(layers, amp):
        x, grad = torch.rand(1, 16, 4, 4, requires_grad=True), torch.ones(1, 16, 5, 5)

        def step():
            with torch.autocast('cpu', torch.bfloat16, enabled=amp):
                y = layers(x)
            torch.autograd.grad(y, [x, *layers.parameters()], grad.to(y.dtype))

        return step

    for case, amp in (('float32', False), ('bfloat16 AMP', True)):
        steps = dict(
            kn=build(mmseg_kn.KNConv2d(16, 16, 2, padding=1, activation='relu', impl='triton'),
                     amp),
            conv_bn=build(nn.Sequential(nn.Conv2d(16, 16, 2, padding=1, bias=False),
                                        nn.BatchNorm2d(16), nn.ReLU(inplace=True)), amp))
        times = {name: [] for name in steps}
        for i in range(rounds + 20):
            for name, step in steps.items():
                start = time.thread_time_ns()
                step()
                if i >= 20:
                    times[name].append((time.thread_time_ns() - start) / 1e3)
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, value in medians.items():
            yield 'host_us', f'{case}, {name}', f'{value:.0f}'
        yield 'host_ratio_to_conv_bn', case, f'{medians["kn"] / medians["conv_bn"]:.2f}'


def main() -> None:
    args = parse_args()
    driver = fake_gpu.install()
    torch.set_num_threads(1)
    parts = [count_layer(driver, args.list), *map(count_variants, args.depths),
             *map(read_machine_code, args.channels), compile_others()]
    if args.rounds:
        parts.append(time_host(driver, args.rounds))
    rows = []
    for part in parts:
        for metric, case, value in part:
            rows.append(dict(metric=metric, case=case, value=value))
            print(f'{metric:30} {case:28} {value:>6}', flush=True)
    if args.out:
        write_csv(rows, args.out)
        print(f'written to {args.out}')


if __name__ == '__main__':
    main()
