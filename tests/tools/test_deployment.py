"""tools/deployment: files that predict what mmseg predicts, and run without mmseg or torch."""
import importlib
import re
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS
from PIL import Image
from program import ROOT, execute
from short_training import CONFIG
from toy_cityscapes import generate

SIZES = ((64, 96), (65, 97), (50, 131), (128, 64), (33, 40))


@pytest.fixture(scope='module')
def tool():
    sys.path.insert(0, str(ROOT / 'tools/deployment'))
    yield importlib.import_module('export')
    sys.path.remove(str(ROOT / 'tools/deployment'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with scenes and the checkpoint of a network that tells all classes apart."""
    folder = tmp_path_factory.mktemp('deployment')
    generate(folder / 'scenes', train=1, val=2, size=(64, 96))
    torch.manual_seed(0)
    model = init_model(str(CONFIG), device='cpu')
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(
        dataset_meta=DATASETS.get('CityscapesDataset').METAINFO)), folder / 'checkpoint.pth')
    return folder


@pytest.fixture(scope='module')
def model(folder):
    return init_model(str(CONFIG), str(folder / 'checkpoint.pth'), device='cpu')


def export(tool, folder, out, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['export.py', str(CONFIG), str(folder / 'checkpoint.pth'),
                                    str(out), '--shape', '64', '96', *args])
        tool.main()


def infer(folder, *args, check=True):
    """infer_onnx.py in a process that may not import what it does without."""
    code = ('import runpy, sys\n'
            'for name in ("torch", "mmcv", "mmengine", "mmseg", "mmseg_kn", "cv2"):\n'
            '    sys.modules[name] = None\n'
            'tool, *sys.argv[1:] = sys.argv[1:]\n'
            'runpy.run_path(tool, run_name="__main__")\n')
    return execute('-c', code, ROOT / 'tools/deployment/infer_onnx.py', *args, '--threads', 1,
                   cwd=folder, check=check)


def labels_and_logits(path):
    """Runs an ONNX file of labels so that it also gives the logits that it takes them from."""
    onnx, onnxruntime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    file = onnx.load(path)
    argmax, = (node for node in file.graph.node if node.op_type == 'ArgMax')
    file.graph.output.append(onnx.ValueInfoProto(name=argmax.input[0]))
    session = onnxruntime.InferenceSession(file.SerializeToString(),
                                           providers=['CPUExecutionProvider'])
    return lambda image: [torch.from_numpy(output[0]) for output in
                          session.run(None, dict(image=image.numpy()))]


def scene(shape, seed):
    """An image (1, 3, H, W) of RGB pixels."""
    return torch.randint(0, 256, (1, 3, *shape), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def predicted(model, image):
    """What mmseg's own inference makes of an image."""
    bgr = image[0].permute(1, 2, 0).flip(2).contiguous().numpy()
    return inference_model(model, bgr)


@pytest.mark.parametrize('fmt', ['torchscript', 'torch_export', 'onnx'])
def test_file_predicts_what_mmseg_predicts_at_every_size(tool, folder, model, fmt, capsys):
    if fmt == 'onnx':
        pytest.importorskip('onnxscript')
        pytest.importorskip('onnxruntime')
    path = folder / f'model.{"pt2" if fmt == "torch_export" else fmt}'
    output = 'labels' if fmt == 'onnx' else 'logits'
    export(tool, folder, path, '--format', fmt, '--output', output)
    assert 'differs from the float32 model by at most' in capsys.readouterr().out
    run = labels_and_logits(path) if fmt == 'onnx' else tool.load(fmt, path)
    classes = set()
    for i, size in enumerate(SIZES):
        image = scene(size, i)
        logits = predicted(model, image).seg_logits.data
        with torch.no_grad():
            *labels, found = run(image)
        tolerance = 1e-4 * logits.abs().max().item()
        torch.testing.assert_close(found, logits, atol=tolerance, rtol=0)
        for found in labels:
            classes.update(found.unique().tolist())
            short = logits.amax(0) - logits.gather(0, found[None])[0]
            assert found.shape == size and short.max() <= tolerance
    assert output == 'logits' or len(classes) > 3


def test_the_same_miou_without_mmseg_and_torch(folder, model):
    """infer_onnx.py in a process that may not import them, over a validation set."""
    if not (folder / 'model.onnx').exists():
        pytest.skip('no ONNX file was exported')
    images = sorted((folder / 'scenes/leftImg8bit/val').rglob('*.png'))
    infer(folder, folder / 'model.onnx', *images, '--out-dir', folder / 'out')
    areas = []
    for image in images:
        mine = cv2.imread(str(folder / 'out' / image.name), cv2.IMREAD_UNCHANGED)
        theirs = inference_model(model, cv2.imread(str(image))).pred_sem_seg.data[0]
        label = str(image).replace('leftImg8bit', 'gtFine').replace(
            'gtFine.png', 'gtFine_labelTrainIds.png')
        truth = torch.from_numpy(cv2.imread(label, cv2.IMREAD_UNCHANGED)).long()
        areas.append([IoUMetric.intersect_and_union(labels.long(), truth, 19, 255)[:2]
                      for labels in (torch.from_numpy(mine), theirs)])
    # (images, two predictors, intersect and union, classes) -> IoU of the classes that occur
    summed = torch.tensor(np.array(areas)).sum(0)
    mine, theirs = (summed[:, 0] / summed[:, 1]).nanmean(1).tolist()
    assert theirs > 0 and abs(mine - theirs) < 5e-4


def test_int8_predicts_nearly_the_same(folder):
    if not (folder / 'model.onnx').exists():
        pytest.skip('no ONNX file was exported')
    onnx, onnxruntime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    images = sorted((folder / 'scenes/leftImg8bit').rglob('*.png'))
    log = execute(ROOT / 'tools/deployment/quantize_onnx.py', folder / 'model.onnx',
                  folder / 'int8.onnx', *images, cwd=folder)
    assert 'int8.onnx: ' in log
    graph = onnx.load(folder / 'int8.onnx').graph
    convolutions = [node for node in graph.node if node.op_type == 'Conv']
    assert convolutions and all('DequantizeLinear' in name for node in convolutions
                                for name in node.input[:2])
    both = [onnxruntime.InferenceSession(folder / name, providers=['CPUExecutionProvider'])
            for name in ('model.onnx', 'int8.onnx')]
    agree = []
    for image in images:
        pixels = cv2.imread(str(image))[None, ..., ::-1].transpose(0, 3, 1, 2)
        one, other = (session.run(None, dict(image=np.ascontiguousarray(pixels)))[0]
                      for session in both)
        agree.append((one == other).mean())
    assert np.mean(agree) > 0.8, agree  # of random weights, whose logits are close


def test_a_file_that_differs_is_removed(tool, folder, monkeypatch):
    """A tracer that keeps the size of its example, as tracers do."""
    def fixed(deployed, image, fmt, path, fixed):
        path.touch()
    monkeypatch.setattr(tool, 'export', fixed)
    monkeypatch.setattr(tool, 'load', lambda fmt, path: lambda image: torch.zeros(
        len(image), 64, 96, dtype=torch.long))
    with pytest.raises(SystemExit, match='differs from the float32 model by .* was removed'):
        export(tool, folder, folder / 'wrong.pt', '--format', 'torchscript')
    assert not (folder / 'wrong.pt').exists()


def test_nan_is_a_difference(tool, folder, monkeypatch):
    """As of a float16 network that overflows; max(0., nan) is 0."""
    monkeypatch.setattr(tool, 'export', lambda deployed, image, fmt, path, fixed: path.touch())
    monkeypatch.setattr(tool, 'load', lambda fmt, path: lambda image: torch.full(
        (len(image), 19, *image.shape[2:]), float('nan')))
    with pytest.raises(SystemExit, match='differs from the float32 model by nan .* was removed'):
        export(tool, folder, folder / 'nan.pt', '--format', 'torchscript', '--output', 'logits')
    assert not (folder / 'nan.pt').exists()


def test_float16_is_compared_with_float32(tool, folder, monkeypatch, capsys):
    """Here the file is the float16 network itself, from which it does not differ at all."""
    files = {}

    def keep(deployed, image, fmt, path, fixed):
        path.touch()
        files[path] = deployed

    monkeypatch.setattr(tool, 'export', keep)
    monkeypatch.setattr(tool, 'load', lambda fmt, path: files[path])
    export(tool, folder, folder / 'half.pt', '--format', 'torchscript', '--output', 'logits',
           '--dtype', 'float16')
    found, = re.findall(r'float32 model by at most (\S+) of', capsys.readouterr().out)
    assert 1e-5 < float(found) < 3e-2


@pytest.mark.parametrize(('change', 'message'), [
    ({'model.test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(32, 32))},
     "must be 'whole', got 'slide'"),
    ({'model.data_preprocessor.test_cfg': dict(size_divisor=32)}, 'must be None, got')])
def test_what_cannot_be_exported_is_refused(tool, change, message):
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(change)
    with pytest.raises(ValueError, match=message):
        tool.Deployed(init_model(cfg, device='cpu'), 'labels')


@pytest.fixture(scope='module')
def session():
    """Any network: the label of a pixel is how bright its red is, in 19 steps."""
    class Session:
        def get_inputs(self):
            return [SimpleNamespace(name='image', shape=['N', 3, 'H', 'W'],
                                    type='tensor(uint8)')]

        def run(self, names, feeds):
            return [feeds['image'][:, 0].astype(np.int64) * 19 // 256]

    return Session()


@pytest.fixture(scope='module')
def infer_onnx(tool):
    pytest.importorskip('onnxruntime')
    return importlib.import_module('infer_onnx')


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_honoured_as_opencv_does(infer_onnx, session, tmp_path, orientation):
    image = Image.fromarray(np.kron(np.arange(0, 240, 40, np.uint8).reshape(2, 3), np.ones(
        (8, 8), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.convert('RGB').save(tmp_path / 'turned.jpg', exif=exif)
    expected = cv2.imread(str(tmp_path / 'turned.jpg'))[..., ::-1]
    assert expected.shape[:2] == ((16, 24) if orientation < 5 else (24, 16))
    image = infer_onnx.read(tmp_path / 'turned.jpg', infer_onnx.takes(session))
    pixels = infer_onnx.pixels(image)[0].transpose(1, 2, 0)
    assert pixels.shape == expected.shape and np.allclose(pixels, expected, atol=4)
    labels = infer_onnx.segment(session, image, (48, 48))
    assert labels.shape == expected.shape[:2]
    truth = expected[..., 0].astype(int) * 19 // 256  # off by the JPEG, and at the squares' edges
    assert (abs(labels - truth) <= 1).mean() > 0.8


def test_logits_become_labels(infer_onnx, session, monkeypatch):
    logits = np.random.default_rng(0).random((1, 5, 6, 9), np.float32)
    monkeypatch.setattr(session, 'run', lambda names, feeds: [logits])
    found = infer_onnx.segment(session, np.zeros((6, 9, 3), np.uint8))
    assert found.dtype == np.uint8 and np.array_equal(found, logits[0].argmax(0))


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bit_grey_images_are_refused(infer_onnx, tmp_path, suffix):
    path = tmp_path / f'deep.{suffix}'
    cv2.imwrite(str(path), np.full((6, 9), 30000, np.uint16))
    with pytest.raises(ValueError, match=rf'8 bits .* got mode I;16 in {path}; convert it'):
        infer_onnx.read(path, infer_onnx.Takes())


@pytest.mark.parametrize(('images', 'message'), [
    (['a/street.png', 'b/road.png'], 'a/street.png is one of the images'),
    (['b/street.jpg', 'c/street.png'], 'a/street.png would be written twice')])
def test_nothing_is_written_over(infer_onnx, tmp_path, monkeypatch, capsys, images, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['infer_onnx.py', 'model.onnx', *images, '--out-dir', 'a'])
    with pytest.raises(SystemExit) as stop:
        infer_onnx.main()  # before the model, which does not exist, is read
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
