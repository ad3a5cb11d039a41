"""The documentation: its links, code blocks, commands and error messages."""
import argparse
import contextlib
import functools
import importlib
import inspect
import io
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import cv2
import mmcv
import mmengine
import mmseg
import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmcv.cnn import build_conv_layer
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import Compose, InfiniteSampler
from mmengine.optim import OptimWrapper, PolyLR
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop
from mmengine.runner.checkpoint import load_state_dict
from mmengine.structures import PixelData
from mmengine.utils import import_modules_from_strings
from mmengine.utils.dl_utils import mmcv_full_available
from mmseg.engine import SegVisualizationHook
from mmseg.evaluation import IoUMetric
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.models.decode_heads import ASPPHead, FCNHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.registry import DATASETS, METRICS
from mmseg.registry import MODELS as MMSEG_MODELS
from mmseg.structures import SegDataSample
from pages import PAGES
from program import ROOT
from settings import flat
from short_training import SHORT
from torch.nn.modules._functions import SyncBatchNorm

from mmseg_kn import KNConv2d, KNConvNeXt, KNResNet, KNResNetCls, stack
from mmseg_kn.datasets.pipeline_loaders import load, loaders_of
from mmseg_kn.engine.class_check_hook import ClassCheckHook
from mmseg_kn.engine.class_checks import class_fault, setting_faults
from mmseg_kn.engine.safe_checkpoint_hook import SafeCheckpointHook, _explained
from mmseg_kn.engine.schedule_check_hook import ScheduleCheckHook
from mmseg_kn.privacy.optim_wrapper import DPOptimWrapper

MIM = Path(mmseg.__file__).parent / '.mim'
FENCE = re.compile(r'^```(\w*)\n(.*?)^```\n', re.M | re.S)
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
WITH_PYTHON = [name for name in NAMES if '```python\n' in (ROOT / name).read_text()]
OFFICIAL = stack._import_stack() < (1, 3)


def anchors(page):
    """The fragments that GitHub gives to a page's headings."""
    titles = re.findall(r'^#+ (.*)$', FENCE.sub('', page.read_text()), re.M)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


def commands(page):
    """The lines of a page's shell blocks, fenced or indented, continued lines joined."""
    text = page.read_text()
    blocks = [body for language, body in FENCE.findall(text)
              if language in ('sh', 'bash', 'shell')]
    blocks += re.findall(r'(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+', FENCE.sub('\n', text))
    lines = '\n'.join(blocks).replace('\\\n', ' ').split('\n')
    return [line.strip().removeprefix('$ ') for line in lines if line.strip()]


# Links, paths and flags


@pytest.mark.parametrize('name', NAMES)
def test_links(name):
    page = ROOT / name
    text = FENCE.sub('', page.read_text())
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if '://' in target:
            continue
        path, _, fragment = target.partition('#')
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not fragment or fragment in anchors(file), target


def expand(path):
    """a{b,c}d -> abd, acd."""
    found = re.search(r'\{([^{}]*)\}', path)
    if not found:
        return [path]
    return [p for part in found[1].split(',')
            for p in expand(path[:found.start()] + part + path[found.end():])]


@pytest.mark.parametrize('name', NAMES)
def test_paths_of_the_repository(name):
    text = FENCE.sub(lambda m: '' if m[1] == 'python' else m[0], (ROOT / name).read_text())
    for variable, value in re.findall(r'^ *([A-Z0-9]+)=([\w./-]+)$', text, re.M):
        text = text.replace(f'${variable}', value)
    found = re.findall(
        r'(?<![\w/-])(?:\.\.?/)*((?:tools|configs|tests|mmseg_kn)/[\w./{},-]*)', text)
    for path in {p for match in found for p in expand(match.rstrip('.,'))}:
        # Some tools and configs that are spoken of are mmseg's.
        assert (ROOT / path).exists() or (MIM / path).exists(), path


