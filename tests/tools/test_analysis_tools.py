"""Complexity, speed and pictures of a config, and a checkpoint to publish, as a user gets them."""
import csv
import hashlib
import json
import math
import re

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from program import ROOT, execute, load_tool
from torch.utils.flop_counter import FlopCounterMode
from toy_cityscapes import generate

from mmseg_kn import KernelNorm2d, KNConv2d

# isort: split
from mmseg.apis import init_model

CONFIGS = ROOT / 'configs/deeplabv3'
CONFIG = CONFIGS / 'deeplabv3_knr18-d8_1xb4-600_toy-cityscapes-128x256.py'
FLOPS, BENCHMARK, PUBLISH, BROWSE = (
    ROOT / 'tools' / name for name in ('analysis_tools/get_flops.py',
                                       'analysis_tools/benchmark.py', 'misc/publish_model.py',
                                       'misc/browse_dataset.py'))


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp('scenes')
    generate(root, train=3, val=1, size=(64, 128))
    return root


@pytest.fixture(scope='module')
def options(scenes):
    splits = ('train', 'val', 'test')
    return ['--cfg-options', 'model.data_preprocessor.size=(64,128)',
            *(f'{split}_dataloader.dataset.data_root={scenes}' for split in splits),
            *(f'{split}_dataloader.num_workers=0' for split in splits),
            *(f'{split}_dataloader.persistent_workers=False' for split in splits)]


@pytest.fixture(scope='module')
def trained(tmp_path_factory, options):
    """A checkpoint that tools/train.py wrote."""
    work = tmp_path_factory.mktemp('work')
    execute(ROOT / 'tools/train.py', CONFIG, '--work-dir', work, *options,
            'train_cfg.max_iters=1', 'train_cfg.val_interval=2', 'train_dataloader.batch_size=1',
            'default_hooks.checkpoint.interval=1', cwd=work)
    return work / 'iter_1.pth'


class Tally:
    """Arithmetic that counts itself."""

    def __init__(self):
        self.count = 0

    def fma(self, a, b, c):
        self.count += 1
        return a * b + c

    def add(self, a, b):
        return self.fma(a, 1, b)

    def mul(self, a, b):
        return self.fma(a, b, 0)

    def rsqrt(self, a):
        self.count += 1
        return a**-0.5


def evaluate_by_hand(layer, x):
    """The layer's output for x (C, H, W), the count of its convolution and that of the rest."""
    conv, norm = Tally(), Tally()
    (kh, kw), (sh, sw) = layer.kernel_size, layer.stride
    dh, dw = getattr(layer, 'dilation', (1, 1))
    channels, height, width = x.shape
    sums, squares = np.zeros((2, height, width))
    for c, i, j in np.ndindex(x.shape):
        sums[i, j] = norm.add(x[c, i, j], sums[i, j])
        squares[i, j] = norm.fma(x[c, i, j], x[c, i, j], squares[i, j])
    ph, pw = layer.padding
    x = np.pad(x, ((0, 0), (ph, ph), (pw, pw)))
    height, width = height + 2 * ph, width + 2 * pw
    ho, wo = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1

    def box(map):
        map = np.pad(map, ((ph, ph), (pw, pw)))
        rows = np.zeros((ho, width))
        for i, j in np.ndindex(rows.shape):
            rows[i, j] = map[i * sh, j]
            for a in range(1, kh):
                rows[i, j] = norm.add(rows[i, j], map[i * sh + a * dh, j])
        boxes = np.zeros((ho, wo))
        for i, j in np.ndindex(boxes.shape):
            boxes[i, j] = rows[i, j * sw]
            for b in range(1, kw):
                boxes[i, j] = norm.add(boxes[i, j], rows[i, j * sw + b * dw])
        return boxes

    sums, squares = box(sums), box(squares)
    unit, p = channels * kh * kw, layer.dropout_p
    mean, rstd = np.zeros((2, ho, wo))
    for at in np.ndindex(mean.shape):
        mean[at] = norm.mul(sums[at], 1 / unit)
        second = norm.mul(squares[at], (1 - p / unit) / (1 - p) / unit)
        rstd[at] = norm.rsqrt(norm.add(norm.fma(-mean[at], mean[at], second), layer.eps))

    if isinstance(layer, KernelNorm2d):
        y = np.zeros((channels, ho * kh, wo * kw))
        for c, i, j, a, b in np.ndindex(channels, ho, wo, kh, kw):
            centred = norm.add(x[c, i * sh + a, j * sw + b], -mean[i, j])
            y[c, i * kh + a, j * kw + b] = norm.mul(centred, rstd[i, j])
        return y, conv.count, norm.count

    weight, bias = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy()
    out, per_group = weight.shape[:2]
    total = np.zeros(out)
    for at in np.ndindex(weight.shape):
        total[at[0]] = norm.add(weight[at], total[at[0]])
    if layer.groups == 1:
        total = [norm.mul(t, 1 / unit) for t in total]
        for at in np.ndindex(weight.shape):
            weight[at] = norm.add(weight[at], -total[at[0]])
    y = np.zeros((out, ho, wo))
    for o, i, j in np.ndindex(y.shape):
        first = o // (out // layer.groups) * per_group
        z = 0
        for c, a, b in np.ndindex(weight.shape[1:]):
            z = conv.fma(weight[o, c, a, b], x[first + c, i * sh + a * dh, j * sw + b * dw], z)
        if layer.groups > 1:
            z = norm.fma(-total[o], mean[i, j], z)
        y[o, i, j] = norm.fma(z, rstd[i, j], bias[o])
    return y, conv.count, norm.count


