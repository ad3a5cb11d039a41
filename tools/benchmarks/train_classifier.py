"""Trains small image classifiers without mmpretrain: normalization against normalization.

DATA is a folder, train/CLASS/*.png and val/CLASS/*.png, or the word `digits`: the handwritten
digits that scikit-learn ships, enlarged from 8 x 8 to 32 x 32 or --digits-size, the first half for
training and the second, mostly by other writers, for validation. Each combination of --norms,
--batch-sizes and --seeds is a run of mmengine's Runner in a folder of its own, whose name ends in
a hash of all its settings and of the data; finished runs are kept.

    python tools/benchmarks/train_classifier.py digits --low-resolution --crop-padding 4 \\
        --csv digits.csv

KN is KNResNet in the authors' geometry for classification; BN, GN (32 groups), LN (one group) and
none (scale and shift of each channel alone) are mmseg's ResNetV1c, for low resolution ResNet. The
recipe is the authors' for CIFAR-100 at depth 18, shortened: SGD with momentum 0.9 and weight decay
5e-4; the learning rate falls along a cosine to a hundredth and begins with KN 0.05, BN and GN
0.025, LN 0.0125 at batch 32, KN, GN and LN 0.0015625, BN 0.00078125 at batch 2 (other batch sizes:
in proportion to the nearest of the two; other depths, and none: --lr). KN takes images in [0, 1],
the others shifted and scaled by the training set's mean and standard deviation.

--private EPSILON trains differentially privately (docs/privacy.md): batches of Poisson draws,
each image's gradient clipped, noise, and no weight decay or momentum. It needs --lr. inf clips
and adds no noise. mean and standard deviation of the training set, and all that is printed, are
not private.

The checkpoint's keys are mmpretrain's. But for --low-resolution, whose stem is another, it
initialises a segmentor's backbone, in config or --cfg-options:
init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.').
"""
import argparse
import itertools
import json
import math
import statistics
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.runner import Runner, set_random_seed
from shared import device_name, markdown, short_hash, write_csv
from torch import nn
from torch.utils.data import Dataset, default_collate

import mmseg_kn

# isort: split
from mmseg.models.backbones import ResNetV1c

from mmseg_kn.baselines import ResNetCls
from mmseg_kn.checkpoints.files import write_atomically

NORM_CFGS = dict(BN=dict(type='BN'), GN=dict(type='GN', num_groups=32),
                 LN=dict(type='GN', num_groups=1), none=dict(type='NoNorm'))
LEARNING_RATES = {('KN', 2): 0.0015625, ('BN', 2): 0.00078125, ('GN', 2): 0.0015625,
                  ('LN', 2): 0.0015625,
                  ('KN', 32): 0.05, ('BN', 32): 0.025, ('GN', 32): 0.025, ('LN', 32): 0.0125}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', help='a folder, or digits')
    parser.add_argument('--norms', nargs='+', choices=('KN', *NORM_CFGS),
                        default=['KN', 'BN', 'GN'])
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[2, 32])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--epochs', type=int, default=5, help='(%(default)s)')
    parser.add_argument('--lr', type=float, help='for every run, in place of the above')
    parser.add_argument('--crop-padding', type=int, default=0, metavar='PIXELS',
                        help='training: pad by so many and crop at random')
    parser.add_argument('--flip', action='store_true', help='training: flip at random')
    parser.add_argument('--clip-grad', type=float, metavar='NORM', help='clip gradients')
    parser.add_argument('--zero-init-residual', action='store_true',
                        help='start residual blocks as identity')
    parser.add_argument('--depth', type=int, default=18, choices=(18, 34, 50))
    parser.add_argument('--low-resolution', action='store_true',
                        help='stem for small images: 3x3, stride 1, no pool')
    parser.add_argument('--digits-size', type=int, default=32, metavar='PIXELS',
                        help='to which digits are enlarged (%(default)s)')
    parser.add_argument('--activation', default='relu', help="of all networks, e.g. mish, the "
                        "authors' for private training (%(default)s)")
    parser.add_argument('--private', type=float, metavar='EPSILON',
                        help='train differentially privately, to this epsilon, or inf')
    parser.add_argument('--delta', type=float, default=1e-5, help='of --private (%(default)s)')
    parser.add_argument('--max-grad-norm', type=float, default=1., metavar='NORM',
                        help='--private: clip the gradient of each image (%(default)s)')
    parser.add_argument('--max-physical-batch-size', type=int, default=64, metavar='IMAGES',
                        help='--private: images that pass through the model at once '
                        '(%(default)s)')
    parser.add_argument('--work-dir', default='work_dirs/classifier', help='(%(default)s)')
    parser.add_argument('--csv', help='file to write results to, one line a run')
    args = parser.parse_args()
    if min(args.epochs, args.digits_size, *args.batch_sizes) < 1 or args.crop_padding < 0:
        parser.error('epochs, batch sizes and digits size must be positive, crop padding not '
                     'negative')
    if (args.depth != 18 or 'none' in args.norms) and args.lr is None:
        parser.error('depths 34 and 50 and the norm none need --lr')
    if args.private is not None and (args.lr is None or 'BN' in args.norms or args.clip_grad):
        parser.error("--private needs --lr and --norms without BN, which mixes a batch's images; "
                     '--max-grad-norm takes the place of --clip-grad')
    if args.activation != 'relu' and not args.low_resolution and args.norms != ['KN']:
        parser.error('--activation needs --low-resolution, or --norms KN alone')
    if args.data != 'digits' and not Path(args.data, 'train').is_dir():
        parser.error(f'no folder {args.data}/train; name a folder with train/CLASS/*.png and '
                     'val/CLASS/*.png (tools/benchmarks/street_crops.py makes one), or '
                     'digits')
    return args