@functools.cache
def flags_of(tool):
    """The flags in the tool's --help."""
    out = io.StringIO()
    with (mock.patch.object(sys, 'argv', [tool, '--help']), contextlib.redirect_stdout(out),
          mock.patch.object(sys, 'path', [str((ROOT / tool).parent), *sys.path]),
          pytest.raises(SystemExit)):
        runpy.run_path(str(ROOT / tool), run_name='__main__')
    return set(re.findall(r'--[a-z][\w-]*', out.getvalue()))


@pytest.mark.parametrize('name', NAMES)
def test_flags_and_targets(name):
    for line in commands(ROOT / name):
        call = re.search(r'(?<![\w/])tools/(\S+)\.(?:py|sh)(?= |$)(.*)', line.split(' #')[0])
        if call and (ROOT / call[0].split()[0]).exists():
            tool = f'tools/{call[1].removeprefix("dist_")}.py'
            given = {word.split('=')[0].rstrip('"') for word in call[2].split()
                     if word.startswith('--')}
            assert given <= flags_of(tool), line
        if line.startswith('make '):
            assert re.search(rf'^{line.split()[1]}:', (ROOT / 'Makefile').read_text(), re.M), line


@pytest.fixture(scope='module')
def settings():
    """What --cfg-options may name: each setting of any config, and arguments that none sets."""
    configs = [p for folder in ('deeplabv3', 'fcn', 'classification')
               for p in ROOT.glob(f'configs/{folder}/*.py')]
    found = {part for path in configs for setting in flat(dict(Config.fromfile(path)))
             for part in itertools.accumulate(setting.split('.'), '{}.{}'.format)}
    arguments = [('model.backbone', KNResNet), ('model.decode_head', FCNHead),
                 ('model.decode_head.conv_cfg', KNConv2d),
                 ('model.auxiliary_head.conv_cfg', KNConv2d),
                 ('optim_wrapper', OptimWrapper), ('optim_wrapper', DPOptimWrapper)]
    found |= {f'{setting}.{name}' for setting, kind in arguments
              for name in inspect.signature(kind).parameters}
    found |= {f'model.backbone.init_cfg.{name}' for name in ('type', 'checkpoint', 'prefix')}
    return found | {'default_hooks.channels_last.type', 'default_hooks.graphs.type',
                    'default_hooks.visualization.interval', 'env_cfg.dist_cfg.timeout'}


@pytest.mark.parametrize('name', NAMES)
def test_settings_of_commands_exist(name, settings):
    lines = [line for line in commands(ROOT / name) if '=' in line]
    given = set(re.findall(r'(?<![\w./-])([a-z_]+(?:\.\w+)+)=(?!=)', ' '.join(lines)))
    assert given <= settings, given - settings


def test_commands_and_flags_are_found():
    train, = (line for line in commands(ROOT / 'docs/pretraining.md') if '--epochs' in line)
    assert train.endswith('--epochs 5 --flip --zero-init-residual"')
    assert {'--launcher', '--resume', '--amp'} <= flags_of('tools/train.py')
    assert '--zero-init' not in flags_of('tools/benchmarks/train_classifier.py')


# "Getting started", as it is written, on few and small scenes


def make_mydata(toy, root):
    """Scenes whose labels are ground, object and sky."""
    ids = np.full(256, 1, np.uint8)
    ids[[0, 1, 9]], ids[10], ids[255] = 0, 2, 255
    for label in toy.rglob('*_labelTrainIds.png'):
        image = Path(str(label).replace('gtFine_labelTrainIds', 'leftImg8bit')
                     .replace('gtFine', 'leftImg8bit'))
        for source, picture in ((image, cv2.imread(str(image))),
                                (label, ids[cv2.imread(str(label), cv2.IMREAD_UNCHANGED)])):
            target = root / source.relative_to(toy)
            target.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(target), picture)


def write_modules(page, folder):
    """Writes the blocks that begin with a comment, the name of a file."""
    for language, body in FENCE.findall(page.read_text()):
        if language == 'python' and (file := re.match(r'# (\w+\.py)\n', body)):
            (folder / file[1]).write_text(body)


