"""The pages for images of any channels and for one class: each command, on few small images."""
import re
import runpy
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.utils import import_modules_from_strings
from mmseg.models.losses import accuracy
from mmseg.registry import DATASETS, MODELS
from program import ROOT, load_tool
from small_nets import segmentor

# The first stage and one branch of the head alone, and a short training.
SMALL = ['model.backbone.out_indices=(0,)', 'model.decode_head.in_channels=64',
         'model.decode_head.in_index=0', 'model.decode_head.channels=16',
         'model.decode_head.dilations=(1,)',
         'model.auxiliary_head.in_channels=64', 'model.auxiliary_head.channels=8',
         'model.data_preprocessor.size=(64,64)']
STEPS = 24
SHORT = [*SMALL, f'train_cfg.max_iters={STEPS}', f'train_cfg.val_interval={STEPS}',
         'optim_wrapper.optimizer.lr=0.03', f'param_scheduler.0.end={STEPS}', 'randomness.seed=0',
         f'default_hooks.checkpoint.interval={STEPS}', 'default_hooks.logger.interval=4',
         'train_dataloader.dataset.pipeline.2.crop_size=(64,64)',
         *(f'{split}_dataloader.{setting}' for split in ('train', 'val', 'test')
           for setting in ('num_workers=0', 'persistent_workers=False'))]


def blocks(page):
    return re.findall(r'^```python\n(.*?)^```\n', (ROOT / page).read_text(), re.M | re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ('tools', 'configs'):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield tmp_path


def prepare(page, folder):
    """Writes the page's modules and runs its other blocks, which make data."""
    for body in blocks(page):
        if name := re.match(r'# (\w+\.py)\n', body):
            (folder / name[1]).write_text(body)
        else:
            exec(compile(body.replace('repeat(64', 'repeat(24'), page, 'exec'), {})


def run(command, monkeypatch, capfd):
    """Runs a command of a page in this process; returns what it printed."""
    program, tool, *args = command.replace('iter_2000', f'iter_{STEPS}').split()
    assert program == 'python'
    if any(arg.endswith('.py') for arg in args):
        args += ['--cfg-options', *SHORT]
    if 'compare_predictions' in tool or 'benchmark' in tool:
        args += ['--device', 'cpu']
    if 'export.py' in tool:
        args = [*args[:args.index('--cfg-options')], '--shape', '64', '64', '--cfg-options',
                *SMALL]
    monkeypatch.setattr(sys, 'argv', [tool, *args])
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(ROOT / tool.rpartition('/')[0]))
        runpy.run_path(str(ROOT / tool), run_name='__main__')
    return ''.join(capfd.readouterr())


def commands(page):
    text = re.sub(r'^```.*?^```\n', '', (ROOT / page).read_text(), flags=re.M | re.S)
    lines = text.replace('\\\n', ' ').split('\n')
    return [line.strip() for line in lines if line.startswith('    python ')]


def miou(log):
    return float(re.findall(r'mIoU: ([\d.]+)', log)[-1])


def test_multispectral(folder, monkeypatch, capfd):
    """Twelve bands of 16 bits, from TIFF to the labels of the ONNX file."""
    for module in ('tifffile', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(module)
    prepare('docs/multispectral.md', folder)
    logs = {command: run(command, monkeypatch, capfd)
            for command in commands('docs/multispectral.md')}
    assert [re.search(r'(\w+)\.py', command)[1] for command in logs] == [
        'browse_dataset', 'train', 'test', 'compare_predictions', 'export', 'infer_onnx']
    browse, train, test, compare, export, infer = logs.values()
    assert 'browse: 8 of 8' in browse and 'differs from the float32 model by at most' in export
    assert miou(test) > 60 and 'forest' in test
    labels = cv2.imread('work_dirs/bands/out/0.png', cv2.IMREAD_UNCHANGED)
    truth = cv2.imread('data/fields/labels/val/0.png', cv2.IMREAD_UNCHANGED)
    assert labels.shape == truth.shape and (labels == truth).mean() > 0.7


def test_binary(folder, monkeypatch, capfd):
    """With and without augmentation, and in the exported file."""
    for module in ('onnxscript', 'onnxruntime'):
        pytest.importorskip(module)
    prepare('docs/binary.md', folder)
    train, test, tta, compare, export, infer = (
        run(command, monkeypatch, capfd) for command in commands('docs/binary.md'))
    assert miou(test) > 60 and miou(tta) > miou(test) - 10 and 'roof' in tta
    labels = cv2.imread('work_dirs/binary/out/0.png', cv2.IMREAD_UNCHANGED)
    truth = cv2.imread('data/roofs/labels/val/0.png', cv2.IMREAD_UNCHANGED)
    assert 0 < truth.mean() < 0.6 and (labels == truth).mean() > 0.8


def test_what_the_page_says_of_mmseg():
    """A cascade of one output is not predicted, and acc_seg is the share of the background."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        cfg = Config(dict(model=segmentor('cascade', classes=2)))
        with pytest.raises(AttributeError) as caught, torch.no_grad():
            MODELS.build(cfg.model).eval().predict(torch.zeros(1, 3, 32, 64))
    assert f'`{caught.value}`' in (ROOT / 'docs/binary.md').read_text()
    label = torch.tensor([[[0, 0, 0, 1]]])
    assert accuracy(torch.tensor([[[[-9., -9., -9., 9.]]]]), label).item() == 75


@pytest.mark.parametrize('first', [False, True], ids=['last', 'first'])
@pytest.mark.parametrize(('suffix', 'bands'), [('.npy', 4), ('.tif', 4), ('.npy', 12)])
def test_other_files(folder, monkeypatch, capfd, suffix, bands, first):
    """The page's own loader and infer_onnx.py read the same, bands first or last."""
    pytest.importorskip('onnxruntime')
    tifffile = pytest.importorskip('tifffile')
    (folder / 'data/fields/images/val').mkdir(parents=True)
    image = np.random.default_rng(0).integers(10000, size=(4, 6, bands)).astype(np.uint16)
    image = image.repeat(8, 0).repeat(8, 1)
    path = folder / f'data/fields/images/val/0{suffix}'
    stored = image.transpose(2, 0, 1) if first else image
    if suffix == '.npy':
        np.save(path, stored)
    else:
        tifffile.imwrite(path, stored, photometric='minisblack',
                         planarconfig='separate' if first else 'contig')
    for body in blocks('docs/multispectral.md'):
        if name := re.match(r'# (\w+\.py)\n', body):
            text = body.replace('bands, crop_size = 12', f'bands, crop_size = {bands}').replace(
                "img_suffix='.tif'", f"img_suffix='{suffix}'")
            text = re.sub(r"^load = .*", "load = dict(type='LoadBands', bands=bands)\n"
                          "custom_imports = dict(imports=['mmseg_kn', 'load_bands'])", text,
                          flags=re.M)
            (folder / name[1]).write_text(text)
    cfg = Config.fromfile('bands.py')
    import_modules_from_strings(**cfg.custom_imports)
    dataset = dict(cfg.test_dataloader.dataset, pipeline=[cfg.load, dict(type='PackSegInputs')])
    loaded = DATASETS.build(dataset)[0]['inputs']
    assert np.array_equal(loaded.numpy(), image.transpose(2, 0, 1).astype(np.float32))
    infer = load_tool(ROOT / 'tools/deployment/infer_onnx.py')
    network = infer.Takes(channels=bands, dtype=np.float32)
    assert np.array_equal(infer.pixels(infer.read(path, network), network)[0], loaded)