class Images(Dataset):
    """Images (3, H, W) uint8 with labels.

    Args:
        images: Arrays (H, W, 3) RGB, or paths.
        labels: A class index each.
        crop_padding: Pad by so many zeros and crop to the old size at random.
        flip: Flip every second image, at random, left to right.
    """

    metainfo = {}  # the Runner warns of a dataset without

    def __init__(self, images, labels, crop_padding: int = 0, flip: bool = False) -> None:
        self.images, self.labels = images, labels
        self.crop_padding, self.flip = crop_padding, flip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        image = self.images[index]
        if isinstance(image, Path):
            path, image = image, cv2.imread(str(image))
            if image is None:
                raise ValueError(f'{path} is damaged')
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        h, w = image.shape[:2]
        if self.crop_padding:
            image = np.pad(image, (*[(self.crop_padding, self.crop_padding)] * 2, (0, 0)))
            top, left = np.random.randint(2 * self.crop_padding + 1, size=2)
            image = image[top:top + h, left:left + w]
        if self.flip and np.random.rand() < .5:
            image = image[:, ::-1]
        image = np.ascontiguousarray(image.transpose(2, 0, 1))
        return dict(inputs=torch.from_numpy(image), data_samples=self.labels[index])


def load(args: argparse.Namespace) -> tuple[Images, Images, list[str]]:
    """Training set, validation set, names of the classes."""
    if args.data == 'digits':
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError:
            raise SystemExit('the digits come with scikit-learn: pip install scikit-learn'
                             ) from None
        digits = load_digits()
        images = [cv2.resize((i * (255 / 16)).astype(np.uint8), (args.digits_size, ) * 2)
                  for i in digits.images]
        images = [np.repeat(i[..., None], 3, axis=2) for i in images]
        labels, half = digits.target.tolist(), len(images) // 2
        train, val = (images[:half], labels[:half]), (images[half:], labels[half:])
        classes = [str(name) for name in digits.target_names]
    else:
        classes = sorted(p.name for p in Path(args.data, 'train').iterdir() if p.is_dir())
        unknown = {p.name for p in Path(args.data, 'val').glob('*') if p.is_dir()} - {*classes}
        if unknown:
            raise SystemExit(f'{args.data}/val has classes that {args.data}/train has not: '
                             f'{sorted(unknown)}')
        train, val = (find(Path(args.data, split), classes) for split in ('train', 'val'))
    train, val = Images(*train, args.crop_padding, args.flip), Images(*val)
    size = train[0]['inputs'].shape[1:]
    needed = build_backbone('KN', args).min_size
    if min(size) < needed:
        stem = 'small images' if args.low_resolution else 'ImageNet'
        remedy = 'take larger ones' if args.low_resolution else '--low-resolution'
        raise SystemExit(f'images of {size[0]} x {size[1]} pixels are too small for the stem of '
                         f'{stem}, which needs {needed}: {remedy}')
    return train, val, classes