@pytest.fixture(scope='module')
def started(tmp_path_factory):
    """A folder in which the commands of the page have run; and what each printed."""
    folder, logs = tmp_path_factory.mktemp('started'), {}
    page = ROOT / 'docs/getting_started.md'
    for name in ('tools', 'configs'):
        (folder / name).symlink_to(ROOT / name)
    write_modules(page, folder)
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1',
               PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    for line in commands(page):
        if not re.match(r'(PYTHONPATH=\. )?python tools/', line):
            continue
        config = re.search(r'\S+\.py(?= |$)', re.split(r'tools/\S+ ', line, maxsplit=1)[1])
        steps = re.search(r'iter_(\d+)\.pth', line)
        if steps:  # the page names the checkpoint that the config ends with
            last = re.search(r'max_iters ?= ?(\d+)', (folder / config[0]).read_text())
            assert steps[1] == last[1]
        options = [*SHORT, 'train_cfg.max_iters=2', 'train_cfg.val_interval=2']
        if 'my_config' in line:
            options += ['train_dataloader.dataset.pipeline.2.scale=(128,64)',
                        'train_dataloader.dataset.pipeline.3.crop_size=(64,128)',
                        'val_dataloader.dataset.pipeline.1.scale=(128,64)',
                        'test_dataloader.dataset.pipeline.1.scale=(128,64)']
        tail = '--cfg-options ' + shlex.join(options) if config else \
            '--train 4 --val 4 --size 64 128'
        short = line.replace('PYTHONPATH=.', f'PYTHONPATH=.:{ROOT}')
        short = re.sub(r'iter_\d+', 'iter_2', short)
        done = subprocess.run(['bash', '-c', f'{short} {tail}'], cwd=folder, env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, f'{line}\n{done.stdout[-3000:]}'
        logs[line] = done.stdout
        if not config:
            make_mydata(folder / 'data/toy_cityscapes', folder / 'data/mydata')
    return folder, logs


def test_getting_started(started):
    folder, logs = started
    scenes, train, test, draw, train_mine, test_mine = logs.values()
    assert 'motorcycle' in scenes and 'Iter(train) [2/2]' in train and 'mIoU' in test
    assert 'motorcycle' in test and (folder / 'work_dirs/demo/scenes.png').is_file()
    assert 'Iter(train) [2/2]' in train_mine
    assert all(name in test_mine for name in ('ground', 'object', 'sky', 'mIoU'))
    assert 'road' not in test_mine


# Code blocks


def load_config(body, file):
    """Loads a block that is a config; a base that is not ours is mmseg's."""
    base = re.search(r"_base_ = '(.*)'", body)  # else an expression, which finds it by itself
    if base and not (ROOT / base[1]).exists():
        found, = MIM.glob(f'configs/*/{base[1]}')
        body = body.replace(base[1], str(found))
    file.write_text(body)
    cfg = Config.fromfile(file)
    with torch.device('meta'), DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    if cfg.model.type == 'KernelNormalized':
        assert any(isinstance(m, KNConv2d) for m in model.modules())
    else:
        assert isinstance(model.backbone, KNResNet)
    assert not any('BatchNorm' in type(m).__name__ for m in model.modules())
    return cfg


@pytest.mark.parametrize('name', WITH_PYTHON)
def test_python_blocks(name, started, tmp_path, monkeypatch):
    page = ROOT / name
    if 'import tifffile' in page.read_text():
        pytest.importorskip('tifffile')
    for link in ('tools', 'configs', 'data'):
        (tmp_path / link).symlink_to(started[0] / link)
    config = next((ROOT / 'configs').glob('*/*toy-cityscapes*.py'))
    (tmp_path / 'CONFIG.py').write_text(f"_base_ = '{config}'\n")
    (tmp_path / 'CHECKPOINT.pth').symlink_to(started[0] / 'work_dirs/demo/iter_2.pth')
    scene = next((started[0] / 'data').rglob('*_leftImg8bit.png'))
    (tmp_path / 'street.png').symlink_to(scene)
    write_modules(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    namespace = {}
    blocks = FENCE.findall(page.read_text()) + [('', '')]
    for i, ((language, body), (after, expected)) in enumerate(zip(blocks, blocks[1:],
                                                                  strict=False)):
        if language != 'python':
            continue
        if '_base_ = ' in body:
            load_config(body, tmp_path / f'block{i}.py')
        elif not re.match(r'# \w+\.py\n', body):  # a config imports the modules
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(body, f'{name}, block {i}', 'exec'), namespace)
            if after == 'text':
                assert out.getvalue() == expected


def test_what_syncbn_sends(tmp_path, monkeypatch):
    """2C + 1 numbers in forward, 2C in backward, with stand-ins for the kernels of GPUs."""
    sent = []

    def recorded(name, send):
        def call(*args, **kwargs):
            sent.append((name, [a for a in args if isinstance(a, torch.Tensor)][0].numel()))
            return send(*args, **kwargs)
        monkeypatch.setattr(dist, name, call)

    recorded('all_gather', dist.all_gather)
    recorded('all_reduce', dist.all_reduce)
    channels = 7
    zeros, ones = torch.zeros(channels), torch.ones(channels)
    for name, result in (('batch_norm_stats', (zeros, ones)),
                         ('batch_norm_gather_stats_with_counts', (zeros, ones)),
                         ('batch_norm_elemt', torch.rand(2, channels, 4, 4)),
                         ('batch_norm_backward_reduce', (zeros, zeros, ones, ones)),
                         ('batch_norm_backward_elemt', torch.rand(2, channels, 4, 4))):
        monkeypatch.setattr(torch, name, lambda *args, result=result: result)
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        x = torch.rand(2, channels, 4, 4, requires_grad=True)
        weight, bias = ones.clone().requires_grad_(), zeros.clone().requires_grad_()
        y = SyncBatchNorm.apply(x, weight, bias, zeros, ones, 1e-5, 0.1, dist.group.WORLD, 1)
        y.sum().backward()
    finally:
        dist.destroy_process_group()
    assert sent == [('all_gather', 2 * channels + 1), ('all_reduce', 2 * channels)]


# Error messages of docs/troubleshooting.md

TROUBLE = (ROOT / 'docs/troubleshooting.md').read_text()


def cityscapes(**kwargs):
    options = dict(type='KNCityscapesDataset', data_root='data/cityscapes',
                   data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
                   pipeline=[dict(type='LoadAnnotations')])
    with DefaultScope.overwrite_default_scope('mmseg'):
        return DATASETS.build(dict(options, **kwargs))


def empty_cityscapes():
    folder = Path('data/cityscapes/leftImg8bit/train/aachen')
    folder.mkdir(parents=True)
    return folder


def missing_labels():
    folder = empty_cityscapes()
    for i in range(2975):
        (folder / f'aachen_{i:06}_000019_leftImg8bit.png').touch()
    cityscapes()


def load_backbone(depth, weights):
    KNResNet(depth).load_state_dict(weights, strict=False)


def load_file(name, content):
    torch.save(content, name)
    if name == 'cut.pth':
        Path(name).write_bytes(Path(name).read_bytes()[:300])
    CheckpointLoader.load_checkpoint(name, 'cpu')


def bad_file(image=None, label=None):
    """A data set of one image and label, of 8 x 8 unless given."""
    stem = 'train/a/a_000000_000019'
    for path, picture in ((f'leftImg8bit/{stem}_leftImg8bit.png', image),
                          (f'gtFine/{stem}_gtFine_labelTrainIds.png', label)):
        path = Path('data/cityscapes', path)
        path.parent.mkdir(parents=True)
        usual = np.zeros((8, 8) if 'gtFine' in str(path) else (8, 8, 3), np.uint8)
        cv2.imwrite(str(path), usual if picture is None else picture)
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    if label is None and image is None:
        path.write_bytes(path.read_bytes()[:-8])
    return cityscapes(pipeline=pipeline)


def checked(dataset, **head):
    """Starts to test a head with a data set, as a config with the hook does."""
    head = ASPPHead(in_channels=4, channels=4, **dict(dict(num_classes=19), **head))
    runner = mock.Mock(model=torch.nn.ModuleDict(dict(decode_head=head)))
    runner.test_dataloader.dataset = dataset
    runner.test_evaluator.metrics = [IoUMetric()]
    ClassCheckHook().before_test(runner)


def label_ids():
    bad_file(label=np.array([[0, 23, 26, 255]], np.uint8).repeat(2, 1).repeat(8, 0))


class LoadArray(LoadImageFromFile):
    """A transform as users write it."""

    def transform(self, results):
        return dict(results, img=np.load(results['img_path']))


def own_loader():
    loaders = loaders_of(Compose([LoadArray()]))
    # The page shows it as it ends a message, without the kind of an error.
    raise SystemExit(load(dict(img_path='image.npy'), loaders).fault)


def named(classes):
    dataset = mock.Mock(spec=['metainfo'], metainfo=dict(classes=classes))
    checked(dataset, num_classes=2)


def padded():
    head = ASPPHead(in_channels=4, channels=4, num_classes=19, ignore_index=19)
    model = torch.nn.ModuleDict(dict(decode_head=head, data_preprocessor=SegDataPreProcessor(
        size=(8, 8))))
    dataset = mock.Mock(spec=['metainfo'], metainfo=dict(classes=[str(i) for i in range(19)]))
    raise_it(setting_faults(model, dataset, 'train', 'config.py')[0])


def masks():
    dataset = bad_file(label=np.array([[0, 255]] * 8, np.uint8).repeat(4, 1))
    head = ASPPHead(in_channels=4, channels=4, num_classes=19)
    ClassCheckHook()._look(mock.Mock(model=torch.nn.ModuleDict(dict(decode_head=head))), [
        ('train', mock.Mock(dataset=dataset), ())])


def raise_it(message):
    raise ValueError(message)


def bad_batch():
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.full((1, 2, 2), 21)),
                           metainfo=dict(seg_map_path='label.png'))
    hook = ClassCheckHook()
    hook.limits = [(19, 255)]
    hook.before_train_iter(None, 0, dict(data_samples=[sample]))