@pytest.mark.parametrize('layer', [
    KNConv2d(3, 4, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
    KNConv2d(4, 6, 3, stride=2, padding=1, groups=2),
    KNConv2d(4, 5, 1),
    KernelNorm2d(3, (2, 3), (2, 1), padding=(0, 1)),
    KernelNorm2d(4),
], ids=str)
def test_operations_of_a_layer_counted_by_hand(layer):
    layer = layer.double().eval()
    if isinstance(layer, KNConv2d):
        torch.nn.init.normal_(layer.bias)
    channels = getattr(layer, 'in_channels', getattr(layer, 'num_features', None))
    x = torch.randn(1, channels, 5, 7, dtype=torch.float64)
    expected, convolution, normalization = evaluate_by_hand(layer, x[0].numpy())

    counted, by_kind = load_tool(FLOPS).count(layer, lambda: layer(x))
    assert np.allclose(layer(x)[0].detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    assert counted == convolution
    assert by_kind.total() == normalization


def test_counting_leaves_no_hooks():
    layer = KNConv2d(2, 2, 1)
    tool = load_tool(FLOPS)
    twice = [tool.count(layer, lambda: layer(torch.rand(1, 2, 3, 3))) for _ in range(2)]
    assert twice[0] == twice[1]


def table(log):
    """Rows of get_flops.py: name -> numbers."""
    rows = [re.split(r'\s{2,}', line.strip()) for line in log.splitlines()]
    return {name: [float(v) for v in values] for name, *values in rows
            if values and all(re.fullmatch(r'[\d.]+', v) for v in values)}


@pytest.mark.parametrize('name', ['knr18', 'r18'])
def test_get_flops(name, tmp_path):
    config = CONFIGS / f'deeplabv3_{name}-d8_4xb2-80k_cityscapes-512x1024.py'
    log = execute(FLOPS, config, '--shape', 64, 128, cwd=tmp_path)
    rows = table(log)

    model = init_model(str(config), device='cpu')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, 64, 128), mode='tensor')
    assert rows['inference'][1] == pytest.approx(counter.get_total_flops() / 2e9, abs=5e-4)
    for i in range(3):
        assert rows['backbone'][i] + rows['decode_head'][i] == pytest.approx(
            rows['inference'][i], abs=0.011)
    backbone = sum(p.numel() for p in model.backbone.parameters())
    assert rows['backbone'][0] == pytest.approx(backbone / 1e6, abs=5e-3)
    assert 'not used in inference' in log
    if name == 'knr18':
        kinds = ('channel sums', 'box sums', 'moments', 'scale and shift', 'weights')
        assert math.isclose(sum(rows[kind][0] for kind in kinds), rows['inference'][2],
                            abs_tol=3e-3)
        assert rows['weights'][0] > 0.02
    else:
        assert rows['inference'][2] == 0 and 'channel sums' not in rows


def main(monkeypatch, tool, *args):
    """Runs a tool in this process."""
    monkeypatch.setattr('sys.argv', [str(tool), *map(str, args)])
    load_tool(tool).main()


def test_get_flops_refuses_other_models(monkeypatch):
    config = ROOT / 'configs/classification/knresnet18_1xb2_cifar100.py'
    with pytest.raises(SystemExit, match='has no model.decode_head: not a segmentor'):
        main(monkeypatch, FLOPS, config)


