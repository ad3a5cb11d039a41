"""tools/deployment: files that predict what mmseg predicts, and run without mmseg or torch."""
import importlib
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS
from program import ROOT, execute
from test_tools import CONFIG

from mmseg_kn.toy_cityscapes import generate

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
    assert 'differs from the model by at most' in capsys.readouterr().out
    run = tool.load(fmt, path)
    classes = set()
    for i, size in enumerate(SIZES):
        image = scene(size, i)
        sample = predicted(model, image)
        logits = sample.seg_logits.data
        with torch.no_grad():
            found = run(image)[0]
        if output == 'logits':
            torch.testing.assert_close(found, logits, atol=1e-4 * logits.abs().max().item(),
                                       rtol=0)
        else:
            classes.update(found.unique().tolist())
            short = logits.amax(0) - logits.gather(0, found[None])[0]
            assert found.shape == size and short.max() <= 1e-4 * logits.abs().max()
    assert output == 'logits' or len(classes) > 3


def test_the_same_miou_without_mmseg_and_torch(folder, model):
    """infer_onnx.py in a process that may not import them, over a validation set."""
    if not (folder / 'model.onnx').exists():
        pytest.skip('no ONNX file was exported')
    pytest.importorskip('PIL')
    code = ('import runpy, sys\n'
            'for name in ("torch", "mmcv", "mmengine", "mmseg", "mmseg_kn", "cv2"):\n'
            '    sys.modules[name] = None\n'
            'tool, *sys.argv[1:] = sys.argv[1:]\n'
            'runpy.run_path(tool, run_name="__main__")\n')
    images = sorted((folder / 'scenes/leftImg8bit/val').rglob('*.png'))
    tool = ROOT / 'tools/deployment/infer_onnx.py'
    done = subprocess.run(
        [sys.executable, '-c', code, tool, folder / 'model.onnx', *images, '--out-dir',
         folder / 'out', '--threads', '1'], capture_output=True, text=True, cwd=folder,
        env={**os.environ, 'PYTHONPATH': ''})
    assert done.returncode == 0, done.stderr
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
    def fixed(deployed, image, fmt, path):
        path.touch()
    monkeypatch.setattr(tool, 'export', fixed)
    monkeypatch.setattr(tool, 'load', lambda fmt, path: lambda image: torch.zeros(
        len(image), 64, 96, dtype=torch.long))
    with pytest.raises(SystemExit, match='differs from the model by .* was removed'):
        export(tool, folder, folder / 'wrong.pt', '--format', 'torchscript')
    assert not (folder / 'wrong.pt').exists()


@pytest.mark.parametrize(('change', 'message'), [
    ({'model.test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(32, 32))},
     "must be 'whole', got 'slide'"),
    ({'model.data_preprocessor.test_cfg': dict(size_divisor=32)}, 'must be None, got')])
def test_what_cannot_be_exported_is_refused(tool, change, message):
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(change)
    with pytest.raises(ValueError, match=message):
        tool.Deployed(init_model(cfg, device='cpu'), 'labels')
