"""Exports a segmentor, for images of any size and number, and checks the file against mmseg.

What is exported takes `image`, (N, C, H, W), uint8 or with --image-dtype float32, normalizes it as
the data preprocessor does, and gives `labels`, (N, H, W) in int64, or with --output logits what
mmseg's predict makes them of, `logits`, (N, out_channels, H, W). Three channels are RGB; others
are in the order in which the config's pipeline loads them. There is a file only if it agreed with
the model.

    python tools/deployment/export.py CONFIG CHECKPOINT --format onnx model.onnx
    python tools/deployment/export.py CONFIG CHECKPOINT --format torch_export model.pt2
    python tools/deployment/export.py CONFIG CHECKPOINT --format torchscript model.pt
"""
import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmseg_kn.models.example import image_channels

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, load_config  # noqa: E402
from pictures import loads_bgr  # noqa: E402
from segmentors import (  # noqa: E402
    build_segmentor,
    logits,
    option_prefix,
    threshold,
    turns_colours,
)

DTYPES = dict(float32=torch.float32, float16=torch.float16)
# Largest difference between file and float32 model, relative to the largest logit.
TOLERANCE = dict(float32=1e-3, float16=3e-2)


class Deployed(nn.Module):
    """A segmentor from pixels to labels or logits.

    Args:
        model: An ``EncoderDecoder`` of mmseg that predicts the whole image at once.
        output: 'labels' or 'logits'.
        dtype: What the network computes in; ``model`` itself is cast.
        bgr: Whether the pipeline loads colours as BGR, as mmcv does; the file takes RGB.

    Raises:
        ValueError: The model predicts in windows, or pads what it predicts.
    """

    def __init__(self, model: nn.Module, output: str, dtype: torch.dtype = torch.float32,
                 bgr: bool = True, prefix: str = 'model.') -> None:
        super().__init__()
        if model.test_cfg.get('mode', 'whole') != 'whole':
            raise ValueError(
                f"test_cfg.mode must be 'whole', got {model.test_cfg.mode!r}: windows are cut "
                f'outside of the network; --cfg-options {prefix}test_cfg.mode=whole exports what '
                'predicts one of them, or a whole image')
        preprocessor = model.data_preprocessor
        if preprocessor.test_cfg:
            raise ValueError(
                f'data_preprocessor.test_cfg must be None, got {dict(preprocessor.test_cfg)}: '
                'images are exported as they are; --cfg-options '
                f'{prefix}data_preprocessor.test_cfg=None')
        self.model, self.output, self.dtype = model.to(dtype), output, dtype
        # The preprocessor turns colours, and colours alone.
        self.flip = bgr != turns_colours(preprocessor) and image_channels(model) == 3
        normalizes = preprocessor._enable_normalize
        for name, plain in (('mean', 0.), ('std', 1.)):
            value = getattr(preprocessor, name) if normalizes else torch.full((1, 1, 1), plain)
            self.register_buffer(name, value.float())

    def forward(self, image: Tensor) -> Tensor:
        image = image.float()
        if self.flip:
            image = image.flip(1)
        image = ((image - self.mean) / self.std).to(self.dtype)
        found = logits(self.model, image)
        if self.output == 'logits':
            return found
        if self.model.out_channels == 1:
            return (found.sigmoid() > threshold(self.model)).squeeze(1).long()
        return found.argmax(1)

    def example(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """Images (N, C, H, W) of N, H and W, the same at each call.

        Those in float32 are within two standard deviations of what the network is used to.
        """
        number, *size = shape
        size = number, image_channels(self.model), *size
        generator = torch.Generator().manual_seed(0)
        if dtype == torch.uint8:
            return torch.randint(0, 256, size, dtype=dtype, generator=generator)
        mean, std = (value.flip(0) if self.flip else value for value in (self.mean, self.std))
        return mean + std * (4 * torch.rand(size, generator=generator) - 2)


class _Bins(TorchDispatchMode):
    """Whether something is pooled to more than one bin whatever its size."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # One bin is a mean, another operator.
        self.found |= func.overloadpacket.__name__.lstrip('_').startswith('adaptive_')
        return func(*args, **(kwargs or {}))


def pools_to_bins(deployed: Deployed, image: Tensor) -> bool:
    """Whether the network pools to fixed bins, as PSPNet does, which ONNX cannot at any size."""
    with _Bins() as mode:
        deployed(image)
    return mode.found


def export(deployed: Deployed, image: Tensor, fmt: str, path: Path, fixed: bool = False) -> None:
    """Writes the network to a file; ``image`` is an example, with ``fixed`` also of its size."""
    dynamic = dict.fromkeys((0, ) if fixed else (0, 2, 3), torch.export.Dim.DYNAMIC)
    if fmt == 'onnx':
        program = torch.onnx.export(
            deployed, (image, ), dynamo=True, dynamic_shapes=(dynamic, ), input_names=['image'],
            output_names=[deployed.output], verbose=False)
        if deployed.output == 'logits' and deployed.model.out_channels == 1:
            # What infer_onnx.py makes labels with.
            program.model.metadata_props['threshold'] = str(threshold(deployed.model))
        program.save(path, external_data=False)
    elif fmt == 'torch_export':
        torch.export.save(
            torch.export.export(deployed, (image, ), dynamic_shapes=(dynamic, )), path)
    else:
        torch.jit.trace(deployed, image, check_trace=False).save(path)


def load(fmt: str, path: Path):
    """Returns what runs the file: a function of an image."""
    if fmt == 'onnx':
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        return lambda image: torch.from_numpy(session.run(None, dict(image=image.numpy()))[0])
    if fmt == 'torch_export':
        return torch.export.load(path).module()
    return torch.jit.load(path)


def difference(exact: Deployed, run, output: str, image: Tensor) -> float:
    """How far the file is from the float32 model, relative to the model's largest logit.

    Of labels: how far below the largest the model's logit of the file's label is. NaN if one of
    them is.

    Args:
        exact: The float32 model, with logits.
        run: The file, which gives ``output``.
        image: (N, C, H, W).
    """
    logits = exact(image).double()
    found = run(image)
    expected = (len(image), *logits.shape[1 if output == 'logits' else 2:])
    if found.shape != expected:
        return float('inf')
    if output == 'logits':
        error = (found - logits).abs().max()
    elif logits.size(1) == 1:
        distance = logits[:, 0].sigmoid() - threshold(exact.model)
        return (distance.abs() * ((distance > 0) != found.bool())).max().item()
    else:
        error = (logits.amax(1) - logits.gather(1, found[:, None])[:, 0]).max()
    return (error / logits.abs().max()).item()


def benchmark(deployed: Deployed, run, image: Tensor, rounds: int) -> str:
    """Medians of model and file, which take turns on one image."""
    shape, seconds = image.shape[2:], ([], [])
    for i in range(rounds + 1):  # the first warms up
        for call, times in zip((deployed, run), seconds, strict=True):
            start = time.perf_counter()
            call(image)
            times += [time.perf_counter() - start] * (i > 0)
    model, file = map(statistics.median, seconds)
    return (f'{shape[0]} x {shape[1]}, {torch.get_num_threads()} thread(s), {rounds} rounds: '
            f'file {file * 1e3:.1f} ms, model {model * 1e3:.1f} ms, file / model '
            f'{file / model:.2f}')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_args(parser, 'config file path')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out', type=Path, help='file to write')
    parser.add_argument('--format', required=True, choices=['onnx', 'torch_export', 'torchscript'])
    parser.add_argument('--output', default='labels', choices=['labels', 'logits'],
                        help='(%(default)s)')
    parser.add_argument('--shape', type=int, nargs=2, default=(256, 512), metavar=('H', 'W'),
                        help='of the example; the file takes others too (256 512)')
    parser.add_argument('--fixed-size', action='store_true', help='the file takes --shape alone')
    parser.add_argument('--image-dtype', default='uint8', choices=['uint8', 'float32'],
                        help='what the file takes; float32 for images that are not of 8 bits '
                        '(%(default)s)')
    parser.add_argument('--dtype', default='float32', choices=DTYPES,
                        help='what the network computes in (%(default)s)')
    parser.add_argument('--benchmark', type=int, default=0, metavar='ROUNDS',
                        help='also measure file and model, at --shape, on the CPU')
    return parser.parse_args()


def write(exact: Deployed, deployed: Deployed, args: argparse.Namespace, path: Path):
    """Exports to ``path``; returns what runs the file, and how far it is from ``exact``.

    Raises:
        SystemExit: It cannot be exported or run, or is too far.
    """
    height, width = args.shape
    other = (height, width) if args.fixed_size else (height // 2 + 1, width - 3)
    examples = [exact.example(shape, getattr(torch, args.image_dtype))
                for shape in ((2, height, width), (1, *other))]
    hint = '' if args.fixed_size else (
        f'; --fixed-size exports it for images of --shape {height} {width} alone')
    if args.format == 'onnx' and not args.fixed_size and pools_to_bins(exact, examples[0]):
        raise SystemExit('this network pools to a fixed number of bins, as PSPNet does, which '
                         f'ONNX can only say for images of one size{hint}')
    of_what = '' if args.output == 'logits' else ', by the logits of its labels'
    worst = 0.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of tracers; what they may break is checked below
            export(deployed, examples[0], args.format, path, args.fixed_size)
        run = load(args.format, path)
        for image in examples:
            error = difference(exact, run, args.output, image)
            if not error <= TOLERANCE[args.dtype]:  # NaN is not
                raise SystemExit(
                    f'{args.format} differs from the float32 model by {error:.1g} of its largest '
                    f'logit at {tuple(image.shape)}{of_what}: the file was removed{hint}')
            worst = max(worst, error)
    except Exception as error:
        while error.__cause__ is not None:  # what exporters wrap says where they were, not why
            error = error.__cause__
        first = next(iter(str(error).strip().splitlines()), '')
        raise SystemExit(
            f'{args.format} cannot export this network, or not run what it exported '
            f'({type(error).__name__}: {first}): no file was written{hint}') from error
    return run, f'{worst:.1g} of its largest logit{of_what}'


@torch.no_grad()
def main() -> None:
    args = parse_args()
    if args.format == 'onnx':
        for name in ('onnxscript', 'onnxruntime'):
            if find_spec(name) is None:
                raise SystemExit(f'--format onnx needs {name}: pip install onnxscript onnxruntime')
    cfg = load_config(args.config, args.cfg_options)
    model = build_segmentor(cfg, args.checkpoint)
    loaded = dict(bgr=loads_bgr(cfg, cfg.test_dataloader.dataset), prefix=option_prefix(cfg))
    exact = Deployed(model, 'logits', **loaded).eval()
    deployed = Deployed(copy.deepcopy(model), args.output, DTYPES[args.dtype], **loaded).eval()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # A file gets its name when it has been compared, and is gone otherwise.
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        path = Path(folder, args.out.name)
        run, worst = write(exact, deployed, args, path)
        os.replace(path, args.out)
    print(f'{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB, differs from the float32 model '
          f'by at most {worst}')
    if args.benchmark:
        image = exact.example((1, *args.shape), getattr(torch, args.image_dtype))
        print(benchmark(deployed, run, image, args.benchmark))


if __name__ == '__main__':
    main()
