"""Quantizes the convolutions of an ONNX file of tools/deployment/export.py to int8.

    python tools/deployment/quantize_onnx.py model.onnx int8.onnx IMAGE [IMAGE ...]

Weights are int8 for each output channel; activations are uint8, in the range that they have on
the images given, a dozen or two of the training set. Mean, variance and what kernel
normalization does to a convolution's output stay float32. Needs onnx, onnxruntime, pillow and
neither mmseg nor torch. tools/deployment/infer_onnx.py takes the file, and reads images as this
does. There is a new file only if it has predicted the first image.
"""
import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from infer_onnx import each, takes
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static


class Images(CalibrationDataReader):
    """Images as the network takes them, one at a time."""

    def __init__(self, session, paths: list[Path], size: tuple[int, int] | None) -> None:
        network = takes(session)
        self.feeds = ({network.name: image} for image in each(paths, network, size))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def quantize(model: Path, out: Path, images: list[Path], size: tuple[int, int] | None) -> None:
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as folder:
        # KNConv takes the mean off its weight in the graph; folded, the weight is a constant.
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = f'{folder}/folded.onnx'
        session = onnxruntime.InferenceSession(model, options, ['CPUExecutionProvider'])
        written = f'{folder}/{out.name}'
        quantize_static(options.optimized_model_filepath, written, Images(session, images, size),
                        quant_format=QuantFormat.QDQ, op_types_to_quantize=['Conv'],
                        per_channel=True, activation_type=QuantType.QUInt8,
                        weight_type=QuantType.QInt8)
        quantized = onnxruntime.InferenceSession(written, providers=['CPUExecutionProvider'])
        quantized.run(None, Images(session, images[:1], size).get_next())
        os.replace(written, out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', type=Path, help='float32 ONNX file')
    parser.add_argument('out', type=Path)
    parser.add_argument('images', nargs='+', type=Path, help='what the network may expect')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'),
                        help="that the network sees (each image's own)")
    args = parser.parse_args()
    args.size = args.size and tuple(args.size)
    return args


def main() -> None:
    args = parse_args()
    quantize(args.model, args.out, args.images, args.size)
    sizes = [path.stat().st_size / 2**20 for path in (args.model, args.out)]
    print(f'{args.out}: {sizes[1]:.1f} MiB, {args.model}: {sizes[0]:.1f} MiB')


if __name__ == '__main__':
    main()