def other_checkpoint():
    head = torch.nn.ModuleDict(dict(decode_head=ASPPHead(
        in_channels=4, channels=4, num_classes=5)))
    other = ASPPHead(in_channels=4, channels=4, num_classes=3).state_dict(prefix='decode_head.')
    runner, hook = mock.Mock(model=head), ClassCheckHook()
    runner.test_dataloader.dataset.metainfo = {}
    hook.after_load_checkpoint(runner, dict(state_dict=other))
    hook.before_test(runner)


def no_whole_checkpoint():
    work = Path('work_dirs/demo')
    work.mkdir(parents=True)
    (work / 'iter_2.pth').touch()
    SafeCheckpointHook(by_epoch=False).before_run(mock.Mock(
        work_dir=str(work), _resume=True, _load_from=None))


def no_room():
    with _explained():
        raise OSError(28, 'No space left on device', 'work_dirs')


def read_only():
    from mmseg_script import run
    with mock.patch.object(runpy, 'run_path', side_effect=OSError(
            30, 'Read-only file system', 'work_dirs')):
        run('train.py')


class Command:
    def __reduce__(self):
        return os.system, ('true', )


class Swollen:
    def __reduce__(self):
        return bytearray, (2**60, )


def no_gpus():
    from mmengine.dist import utils
    with mock.patch('mmengine.device.get_device', lambda: 'cpu'):
        utils._init_dist_pytorch('nccl')


