"""Measures the images a second that a segmentor predicts, over the images of its test set.

The time is that of the network and of making labels of its output; loading an image, normalizing
it and moving it to the device are not in it. One image at a time, at most 200 of them, after a
few that warm up. Without a checkpoint the weights are random: they do not matter to the time.

    python tools/analysis_tools/benchmark.py CONFIG CHECKPOINT --repeat-times 3
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from mmengine.dataset import pseudo_collate

import mmseg_kn  # noqa: F401 (first: it lets mmseg import beside mmcv-lite)

# isort: split
from mmseg.registry import DATASETS

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, load_config  # noqa: E402
from segmentors import build_segmentor  # noqa: E402

WARMUP, MOST = 5, 200


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_args(parser, 'test config file path')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file')
    parser.add_argument('--log-interval', type=int, default=50, help='images (%(default)s)')
    parser.add_argument('--work-dir', type=Path, help='folder to write fps_TIME.json to')
    parser.add_argument('--repeat-times', type=int, default=1, help='(%(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    if min(args.log_interval, args.repeat_times) < 1:
        parser.error('--log-interval and --repeat-times must be positive')
    args.device = torch.device(args.device)
    return args


@torch.no_grad()
def predict(model: torch.nn.Module, sample: dict) -> float:
    """Seconds that one image takes."""
    data = model.data_preprocessor(pseudo_collate([sample]))
    wait_for(data['inputs'].device)
    start = time.perf_counter()
    model(**data, mode='predict')
    wait_for(data['inputs'].device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    model = build_segmentor(cfg, args.checkpoint, args.device)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    number = min(MOST, len(dataset))
    device = (torch.cuda.get_device_name(args.device) if args.device.type == 'cuda'
              else f'CPU, {torch.get_num_threads()} threads')
    print(f'{args.config}, {device}, torch {torch.__version__}, {number} images')

    result, speeds = dict(config=args.config, unit='img / s'), []
    for run in range(1, args.repeat_times + 1):
        for i in range(WARMUP):
            predict(model, dataset[i % number])
        seconds = 0
        for i in range(number):
            seconds += predict(model, dataset[i])
            if (i + 1) % args.log_interval == 0:
                print(f'Run {run}, image {i + 1} of {number}: {(i + 1) / seconds:.2f} img / s')
        speeds.append(number / seconds)
        result[f'overall_fps_{run}'] = round(speeds[-1], 2)
        print(f'Run {run}: {speeds[-1]:.2f} img / s')
    result['average_fps'] = round(statistics.mean(speeds), 2)
    result['fps_variance'] = round(statistics.pvariance(speeds), 4)
    print(f'Average of {args.repeat_times} runs: {result["average_fps"]} img / s, variance '
          f'{result["fps_variance"]}')
    if args.work_dir:
        args.work_dir.mkdir(parents=True, exist_ok=True)
        path = args.work_dir / time.strftime('fps_%Y%m%d_%H%M%S.json')
        path.write_text(json.dumps(result, indent=4))
        print(f'written to {path}')


if __name__ == '__main__':
    main()