def digest(*sets: Images) -> str:
    """Changes with the names, sizes and labels of the images."""
    names = [(str(image.relative_to(image.parents[2])), image.stat().st_size, label)
             if isinstance(image, Path) else (image.tobytes().hex(), label)
             for images in sets
             for image, label in zip(images.images, images.labels, strict=True)]
    return short_hash(json.dumps(names))


def find(folder: Path, classes: list[str]) -> tuple[list[Path], list[int]]:
    """The images of a split, and their classes."""
    found = [(path, i) for i, name in enumerate(classes)
             for path in sorted((folder / name).glob('*.png'))]
    if not found:
        raise SystemExit(f'no images *.png in the folders of classes in {folder}')
    images, labels = zip(*found, strict=True)
    return images, labels


def moments(images: Images, most: int = 2000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of evenly chosen images."""
    images = Images(images.images, images.labels)
    chosen = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    stack = torch.stack([images[i]['inputs'] for i in chosen]).double()
    return stack.mean((0, 2, 3)).tolist(), stack.std((0, 2, 3)).tolist()


class Classifier(BaseModel):
    """Backbone, global average pooling, linear layer; keys as mmpretrain's ImageClassifier."""

    def __init__(self, backbone: nn.Module, num_classes: int, mean, std) -> None:
        super().__init__(ImgDataPreprocessor(mean, std))
        self.backbone = backbone
        self.head = nn.ModuleDict(dict(fc=nn.Linear(backbone.feat_dim, num_classes)))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        logits = self.head['fc'](self.backbone(inputs)[-1].mean((2, 3)))
        if mode == 'tensor':
            return logits
        labels = torch.as_tensor(data_samples, device=logits.device)  # a list in private batches
        if mode == 'loss':
            return dict(loss=F.cross_entropy(logits, labels))
        return list(zip(logits.argmax(1).tolist(), labels.tolist(), strict=True))


class Accuracy(BaseMetric):
    """Share of images whose class is predicted, in percent."""

    default_prefix = 'accuracy'

    def process(self, data_batch, data_samples) -> None:
        self.results.extend(prediction == label for prediction, label in data_samples)

    def compute_metrics(self, results) -> dict:
        return dict(top1=100 * sum(results) / len(results))


def build_backbone(norm: str, args: argparse.Namespace) -> nn.Module:
    if norm == 'KN':
        return mmseg_kn.KNResNetCls(args.depth, low_resolution=args.low_resolution,
                                    zero_init_residual=args.zero_init_residual,
                                    activation=args.activation)
    if args.low_resolution:
        return ResNetCls(args.depth, NORM_CFGS[norm], low_resolution=True,
                         activation=args.activation, zero_init_residual=args.zero_init_residual)
    return ResNetV1c(depth=args.depth, out_indices=(3, ), norm_cfg=NORM_CFGS[norm],  # segmentors'
                     norm_eval=False, zero_init_residual=args.zero_init_residual)


def private_settings(args: argparse.Namespace, iterations: int, lr: float) -> dict:
    """Of the Runner, in place of those of ordinary training."""
    import mmseg_kn.privacy  # noqa: F401 (registers what is named below)
    noise = (dict(noise_multiplier=0.) if math.isinf(args.private) else
             dict(target_epsilon=args.private))
    return dict(
        train_cfg=dict(type='DPIterBasedTrainLoop', max_iters=iterations, val_interval=iterations,
                       max_physical_batch_size=args.max_physical_batch_size),
        optim_wrapper=dict(
            type='DPOptimWrapper', **noise, target_delta=args.delta,
            max_grad_norm=args.max_grad_norm, accountant='rdp',
            optimizer=dict(type='SGD', lr=lr)),
        custom_hooks=[dict(type='DPHook')],
        log_processor=dict(by_epoch=False),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False,
                                           interval=iterations, save_optimizer=False)))