def old_mmcv(attempt):
    with (mock.patch.dict(sys.modules), mock.patch.object(mmcv, '__version__', '2.2.0'),
          mock.patch.object(mmengine, '__version__', '0.10.7')):
        del sys.modules['mmseg']
        attempt()


def image_classifier():
    from mmseg_script import run
    with (mock.patch.object(runpy, 'run_path', side_effect=RuntimeError(
            'operator torchvision::nms does not exist')),
          mock.patch.object(torch, '__version__', '2.13.0')):
        run('train.py')


OURS = {
    'op': lambda: importlib.import_module('mmcv.ops').nms(torch.zeros(1, 4), torch.zeros(1), .5),
    'mmcv 2.2': lambda: old_mmcv(stack._import_stack),
    'ftfy': lambda: mock.patch.object(stack, 'find_spec', lambda name: None)(
        stack._check_undeclared)(),
    'classifier': image_classifier,
    'no folder': cityscapes,
    'no image': lambda: empty_cityscapes() and cityscapes(),
    'no labels': missing_labels,
    'label ids': label_ids,
    '16-bit image': lambda: bad_file(np.zeros((8, 8, 3), np.uint16)),
    'grey image': lambda: bad_file(np.zeros((8, 8), np.uint8)),
    'colours': lambda: bad_file(label=np.zeros((8, 8, 3), np.uint8)),
    '16-bit label': lambda: bad_file(label=np.zeros((8, 8), np.uint16)),
    'another size': lambda: bad_file(label=np.zeros((4, 8), np.uint8)),
    'cut off': bad_file,
    'own loader': own_loader,
    'padding': padded,
    'metric': lambda: checked(cityscapes(lazy_init=True), ignore_index=19),
    'one output': lambda: checked(
        mock.Mock(spec=['metainfo'], metainfo=dict(classes=('a', 'b'))), num_classes=2,
        out_channels=1),
    'one class': lambda: named(['water']),
    'string': lambda: named('water'),
    'masks': masks,
    'bad batch': bad_batch,
    'num_classes': lambda: raise_it(class_fault(
        'decode_head', 19, 'train', ('ground', 'object', 'sky'), 'my_config.py')),
    'other checkpoint': other_checkpoint,
    'none whole': no_whole_checkpoint,
    'no room': no_room,
    'read-only': read_only,
    'no GPUs': no_gpus,
    'dtype': lambda: KNConv2d(3, 8, 3)(torch.rand(1, 3, 8, 8).half()),
    'size': lambda: KNConv2d(3, 8, 3)(torch.rand(1, 3, 2, 2)),
    'BatchNorm': lambda: load_backbone(18, {'stem.1.running_mean': torch.ones(1)}),
    'whole model': lambda: load_backbone(18, {'backbone.stem.weight': torch.ones(1)}),
    'norm-torch': lambda: load_backbone(18, {'block0.0.weight': torch.ones(1)}),
    'stem': lambda: load_backbone(18, KNResNetCls(18, low_resolution=True).state_dict()),
    'depth': lambda: load_backbone(50, KNResNet(18, out_indices=(2, 3)).state_dict()),
    'activation': lambda: KNResNet(18, out_indices=(0, )).load_state_dict(
        KNResNet(18, out_indices=(0, ), activation='mish').state_dict()),
    'ConvNeXt': lambda: KNConvNeXt('tiny', out_indices=(0, )).load_state_dict(
        {'features.0.0.weight': torch.ones(1), 'features.1.0.block.0.weight': torch.ones(1)}),
    'refused': lambda: load_file('other.pth', dict(meta=Command())),
    'command line': lambda: load_file('norm_torch.pth', argparse.Namespace(a=1)),
    'memory': lambda: load_file('swollen.pth', Swollen()),
    'damaged': lambda: load_file('cut.pth', dict(a=torch.zeros(100))),
    'folder': lambda: Path('work_dirs').mkdir() or CheckpointLoader.load_checkpoint('work_dirs'),
}


