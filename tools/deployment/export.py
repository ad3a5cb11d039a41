"""Exports a segmentor, for images of any size and number, and checks the file against mmseg.

What is exported takes `image`, (N, 3, H, W) in RGB, uint8, normalizes it as the data
preprocessor does, and gives `labels`, (N, H, W) in int64, or with --output logits what mmseg's
predict makes them of, `logits`, (N, classes, H, W).

    python tools/deployment/export.py CONFIG CHECKPOINT --format onnx model.onnx
    python tools/deployment/export.py CONFIG CHECKPOINT --format torch_export model.pt2
    python tools/deployment/export.py CONFIG CHECKPOINT --format torchscript model.pt
"""
import argparse
import copy
import statistics
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import mmseg_kn  # noqa: F401 (first: it lets mmseg import beside mmcv-lite)

# isort: split
from mmseg.apis import init_model

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, load_config  # noqa: E402

DTYPES = dict(float32=torch.float32, float16=torch.float16)
# Largest difference between file and float32 model, relative to the largest logit.
TOLERANCE = dict(float32=1e-3, float16=3e-2)


class Deployed(nn.Module):
    """A segmentor from pixels to labels or logits.

    Args:
        model: An ``EncoderDecoder`` of mmseg that predicts the whole image at once.
        output: 'labels' or 'logits'.
        dtype: What the network computes in; ``model`` itself is cast.

    Raises:
        ValueError: The model predicts in windows, or pads what it predicts.
    """

    def __init__(self, model: nn.Module, output: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if model.test_cfg.get('mode', 'whole') != 'whole':
            raise ValueError(
                f"test_cfg.mode must be 'whole', got {model.test_cfg.mode!r}: windows are cut "
                'outside of the network; --cfg-options model.test_cfg.mode=whole exports what '
                'predicts one of them, or a whole image')
        preprocessor = model.data_preprocessor
        if preprocessor.test_cfg:
            raise ValueError(
                f'data_preprocessor.test_cfg must be None, got {dict(preprocessor.test_cfg)}: '
                'images are exported as they are; --cfg-options '
                'model.data_preprocessor.test_cfg=None')
        self.model, self.output, self.dtype = model.to(dtype), output, dtype
        # The network's channels are RGB if the preprocessor turns the loader's BGR.
        self.flip = not preprocessor.channel_conversion
        normalizes = preprocessor._enable_normalize
        for name, plain in (('mean', 0.), ('std', 1.)):
            value = getattr(preprocessor, name) if normalizes else torch.full((3, 1, 1), plain)
            self.register_buffer(name, value.float())

    def forward(self, image: Tensor) -> Tensor:
        image = image.float()
        if self.flip:
            image = image.flip(1)
        image = ((image - self.mean) / self.std).to(self.dtype)
        meta = dict(img_shape=tuple(image.shape[2:]))
        logits = self.model.encode_decode(image, [meta])
        if self.output == 'logits':
            return logits
        if self.model.out_channels == 1:
            return (logits.sigmoid() > self.model.decode_head.threshold).squeeze(1).long()
        return logits.argmax(1)


def export(deployed: Deployed, image: Tensor, fmt: str, path: Path) -> None:
    """Writes the network to a file; ``image`` is an example."""
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    if fmt == 'onnx':
        torch.onnx.export(deployed, (image, ), path, dynamo=True, dynamic_shapes=(dynamic, ),
                          input_names=['image'], output_names=[deployed.output],
                          external_data=False, verbose=False)
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


def difference(exact: Deployed, run, output: str, shape: tuple[int, int, int]) -> float:
    """How far the file is from the float32 model, relative to the model's largest logit.

    Of labels: how far below the largest the model's logit of the file's label is. NaN if one of
    them is.

    Args:
        exact: The float32 model, with logits.
        run: The file, which gives ``output``.
        shape: N, H and W of the image.
    """
    image = torch.randint(0, 256, (shape[0], 3, *shape[1:]), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    logits = exact(image).double()
    found = run(image)
    expected = (len(image), *logits.shape[1 if output == 'logits' else 2:])
    if found.shape != expected:
        return float('inf')
    if output == 'logits':
        error = (found - logits).abs().max()
    elif logits.size(1) == 1:
        distance = logits[:, 0].sigmoid() - exact.model.decode_head.threshold
        return (distance.abs() * ((distance > 0) != found.bool())).max().item()
    else:
        error = (logits.amax(1) - logits.gather(1, found[:, None])[:, 0]).max()
    return (error / logits.abs().max()).item()


def benchmark(deployed: Deployed, run, shape: tuple[int, int], rounds: int) -> str:
    """Medians of model and file, which take turns on one image."""
    image, seconds = torch.randint(0, 256, (1, 3, *shape), dtype=torch.uint8), ([], [])
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
    parser.add_argument('--dtype', default='float32', choices=DTYPES,
                        help='what the network computes in (%(default)s)')
    parser.add_argument('--benchmark', type=int, default=0, metavar='ROUNDS',
                        help='also measure file and model, at --shape, on the CPU')
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = parse_args()
    if args.format == 'onnx':
        for name in ('onnxscript', 'onnxruntime'):
            if find_spec(name) is None:
                raise SystemExit(f'--format onnx needs {name}: pip install onnxscript onnxruntime')
    cfg = load_config(args.config, args.cfg_options)
    model = init_model(cfg, args.checkpoint, device='cpu')
    exact = Deployed(model, 'logits').eval()
    deployed = Deployed(copy.deepcopy(model), args.output, DTYPES[args.dtype]).eval()
    height, width = args.shape
    image = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of tracers; what they may break is checked below
        export(deployed, image, args.format, args.out)
    run, worst = load(args.format, args.out), 0.
    of_what = '' if args.output == 'logits' else ', by the logits of its labels'
    for shape in ((2, height, width), (1, height // 2 + 1, width - 3)):
        error = difference(exact, run, args.output, shape)
        if not error <= TOLERANCE[args.dtype]:  # NaN is not
            args.out.unlink()
            raise SystemExit(f'{args.format} differs from the float32 model by {error:.1g} of its '
                             f'largest logit at {shape}{of_what}: {args.out} was removed')
        worst = max(worst, error)
    print(f'{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB, differs from the float32 model '
          f'by at most {worst:.1g} of its largest logit{of_what}')
    if args.benchmark:
        print(benchmark(deployed, run, (height, width), args.benchmark))


if __name__ == '__main__':
    main()
