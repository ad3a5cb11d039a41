"""Each tool over 1, 3, 4 and 12 channels, one head and several, classes and a threshold."""
import csv
import importlib
import logging
import sys

import cv2
import matplotlib.axes
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from program import ROOT, load_tool
from small_nets import SIZE, point_sample, segmentor, write_config, write_images
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TOOLS = ROOT / 'tools'
ANALYSIS, DEPLOYMENT = TOOLS / 'analysis_tools', TOOLS / 'deployment'
SLIDE = dict(mode='slide', crop_size=(32, 32), stride=(16, 16))


@pytest.fixture(scope='module', autouse=True)
def scope():
    init_default_scope('mmseg')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A folder with images of each number of channels."""
    folders = {channels: tmp_path_factory.mktemp(f'channels{channels}')
               for channels in (1, 3, 4, 12)}
    for channels, folder in folders.items():
        write_images(folder, channels)
    return folders


@pytest.fixture
def call(monkeypatch):
    """Runs a tool in this process."""
    def run(path, *args):
        monkeypatch.setattr(sys, 'argv', [str(path), *map(str, args)])
        tool = load_tool(path)
        tool.main()
        return tool
    yield run
    logging.disable(logging.NOTSET)  # which benchmark_train.py raises


def shared(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        return importlib.import_module(name)


def model_and_data(config, checkpoint):
    cfg = Config.fromfile(config)
    model = shared('segmentors').build_segmentor(cfg, str(checkpoint))
    return model, DATASETS.build(cfg.test_dataloader.dataset)


def mmsegs_prediction(config, checkpoint, index=0):
    """(H, W) integers, and for one output the probabilities."""
    model, dataset = model_and_data(config, checkpoint)
    with torch.no_grad():
        result = model.test_step(pseudo_collate([dataset[index]]))[0]
    return result.pred_sem_seg.data[0].long().numpy(), result.seg_logits.data.numpy()


# Pictures


def drawn(image):
    """What the picture of a file should show, (H, W, 3) in RGB."""
    if image.ndim == 2:
        return np.stack([image] * 3, -1)
    if image.dtype == np.uint8:
        return image[..., 2::-1]  # BGR, BGRA
    image = image[..., :3].astype(float)
    low, high = np.quantile(image, (.02, .98))
    return ((image - low) / (high - low)).clip(0, 1) * 255


@pytest.mark.parametrize('channels', [1, 3, 4, 12])
def test_browse_dataset(call, folders, tmp_path, channels):
    folder = folders[channels]
    config, _ = write_config(folder, 'fcn', channels)
    call(TOOLS / 'misc/browse_dataset.py', config, '--output-dir', tmp_path)
    picture = cv2.imread(str(tmp_path / '00000_0.png'))[..., ::-1]
    file = next((folder / 'images').glob('0.*'))
    expected = drawn(np.load(file) if channels == 12
                     else cv2.imread(str(file), cv2.IMREAD_UNCHANGED))
    colours = np.zeros((*SIZE, 3))
    colours[:24, :32, 0] = colours[:24, 32:, 1] = 250
    close = (abs(picture - (expected + colours) / 2) <= 1.5).all(-1)
    assert close[24:].all() and close.mean() > 0.7  # but where names are written

    config, _ = write_config(folder, 'fcn', channels, labels=False)
    call(TOOLS / 'misc/browse_dataset.py', config, '--output-dir', tmp_path / 'plain', '--num', 1)
    picture = cv2.imread(str(tmp_path / 'plain/00000_0.png'))[..., ::-1]
    assert (abs(picture - expected) <= 1).all()


def test_bands():
    pictures = shared('pictures')
    image = torch.arange(5, dtype=torch.uint8)[:, None, None].expand(5, 2, 2)
    assert pictures.picture(image, True)[0, 0].tolist() == [0, 1, 2]
    assert pictures.picture(image, True, (4, 3, 0))[0, 0].tolist() == [4, 3, 0]
    assert pictures.picture(image[:4], False)[0, 0].tolist() == [0, 1, 2]
    with pytest.raises(SystemExit, match='from 0 to 4, got 4 3 5'):
        pictures.picture(image, True, (4, 3, 5))
    odd = torch.full((1, 2, 2), float('nan'))
    assert pictures.picture(odd, True).tolist() == np.zeros((2, 2, 3)).tolist()


@pytest.mark.parametrize(('preprocessor', 'loader', 'bgr'), [
    (dict(bgr_to_rgb=True), {}, True), ({}, {}, True), (dict(rgb_to_bgr=True), {}, False),
    ({}, dict(imdecode_backend='tifffile'), False)])
def test_the_order_of_colours(preprocessor, loader, bgr):
    """mmcv loads BGR, tifffile what is in the file; the exported file takes RGB."""
    net = segmentor('fcn')
    net['data_preprocessor'].update(dict(
        bgr_to_rgb=False, mean=[90., 120., 140.], std=[50., 60., 70.]) | preprocessor)
    dataset = dict(type='ConcatDataset', datasets=[dict(pipeline=[dict(type='Load', **loader)])])
    cfg = Config(dict(model=dict(type='KernelNormalized', model=net), dataset=dataset))
    assert shared('pictures').loads_bgr(cfg, cfg.dataset) == bgr
    model = MODELS.build(net).eval()
    rgb = torch.randint(256, (3, *SIZE), dtype=torch.uint8)
    with torch.no_grad():
        loaded = model.data_preprocessor(dict(inputs=[rgb.flip(0) if bgr else rgb]))['inputs']
        expected = shared('segmentors').logits(model, loaded)
        export = load_tool(DEPLOYMENT / 'export.py')
        found = export.Deployed(model, 'logits', bgr=bgr)(rgb[None])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(('kind', 'channels', 'classes', 'labels', 'slide'), [
    ('fcn', 1, 2, True, False), ('cascade', 4, 2, False, True), ('point', 12, 3, False, False),
    ('fpn', 3, 2, True, True), ('kernelized', 3, 3, True, False)])
def test_compare_predictions(call, folders, tmp_path, monkeypatch, kind, channels, classes, labels,
                             slide):
    net = segmentor(kind, channels, classes)
    if slide:
        net['test_cfg'].update(SLIDE)
    config, checkpoint = write_config(folders[channels], kind, channels, classes, labels, net)
    shown = []
    monkeypatch.setattr(matplotlib.axes.Axes, 'imshow', lambda axes, x: shown.append(x))
    call(ANALYSIS / 'compare_predictions.py', config, checkpoint, '--out', tmp_path / 'out.png',
         '--device', 'cpu')
    assert (tmp_path / 'out.png').stat().st_size
    assert len(shown) == (6 if labels else 4)
    palette = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]])
    for i in range(2):
        image, *truth, prediction = shown[i * len(shown) // 2:(i + 1) * len(shown) // 2]
        assert image.shape == prediction.shape == (*SIZE, 3) and image.std() > 10
        expected, _ = mmsegs_prediction(config, checkpoint, i)
        assert len(np.unique(expected)) > 1 and np.array_equal(prediction, palette[expected])
        if labels:
            assert truth[0][0, 0].tolist() == [250, 0, 0] and not truth[0][24:].any()


def test_classes_without_names_or_colours():
    names, palette = shared('pictures').legend(dict(classes=None, palette=None))
    assert names[7] == '7' and len(palette) == len(names)
    colours = shared('pictures').colourize(np.array([[2, 700]]), palette)
    assert colours[0].tolist() == [palette[2], [0, 0, 0]]


# Exports


@pytest.mark.parametrize(('fmt', 'kind', 'channels', 'classes'), [
    ('torchscript', 'cascade', 4, 2), ('torch_export', 'kernelized', 1, 3)])
def test_export(call, folders, tmp_path, fmt, kind, channels, classes):
    config, checkpoint = write_config(folders[channels], kind, channels, classes)
    tool = call(DEPLOYMENT / 'export.py', config, checkpoint, tmp_path / 'net.pt2', '--format',
                fmt, '--shape', 64, 64)
    run = tool.load(fmt, tmp_path / 'net.pt2')
    image = model_and_data(config, checkpoint)[1][0]['inputs']
    expected, _ = mmsegs_prediction(config, checkpoint)
    assert np.array_equal(run(image[None])[0].numpy(), expected)
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize(('kind', 'channels', 'classes', 'args'), [
    ('fcn', 1, 2, ['--output', 'logits']), ('fcn', 4, 3, []),
    ('fcn', 12, 2, ['--image-dtype', 'float32']),
    ('point', 3, 3, ['--fixed-size']), ('psp', 3, 3, ['--fixed-size'])])
def test_onnx(call, folders, tmp_path, kind, channels, classes, args):
    """From the file of an image to its labels, without and with mmseg."""
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    folder = folders[channels]
    config, checkpoint = write_config(folder, kind, channels, classes)
    if '--fixed-size' in args:
        args = [*args, '--shape', *SIZE]
    out = tmp_path / 'net.onnx'
    call(DEPLOYMENT / 'export.py', config, checkpoint, out, '--format', 'onnx', *args)
    files = sorted((folder / 'images').iterdir())
    call(DEPLOYMENT / 'infer_onnx.py', out, *files, '--out-dir', tmp_path / 'labels')
    for i, file in enumerate(files):
        labels = cv2.imread(str(tmp_path / 'labels' / f'{file.stem}.png'), cv2.IMREAD_UNCHANGED)
        expected, _ = mmsegs_prediction(config, checkpoint, i)
        assert (labels == expected).mean() > 0.999 and len(np.unique(expected)) > 1
    if channels == 12:
        check_quantized(call, out, files, tmp_path)
    if kind == 'psp':
        with pytest.raises(ValueError, match=r'images of \(32, 64\) only, got --size \(16, 16\)'):
            call(DEPLOYMENT / 'infer_onnx.py', out, *files, '--size', 16, 16, '--out-dir',
                 tmp_path / 'other')


def check_quantized(call, net, files, folder):
    """Images of any channels calibrate; what fails leaves the file that was there."""
    quantized = folder / 'int8.onnx'
    quantized.write_text('before')
    wrong = folder / 'wrong.npy'
    np.save(wrong, np.zeros((32, 64, 5), np.float32))
    with pytest.raises(ValueError, match=r'12 channels are needed, got \(32, 64, 5\) in .*wrong'):
        call(DEPLOYMENT / 'quantize_onnx.py', net, quantized, files[0], wrong)
    assert quantized.read_text() == 'before'
    call(DEPLOYMENT / 'quantize_onnx.py', net, quantized, *files)
    assert quantized.stat().st_size > 100
    assert {path.name for path in folder.iterdir()} == {
        'net.onnx', 'int8.onnx', 'wrong.npy', 'labels'}


def test_pooling_to_bins_is_refused_for_any_size(call, folders, tmp_path):
    pytest.importorskip('onnxscript')
    config, checkpoint = write_config(folders[3], 'psp')
    out = tmp_path / 'psp.onnx'
    with pytest.raises(SystemExit, match='fixed number of bins, .* --fixed-size exports it for '
                                         'images of --shape 32 64 alone'):
        call(DEPLOYMENT / 'export.py', config, checkpoint, out, '--format', 'onnx', '--shape',
             *SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('step', ['export', 'load', 'difference'])
def test_nothing_is_left_when_a_step_fails(folders, tmp_path, monkeypatch, step):
    """And a file that was there before stays."""
    config, checkpoint = write_config(folders[3], 'fcn')
    tool, out = load_tool(DEPLOYMENT / 'export.py'), tmp_path / 'net.pt'
    out.write_text('before')

    def fail(*args):
        (args[3] if step == 'export' else out.parent / 'never').exists()
        raise RuntimeError('as an exporter says it\nin many lines')

    monkeypatch.setattr(tool, step, fail)
    monkeypatch.setattr(sys, 'argv', ['export.py', str(config), str(checkpoint), str(out),
                                      '--format', 'torchscript', '--shape', '64', '64'])
    with pytest.raises(SystemExit, match=r'\(RuntimeError: as an exporter says it\): no file was '
                                         'written; --fixed-size exports it'):
        tool.main()
    assert [path.name for path in tmp_path.iterdir()] == ['net.pt'] and out.read_text() == 'before'


@pytest.mark.parametrize('kind', ['fcn', 'kernelized'])
@pytest.mark.parametrize('setting', [dict(test_cfg=SLIDE),
                                     dict(data_preprocessor=dict(test_cfg=dict(size_divisor=32)))])
def test_what_is_refused_can_be_set_as_the_message_says(call, folders, tmp_path, kind, setting):
    net = segmentor(kind)
    inner = net['model'] if kind == 'kernelized' else net
    for key, value in setting.items():
        inner[key].update(value)
    config, checkpoint = write_config(folders[3], kind, model=net)
    args = [config, checkpoint, tmp_path / 'net.pt', '--format', 'torchscript', '--shape', 64, 64]
    with pytest.raises(ValueError) as refused:
        call(DEPLOYMENT / 'export.py', *args)
    assert not list(tmp_path.iterdir())
    option = str(refused.value).split('--cfg-options ')[1].split()[0]
    call(DEPLOYMENT / 'export.py', *args, '--cfg-options', option)
    assert (tmp_path / 'net.pt').exists()


@pytest.mark.parametrize(('network', 'image', 'message'), [
    ((1, np.uint8), (4, 6), 'got float32'), ((2, np.float32), (5, 4, 6), r'got \(5, 4, 6\)'),
    ((5, np.float32), (5, 4, 6), None), ((1, np.float32), (4, 6), None)])
def test_images_that_do_not_fit_are_refused(tmp_path, network, image, message):
    pytest.importorskip('onnxruntime')
    tool = load_tool(DEPLOYMENT / 'infer_onnx.py')
    network = tool.Takes('image', *network)
    np.save(tmp_path / 'image.npy', np.ones(image, np.float32))
    if message:
        with pytest.raises(ValueError, match=message):
            tool.read(tmp_path / 'image.npy', network)
    else:
        found = tool.pixels(tool.read(tmp_path / 'image.npy', network), network, (2, 3))
        assert found.shape == (1, network.channels, 2, 3) and found.dtype == np.float32


def test_files_of_the_wrong_channels_are_refused(tmp_path):
    pytest.importorskip('onnxruntime')
    tool = load_tool(DEPLOYMENT / 'infer_onnx.py')
    cv2.imwrite(str(tmp_path / 'rgb.png'), np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(ValueError, match='images of 4 channels are needed, got mode RGB in .*rgb'):
        tool.read(tmp_path / 'rgb.png', tool.Takes(channels=4))
    cv2.imwrite(str(tmp_path / 'deep.png'), np.full((4, 6), 30000, np.uint16))
    deep = tool.read(tmp_path / 'deep.png', tool.Takes(channels=1, dtype=np.float32))
    assert deep.shape == (4, 6, 1) and (deep == 30000).all()


# Measurements


@pytest.mark.parametrize(('kind', 'channels', 'classes'), [
    ('fcn', 1, 2), ('point', 12, 3), ('cascade', 4, 2), ('kernelized', 3, 3)])
def test_get_flops(call, folders, capsys, kind, channels, classes):
    config, checkpoint = write_config(folders[channels], kind, channels, classes)
    tool = call(ANALYSIS / 'get_flops.py', config, '--shape', *SIZE)
    printed = capsys.readouterr().out
    model, _ = model_and_data(config, checkpoint)
    meta = dict(img_shape=SIZE)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_decode(torch.zeros(1, channels, *SIZE), [meta])
    row = next(line for line in printed.splitlines() if line.startswith('inference')).split()
    assert float(row[2]) == pytest.approx(counter.get_total_flops() / 2e9, abs=6e-4)
    assert float(row[1]) == pytest.approx(tool.parameters(model) / 1e6, abs=6e-3)


def test_benchmark(call, folders, capsys):
    config, checkpoint = write_config(folders[12], 'cascade', 12, 2, labels=False)
    call(ANALYSIS / 'benchmark.py', config, checkpoint, '--device', 'cpu')
    assert ', 2 images' in capsys.readouterr().out


def test_benchmark_train(call, folders, tmp_path):
    nets = [('fcn', 1, 2), ('fpn', 4, 3), ('cascade', 3, 2), ('point', 12, 3),
            ('kernelized', 3, 3)]
    if point_sample is None:
        del nets[3]
    configs = [write_config(folders[channels], kind, channels, classes)[0]
               for kind, channels, classes in nets]
    call(TOOLS / 'benchmarks/benchmark_train.py', *configs, '--shape', *SIZE, '--rounds', 3,
         '--batch-size', 1, '--device', 'cpu', '--out', tmp_path / 'steps.csv')
    with open(tmp_path / 'steps.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['config'] for row in rows[::2]] == [config.stem for config in configs]
    # 3 x 3 convolutions to 8 channels, of the image and of three maps, in 10 ** 9
    expected = [9 * 8 * (c * 16 * 32 + 8 * (8 * 16 + 4 * 8 + 2 * 4)) / 1e9
                for _, c, _ in nets]
    assert [float(row['backbone_gmacs']) for row in rows[::2]] == pytest.approx(
        expected, abs=6e-3)
    assert all(float(row['peak_mib']) > 0 for row in rows[::2])


def test_complexity_in_compare_norms(folders):
    tool = load_tool(TOOLS / 'benchmarks/compare_norms.py')
    for kind, channels in (('kernelized', 4), ('cascade', 12)):
        config, checkpoint = write_config(folders[channels], kind, channels)
        parameters, macs = tool.complexity(Config.fromfile(config))
        model, _ = model_and_data(config, checkpoint)
        assert parameters == sum(p.numel() for p in model.parameters()) / 1e6 and macs > 0


def test_publish_model(folders, tmp_path):
    _, checkpoint = write_config(folders[12], 'cascade', 12)
    saved = torch.load(checkpoint)
    saved['meta']['dataset_meta'] = dict(classes=[np.str_('a'), 'b'], palette=[np.arange(3)] * 2,
                                         label_map={0: np.int64(1)})
    torch.save(saved, tmp_path / 'in.pth')
    tool = load_tool(TOOLS / 'misc/publish_model.py')
    published = torch.load(tool.publish(str(tmp_path / 'in.pth'), tmp_path / 'out.pth'),
                           weights_only=True)
    assert published['meta']['dataset_meta'] == dict(
        classes=['a', 'b'], palette=[[0, 1, 2]] * 2, label_map={0: 1})
    assert published['state_dict'].keys() == saved['state_dict'].keys()


def test_the_channels_of_images():
    """MobileNetV2 has an attribute in_channels, of its last stage."""
    from mmseg_kn.models.example import image_channels
    with torch.device('meta'):
        net = MODELS.build(dict(type='MobileNetV2'))
    assert image_channels(net) == 3 != net.in_channels
    assert image_channels(nn.Linear(2, 2)) == 3