@pytest.mark.parametrize('case', OURS)
def test_our_messages(case, tmp_path, monkeypatch):
    if case in ('op', 'mmcv 2.2', 'ftfy') and (not OFFICIAL or mmcv_full_available()):
        pytest.skip('a message of the official stack with mmcv-lite')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / 'tools')
    with pytest.raises((Exception, SystemExit)) as caught:
        OURS[case]()
    kind = '' if caught.type is SystemExit else f'{caught.type.__name__}: '
    text = f' {kind}{caught.value} '
    if 'among those looked at' in text and case != 'label ids':  # whose begin once is enough
        text = re.split(r'TrainIds.png:?|leftImg8bit.png:?', text)[1]
    assert text.replace('\n', ' ') in ' '.join(TROUBLE.split())


def without(registry, name, attempt):
    with (mock.patch.dict(registry._module_dict), DefaultScope.overwrite_default_scope('mmseg')):
        del registry._module_dict[name]
        attempt()


def mmsegs_config():
    base = 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    Path('config.py').write_text(f'_base_ = {base!r}')
    Config.fromfile('config.py')


def pooling_branch(**kwargs):
    head = ASPPHead(in_channels=4, channels=4, num_classes=2, norm_cfg=dict(type='BN'), **kwargs)
    head.forward([torch.rand(1, 4, 8, 8)])


