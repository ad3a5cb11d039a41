"""Counts the parameters and the operations of a segmentor's inference, part by part.

The model runs on shapes alone, so that no size needs memory or time. Counted for one image, each
addition or multiplication on its own, and each reciprocal root, as one multiply-add:

* convolutions, and matrix products: what torch.utils.flop_counter counts.
* kernel normalization: what KNConv and KernelNorm do beside them in evaluation, in closed form
    channel sums     each element of the input, and its square, is added to its pixel's sums
    box sums         both sums over every window, rows first, then columns
    moments          mean, variance and 1 / sqrt(var + eps) of every window: 5
    scale and shift  each element of the output is scaled, and its bias added
    weights          the weight's mean is taken off it (with groups, its sum is taken), each call

Not counted: other normalizations, activations, pooling, resizing, residual sums.

    python tools/analysis_tools/get_flops.py \\
        configs/deeplabv3/deeplabv3_knr18-d8_4xb2-80k_cityscapes-512x1024.py --shape 512 1024
"""
import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmseg_kn import KernelNorm2d, KNConv2d
from mmseg_kn.models.example import image_channels
from mmseg_kn.ops.geometry import make_geometry

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, load_config  # noqa: E402
from segmentors import build_segmentor, logits  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_args(parser, 'config file path')
    parser.add_argument('--shape', type=int, nargs='+', default=[512, 1024],
                        metavar=('H', 'W'),
                        help='size of the image, one number for a square (512 1024)')
    args = parser.parse_args()
    if len(args.shape) > 2 or min(args.shape) < 1:
        parser.error(f'--shape takes height and width, positive numbers, got {args.shape}')
    args.shape = (args.shape[0], args.shape[-1])
    return args


def kernel_norm_operations(module: nn.Module, input: torch.Size, output: torch.Size) -> Counter:
    """What a KernelNorm2d or KNConv2d does in evaluation beside its convolution, by kind."""
    conv = isinstance(module, KNConv2d)
    geometry = make_geometry(module.kernel_size, module.stride, module.padding,
                             module.dilation if conv else 1)
    n, c, height, width = input
    (kh, kw), (ho, wo) = geometry.kernel, geometry.output_size(height, width)
    left, right, *_ = geometry.padding
    centred = conv and module.groups == 1
    count = Counter({
        'channel sums': 2 * n * c * height * width,
        'box sums': 2 * n * ho * ((kh - 1) * (left + width + right) + (kw - 1) * wo),
        # two quotients, variance, + eps, reciprocal root
        'moments': 5 * n * ho * wo,
        # Unless the weight is centred, the mean is taken off each element too.
        'scale and shift': (1 if centred else 2) * output.numel(),
    })
    if conv:
        weights = module.weight.numel()
        count['weights'] = 2 * weights + module.out_channels if centred else weights
    return count


def count(model: nn.Module, call) -> tuple[int, Counter]:
    """Of convolutions, and of kernel normalization by kind, while ``call()`` runs."""
    total = Counter()

    def hook(module, args, output):
        total.update(kernel_norm_operations(module, args[0].shape, output.shape))

    handles = [module.register_forward_hook(hook) for module in model.modules()
               if isinstance(module, (KernelNorm2d, KNConv2d))]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    for handle in handles:
        handle.remove()
    return counter.get_total_flops() // 2, total


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    model = build_segmentor(cfg).to('meta')  # some read their own settings while they are built
    image = torch.empty(1, image_channels(model), *args.shape, device='meta')
    for module in model.modules():
        if isinstance(module, (KernelNorm2d, KNConv2d)):
            module.impl = 'fused'  # triton needs a GPU
    backbone, of_backbone = count(model, lambda: model.extract_feat(image))
    whole, of_whole = count(model, lambda: logits(model, image))

    rows = [('backbone', parameters(model.backbone), backbone, of_backbone.total()),
            ('decode_head', parameters(model.decode_head), whole - backbone,
             of_whole.total() - of_backbone.total())]
    if model.with_neck:
        rows[0] = ('backbone, neck', rows[0][1] + parameters(model.neck), *rows[0][2:])
    rows.append(('inference', sum(row[1] for row in rows), whole, of_whole.total()))
    print(f'{args.config}, one image of {args.shape[0]} x {args.shape[1]}')
    print(f'{"":17}parameters, M  multiply-adds, G: convolutions  kernel normalization')
    for name, weights, convolutions, normalization in rows:
        print(f'{name:17}{weights / 1e6:13.2f}{convolutions / 1e9:32.3f}'
              f'{normalization / 1e9:22.3f}')
    for kind, operations in of_whole.items():
        print(f'  {kind:60}{operations / 1e9:22.3f}')
    if getattr(model, 'with_auxiliary_head', False):
        print(f'{"auxiliary_head":17}{parameters(model.auxiliary_head) / 1e6:13.2f}'
              '  not used in inference')
    print('Other normalizations, activations, pooling and resizing are not counted; see --help.')


if __name__ == '__main__':
    main()