def test_get_flops_refuses_an_empty_image(monkeypatch):
    config = CONFIGS / 'deeplabv3_knr18-d8_4xb2-80k_cityscapes-512x1024.py'
    with pytest.raises(SystemExit) as exit:
        main(monkeypatch, FLOPS, config, '--shape', 0)
    assert exit.value.code == 2


def test_publish(trained, options, scenes, tmp_path):
    log = execute(PUBLISH, trained, tmp_path / 'out/knr18.pth', cwd=tmp_path)
    path, = (tmp_path / 'out').iterdir()
    assert str(path) in log
    assert path.name == f'knr18-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth'
    assert path.stat().st_size < 0.6 * trained.stat().st_size

    published = torch.load(path, weights_only=True)
    assert published.keys() == {'meta', 'state_dict'}
    meta = published['meta']
    assert 'KNResNet' in meta['cfg'] and meta['dataset_meta']['classes'][0] == 'road'
    assert not meta.keys() & {'seed', 'experiment_name', 'time'}

    image = torch.randint(256, (3, 64, 128), dtype=torch.uint8)
    logits, names = [], []
    for file in (trained, path):
        model = init_model(str(CONFIG), str(file), device='cpu')
        names.append(model.dataset_meta['classes'])
        data = pseudo_collate([dict(inputs=image)])
        with torch.no_grad():
            logits.append(model(model.data_preprocessor(data)['inputs'], mode='tensor'))
    assert torch.equal(*logits) and names[0] == names[1]

    log = execute(ROOT / 'tools/test.py', CONFIG, path, '--work-dir', tmp_path, *options,
                  cwd=tmp_path)
    assert 'mIoU' in log and 'motorcycle' in log


def test_arrays_in_the_meta_data_are_published_as_lists(tmp_path):
    meta = dict(dataset_meta=dict(classes=('a', 'b'), palette=np.arange(6).reshape(2, 3)))
    torch.save(dict(meta=meta, state_dict=dict(weight=torch.ones(2))), tmp_path / 'in.pth')
    path = load_tool(PUBLISH).publish(str(tmp_path / 'in.pth'), tmp_path / 'out.pth')
    palette = torch.load(path, weights_only=True)['meta']['dataset_meta']['palette']
    assert palette == [[0, 1, 2], [3, 4, 5]]


class Dangerous:

    def __reduce__(self):
        return print, ('this ran', )


@pytest.mark.parametrize('content, message', [
    (dict(state_dict=dict(weight=torch.ones(1)), extra=Dangerous()), 'in.pth was refused'),
    (dict(model=dict(weight=torch.ones(1))), 'in.pth must hold the weights of a model under'),
    ([1], 'in.pth must hold the weights of a model under'),
    (None, 'in.pth can not be found'),
])
def test_what_cannot_be_published(tmp_path, monkeypatch, capfd, content, message):
    if content is not None:
        torch.save(content, tmp_path / 'in.pth')
    with pytest.raises(SystemExit) as exit:
        main(monkeypatch, PUBLISH, tmp_path / 'in.pth', tmp_path / 'out/out.pth')
    printed, errors = capfd.readouterr()
    assert exit.value.code == 1
    assert message in errors and len(errors.splitlines()) == 1
    assert 'this ran' not in printed
    assert not (tmp_path / 'out').exists()


def test_benchmark(trained, options, tmp_path):
    log = execute(BENCHMARK, CONFIG, trained, '--repeat-times', 2, '--work-dir', tmp_path / 'out',
                  '--device', 'cpu', *options, cwd=tmp_path)
    assert 'Average of 2 runs: ' in log
    file, = (tmp_path / 'out').glob('fps_*.json')
    result = json.loads(file.read_text())
    runs = result['overall_fps_1'], result['overall_fps_2']
    assert min(runs) > 0
    assert result['average_fps'] == pytest.approx(sum(runs) / 2, abs=0.02)


def test_benchmark_needs_no_checkpoint_but_one_that_is_named(options, monkeypatch, capsys):
    main(monkeypatch, BENCHMARK, CONFIG, '--device', 'cpu', *options)
    assert ', 1 images' in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match='absent.pth can not be found'):
        main(monkeypatch, BENCHMARK, CONFIG, 'absent.pth', '--device', 'cpu', *options)