def loss(label, **settings):
    CrossEntropyLoss(**settings)(torch.zeros(1, 19, 2, 2), label, ignore_index=255)


def no_labels():
    metric = IoUMetric()
    metric.dataset_meta = dict(classes=('ground', 'object'))
    metric.process({}, [dict(pred_sem_seg=dict(data=torch.zeros(1, 2, 2)))])


def training_checkpoint():
    hub = mmengine.logging.MessageHub('test_docs')
    hub.update_scalar('loss', 0.5)
    torch.save(hub.state_dict(), 'hub.pth')
    torch.load('hub.pth')


def two_servers():
    first = dist.TCPStore('127.0.0.1', 0, 1, True)
    dist.TCPStore('127.0.0.1', first.port, 1, True)


def other_classes():
    head = torch.nn.ModuleDict(dict(decode_head=ASPPHead(
        in_channels=4, channels=4, num_classes=5)))
    other = ASPPHead(in_channels=4, channels=4, num_classes=3).state_dict(prefix='decode_head.')
    load_state_dict(head, other, strict=True)


def no_mmseg_kn():
    with mock.patch.dict(sys.modules, mmseg_kn=None):
        import_modules_from_strings(['mmseg_kn'], allow_failed_imports=False)


THEIRS = {
    "No module named 'mmcv._ext'": lambda: importlib.import_module('mmcv._ext'),
    "No module named 'pkg_resources'": mmsegs_config,
    'MMCV==2.2.0 is used but incompatible':
        lambda: old_mmcv(lambda: importlib.import_module('mmseg')),
    'KNResNet is not in the mmseg::model registry':
        lambda: without(MMSEG_MODELS, 'KNResNet',
                        lambda: MMSEG_MODELS.build(dict(type='KNResNet', depth=18))),
    'Cannot find None in registry under scope name mmseg':
        lambda: without(MODELS, 'KNConv',
                        lambda: build_conv_layer(dict(type='KNConv'), 1, 1, 1)),
    'Failed to import mmseg_kn': no_mmseg_kn,
    'is not a subset of classes':
        lambda: cityscapes(metainfo=dict(classes=('ground', 'object'))),
    'Target 21 is out of bounds': lambda: loss(torch.full((1, 2, 2), 21)),
    'got an unexpected keyword argument': lambda: MMSEG_MODELS.build(
        dict(type='KNResNet', depth=18, norm_cfg=dict(type='BN'))),
    'index 255 is out of bounds for dimension 0 with size 19':
        lambda: loss(torch.full((1, 2, 2), 255), class_weight=[1.] * 19),
    "KeyError: 'gt_sem_seg'": no_labels,
    'only batches of spatial targets supported (3D tensors) but got targets of dimension: 4':
        lambda: loss(torch.zeros(1, 3, 2, 2, dtype=torch.long)),
    'persistent_workers option needs num_workers > 0':
        lambda: torch.utils.data.DataLoader([1], num_workers=0, persistent_workers=True),
    'Expected more than 1 value per channel when training': pooling_branch,
    'Weights only load failed': training_checkpoint,
    'address already in use': two_servers,
    'size mismatch for decode_head.conv_seg.weight': other_classes,
}