def run(args: argparse.Namespace, sets, settings: dict, folder: Path) -> float:
    """Trains and validates; returns the accuracy at the end."""
    norm, batch_size, seed, lr = (settings[k] for k in ('norm', 'batch_size', 'seed', 'lr'))
    train, val, classes = sets
    set_random_seed(seed)
    mean, std = ([0.] * 3, [255.] * 3) if norm == 'KN' else moments(train)
    iterations = -(-len(train) // batch_size) * args.epochs

    def loader(dataset, batch_size, shuffle):
        return dict(dataset=dataset, batch_size=batch_size, num_workers=0,
                    sampler=dict(type=DefaultSampler, shuffle=shuffle),
                    collate_fn=default_collate)

    train_loader = loader(train, batch_size, True)
    training = dict(
        train_cfg=dict(by_epoch=True, max_epochs=args.epochs),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=lr, momentum=.9, weight_decay=5e-4),
            clip_grad=args.clip_grad and dict(max_norm=args.clip_grad)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=args.epochs,
                                           save_optimizer=False)))
    if args.private is not None:
        training = private_settings(args, iterations, lr)
        train_loader.update(batch_sampler=dict(type='PoissonBatchSampler'),
                            collate_fn=dict(type='private_collate'))
    runner = Runner(
        Classifier(build_backbone(norm, args), len(classes), mean, std),
        work_dir=str(folder),
        experiment_name=f'{folder.name}_{time.time_ns()}',
        train_dataloader=train_loader,
        val_dataloader=loader(val, 32, False),
        val_cfg=dict(),
        val_evaluator=[Accuracy()],
        param_scheduler=dict(type='CosineAnnealingLR', T_max=iterations, eta_min=lr / 100,
                             by_epoch=False),
        randomness=dict(seed=seed),
        **training)
    runner.train()
    return runner.message_hub.get_scalar('val/accuracy/top1').current()


def initial_lr(norm: str, batch_size: int) -> float:
    nearest = 2 if batch_size < 8 else 32
    return LEARNING_RATES[norm, nearest] * batch_size / nearest


def result_of(args: argparse.Namespace, sets, norm: str, batch_size: int, seed: int) -> dict:
    """Runs, unless it was run before; returns settings and accuracy."""
    settings = dict(
        data=f'{Path(args.data).name}-{digest(*sets[:2])}', depth=args.depth,
        low_resolution=args.low_resolution, norm=norm, batch_size=batch_size, seed=seed,
        epochs=args.epochs,
        lr=args.lr if args.lr is not None else initial_lr(norm, batch_size),
        crop_padding=args.crop_padding, flip=args.flip, clip_grad=args.clip_grad,
        zero_init_residual=args.zero_init_residual)
    last = f'epoch_{args.epochs}'
    if args.activation != 'relu':
        settings['activation'] = args.activation
    if args.private is not None:
        last = f'iter_{-(-len(sets[0]) // batch_size) * args.epochs}'
        settings.update(epsilon=args.private, delta=args.delta, max_grad_norm=args.max_grad_norm)
    digits = short_hash(json.dumps(settings))
    folder = Path(args.work_dir, f'{norm}{args.depth}_b{batch_size}_s{seed}-{digits}')
    file = folder / 'result.json'
    checkpoint = folder / f'{last}.pth'
    if file.exists():
        result = json.loads(file.read_text())
        print(f'{checkpoint}: {result["accuracy"]:.1f} % (kept)')
        return result
    start = time.time()
    accuracy = run(args, sets, settings, folder)
    result = dict(settings, accuracy=round(accuracy, 2), seconds=round(time.time() - start),
                  torch=torch.__version__, device=device_name())
    write_atomically(file, json.dumps(result).encode())
    print(f'{checkpoint}: {accuracy:.1f} %')
    return result


def report(results: list[dict]) -> None:
    """Prints mean and standard deviation over the seeds, in Markdown."""
    groups, rows = {}, []
    for r in results:
        groups.setdefault((r['norm'], r['batch_size'], r['lr']), []).append(r)
    for (norm, batch_size, lr), runs in groups.items():
        name = f'KNResNet-{runs[0]["depth"]}'
        if norm != 'KN':
            name = f'ResNet-{runs[0]["depth"]}, {norm}'
        values = [r['accuracy'] for r in runs]
        spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
        rows.append({
            '': name, 'batch size': batch_size, 'learning rate': f'{lr:g}',
            'accuracy, %': f'{statistics.mean(values):.1f}{spread}',
            'of each seed': ', '.join(f'{v:.1f}' for v in values)})
    print(f'\n{markdown(rows)}', end='')


def main() -> None:
    args = parse_args()
    sets = load(args)
    results = []
    runs = list(itertools.product(args.norms, args.batch_sizes, args.seeds))
    for i, (norm, batch_size, seed) in enumerate(runs):
        print(f'[{i + 1}/{len(runs)}] {norm}, batch {batch_size}, seed {seed}')
        results.append(result_of(args, sets, norm, batch_size, seed))
        if args.csv:
            Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
            write_csv(results, args.csv)
    report(results)


if __name__ == '__main__':
    main()