def test_benchmark_of_whole_steps(tmp_path):
    twins = [CONFIGS / f'deeplabv3_{name}-d8_1xb2-400_camvid-160x160.py'
             for name in ('knr18', 'r18')]
    log = execute(ROOT / 'tools/benchmarks/benchmark_train.py', *twins, '--shape', 32, 48,
                  '--rounds', 3, '--device', 'cpu', '--channels-last', '--profile', 2,
                  '--out', 'steps.csv', cwd=tmp_path)
    with open(tmp_path / 'steps.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['config'], row['step']) for row in rows] == [
        (twin.stem, step) for twin in twins for step in ('train', 'infer')]
    assert {row['layout'] for row in rows} == {'channels_last'}
    assert [row['ratio'] for row in rows[2:]] == ['1.000', '1.000']
    assert all(0 < float(row['p20_ms']) <= float(row['median_ms']) <= float(row['p80_ms'])
               for row in rows)
    *operators, others, total = (
        [float(cell) for cell in line.split()[-2:]]
        for line in log.split('training step, ms in each operator')[1].splitlines()[1:])
    assert len(operators) == 2
    assert [sum(column) for column in zip(*operators, others, strict=True)] == pytest.approx(
        total, abs=0.3)


def test_benchmark_of_the_layer(tmp_path):
    execute(ROOT / 'tools/benchmarks/benchmark_knconv.py', '--batch-sizes', 1, '--rounds', 3,
            '--shapes', 'r50 stage1 conv2', '--skip', 'reference', 'unfused', '--device', 'cpu',
            '--out', 'layer.csv', cwd=tmp_path)
    with open(tmp_path / 'layer.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert {'conv', 'conv+bn', 'conv+gn', 'knconv', 'knconv p=0'} <= {row['row'] for row in rows}
    saved = {row['row']: float(row['saved_mib']) for row in rows if row['saved_mib']}
    assert saved['knconv+relu'] <= 0.7 * saved['conv+bn+relu']


def test_benchmark_of_the_authors_code(tmp_path):
    """Of a stand-in that has their names, and computes less."""
    layers = tmp_path / 'norm-torch/layers'
    layers.mkdir(parents=True)
    (layers / 'knconv.py').write_text(
        'from torch.nn import Conv2d as KNConv2d\n'
        'def KNConv2d1x1(a, b):\n    return KNConv2d(a, b, 1)\n')
    tool = ROOT / 'tools/benchmarks/benchmark_norm_torch.py'
    log = execute(tool, 'norm-torch', '--cases', 'r50 stage1 conv2', 'aspp 1x1',
                  '--rounds', 3, '--device', 'cpu', '--out', 'out.csv', cwd=tmp_path)
    assert log.count('geometric mean of 2 layers') == 2
    with open(tmp_path / 'out.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row['row'] for row in rows} == {'norm-torch', 'mmseg_kn'}
    assert 'must hold layers/knconv.py; . does not' in execute(
        tool, '.', cwd=tmp_path, check=False)


def test_browse_dataset(scenes, options, tmp_path):
    log = execute(BROWSE, CONFIG, '--output-dir', 'out', '--num', 2, *options,
                  'train_dataloader.dataset.pipeline.2.prob=0.', cwd=tmp_path)
    assert 'out: 2 of 3 images' in log
    pictures = sorted((tmp_path / 'out').iterdir())
    assert [path.name[:6] for path in pictures] == ['00000_', '00002_']
    sources = {p.stem: p for p in (scenes / 'leftImg8bit/train').rglob('*.png')}
    for path in pictures:
        source = sources[path.stem.split('_', 1)[1]]
        label = str(source).replace('leftImg8bit', 'gtFine', 1).replace(
            '_leftImg8bit', '_gtFine_labelTrainIds')
        picture, image, label = (cv2.imread(str(p)) for p in (path, source, label))
        road = label[..., 0] == 0
        colour = np.array([128, 64, 128])  # Cityscapes' road, the same in BGR and RGB
        expected = (image[road] * 0.5 + colour * 0.5)
        # All of the road but where names are written.
        close = (abs(picture[road] - expected) <= 1).all(-1)
        assert close.mean() > 0.7
        sky = label[..., 0] == 10
        if sky.any():  # blue, in the file's order BGR
            expected = image[sky] * 0.5 + np.array([180, 130, 70]) * 0.5
            assert (abs(picture[sky] - expected) <= 1).all(-1).mean() > 0.7