@pytest.mark.parametrize('message', THEIRS)
def test_messages_of_others(message, tmp_path, monkeypatch):
    if 'pkg_resources' in message and importlib.util.find_spec('pkg_resources') or \
            'mmcv' in message.lower() and (not OFFICIAL or mmcv_full_available()):
        pytest.skip('does not occur here')
    assert f'### `{message}`' in TROUBLE
    monkeypatch.chdir(tmp_path)
    text = message.removeprefix('KeyError: ')
    with pytest.raises(KeyError if 'KeyError' in message else Exception, match=re.escape(text)):
        THEIRS[message]()


def test_a_norm_cfg_left_beside_knconv():
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        pooling_branch(conv_cfg=dict(type='KNConv'))


# mmseg's own traps: what the page advises, tried


def test_warnings_about_schedules():
    """Both in one text, as the page has them."""
    weights = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.)
    ends = [[PolyLR(weights, end=end, by_epoch=False)] for end in (160000, 80000)]
    runner = mock.Mock(train_loop=mock.Mock(spec=EpochBasedTrainLoop), param_schedulers=ends[0])
    runner.train_dataloader.sampler = InfiniteSampler([1])
    hook = ScheduleCheckHook()
    hook.before_run(runner)
    runner.param_schedulers = ends[1]
    hook.before_train(runner)
    said = [call.args[0] for call in runner.logger.warning.call_args_list]
    assert len(said) == 2 and all(f' {text} ' in ' '.join(TROUBLE.split()) for text in said)


def block(title):
    """The first Python block below a heading."""
    return FENCE.search(TROUBLE.split(f'### {title}\n')[1])[2]


def test_class_weights_and_void_pixels():
    namespace = {}
    with mock.patch.dict(MMSEG_MODELS._module_dict):
        exec(block('`index 255 is out of bounds for dimension 0 with size 19`'), namespace)
    loss = namespace['WeightedCrossEntropyLoss'](class_weight=[1., 3.], loss_weight=0.5)
    score = torch.randn(1, 2, 1, 3)
    found = loss(score, torch.tensor([[[0, 1, 255]]]), weight=None, ignore_index=255)
    first, second = score.log_softmax(1)[0, [0, 1], 0, [0, 1]]
    torch.testing.assert_close(found, -0.5 * (first + 3 * second) / 4)


def test_a_test_set_without_labels(started, tmp_path, monkeypatch):
    for name in ('configs', 'data'):
        (tmp_path / name).symlink_to(started[0] / name)
    monkeypatch.chdir(tmp_path)
    cfg = load_config(block("`KeyError: 'gt_sem_seg'`"), tmp_path / 'config.py')
    data = dict(cfg.test_dataloader.dataset, data_root='data/toy_cityscapes',
                data_prefix=dict(img_path='leftImg8bit/val', seg_map_path='gtFine/test'))
    with DefaultScope.overwrite_default_scope('mmseg'):  # else that of whichever test was before
        sample = DATASETS.build(data)[0]['data_samples']
        metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = dict(classes=('ground', 'object'))
    prediction = torch.tensor([[[0., 1.], [18., 3.]]])
    metric.process({}, [dict(img_path=sample.img_path, pred_sem_seg=dict(data=prediction))])
    written, = Path('work_dirs/labels').iterdir()
    assert written.stem == Path(sample.img_path).stem
    assert np.array_equal(cv2.imread(str(written), cv2.IMREAD_UNCHANGED), prediction[0])


def test_show_dir_draws_every_fiftieth():
    for settings, number in ((dict(), 1), (dict(interval=1), 60)):
        with mock.patch('mmengine.visualization.Visualizer.get_current_instance') as visualizer, \
                mock.patch('mmengine.fileio.get'), mock.patch('mmcv.imfrombytes'):
            hook = SegVisualizationHook(draw=True, **settings)
            for i in range(60):
                hook.after_test_iter(mock.Mock(), i, {}, [mock.Mock(img_path='a.png')])
        assert visualizer().add_datasample.call_count == number
