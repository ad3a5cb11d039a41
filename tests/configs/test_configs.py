import copy
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings
from mmseg.registry import MODELS, TRANSFORMS
from mmseg_script import run
from program import ROOT
from settings import flat
from steps import check_steps

CONFIG_DIR = ROOT / 'configs'
CONFIGS = sorted(p.relative_to(CONFIG_DIR).as_posix() for p in CONFIG_DIR.glob('[!_]*/*.py')
                 if p.parent.name not in ('classification', 'kernelized', 'knconvnext')
                 and '-d32_' not in p.name)
SIZE = (64, 96)


def load(name):
    cfg = Config.fromfile(CONFIG_DIR / name)
    init_default_scope(cfg.default_scope)
    return cfg


@pytest.mark.parametrize('name', CONFIGS)
def test_builds_and_runs_forward_loss_and_predict(name):
    cfg = load(name)
    baselines = ['mmseg_kn.baselines'] * any(
        part in name for part in ('nonorm', 'plainpool', '-bn-', '-kn-'))
    packages = ['mmseg_kn', 'mmseg_kn.privacy', *baselines] if '-dp-' in name else (
        baselines or ['mmseg_kn'])
    assert cfg.custom_imports == dict(imports=packages, allow_failed_imports=False)
    import_modules_from_strings(**cfg.custom_imports)
    cfg.model.data_preprocessor.size = SIZE
    if cfg.model.test_cfg.mode == 'slide':
        cfg.model.test_cfg.update(crop_size=SIZE, stride=SIZE)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    if 'knr' in name and '-bn-' not in name:
        assert cfg.model.backbone.type == 'KNResNet'
        assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
                       for m in model.modules())
        assert cfg.model.data_preprocessor.mean == [0, 0, 0]
        assert cfg.model.data_preprocessor.std == [255, 255, 255]
    batch_size = cfg.train_cfg.get('max_physical_batch_size', cfg.train_dataloader.batch_size)
    check_steps(model, batch_size, SIZE, 'backbone.stem', stride=8)


@pytest.mark.parametrize('name', CONFIGS)
def test_schedule_and_pipelines(name):
    cfg = load(name)
    gpus, batch = (int(n) for n in name.split('_')[2].split('-')[0].split('xb'))
    assert cfg.train_dataloader.batch_size == batch
    assert dict(type='ChannelsLastHook', device='cuda') in cfg.custom_hooks
    max_iters = cfg.train_cfg.max_iters
    assert cfg.param_scheduler[0].end == max_iters
    assert max_iters % cfg.default_hooks.checkpoint.interval == 0
    assert max_iters % cfg.train_cfg.val_interval == 0
    assert name.split('_')[2].split('-')[-1] in (str(max_iters), f'{max_iters // 1000}k')
    if '-dp-' in name:
        assert cfg.optim_wrapper.type == 'DPOptimWrapper'
        assert f'eps{cfg.optim_wrapper.target_epsilon:g}-' in name
        assert cfg.train_dataloader.batch_sampler.type == 'PoissonBatchSampler'
        assert dict(type='DPHook') in cfg.custom_hooks
    else:
        assert cfg.optim_wrapper.clip_grad.max_norm == 1
    if 'cityscapes-512x1024' in name and '-dp-' not in name:
        # the learning rate follows the images of an iteration, and so does their number
        assert cfg.optim_wrapper.optimizer.lr == pytest.approx(0.01 * gpus * batch / 8)
        assert max_iters * gpus * batch in (320_000, 640_000)
    for pipeline in (cfg.train_pipeline, cfg.test_pipeline, cfg.tta_pipeline):
        for transform in copy.deepcopy(pipeline):
            TRANSFORMS.build(transform)
    assert cfg.tta_model.type == 'SegTTAModel'
    # mmengine hands the preprocessor at the top level to the model under --tta
    assert cfg.data_preprocessor == cfg.model.data_preprocessor
    assert cfg.test_dataloader.dataset.data_root == cfg.train_dataloader.dataset.data_root


@pytest.mark.parametrize('folder', ['deeplabv3', 'fcn'])
def test_half_the_length_and_half_precision_are_flags_of_the_tool(folder, monkeypatch):
    """The flags that the README of a folder gives, read by mmseg's own train.py."""
    text = (CONFIG_DIR / folder / 'README.md').read_text()
    options = re.search(r'`(--cfg-options [^`]*)`.* `--amp`', ' '.join(text.split()))[1].split()
    name = f'{folder}/{folder}_knr50-d8_4xb2-80k_cityscapes-512x1024.py'
    runner = mock.Mock()
    monkeypatch.setattr(Runner, 'from_cfg', runner)
    monkeypatch.setattr('sys.argv', ['train.py', str(CONFIG_DIR / name), '--amp', *options])
    run('train.py')
    (cfg, ), _ = runner.call_args
    before, after = flat(dict(load(name))), flat(dict(cfg))
    assert {key: after[key] for key in after if after[key] != before.get(key)} == {
        'train_cfg.max_iters': 40000, 'param_scheduler.0.end': 40000,
        'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.loss_scale': 'dynamic',
        'work_dir': f'./work_dirs/{Path(name).stem}', 'launcher': 'none'}
    # The last iteration is validated and saved.
    assert 40000 % cfg.train_cfg.val_interval == 40000 % cfg.default_hooks.checkpoint.interval == 0


def twin(name):
    return re.sub(r'_(?:kn)?r(\d+)(-gn|-gn-ws|-ln|-nonorm|-plainpool|-kn|-bn)?-d8',
                  r'_knr\1-d8', name)


@pytest.mark.parametrize('name', [c for c in CONFIGS if c != twin(c)])
def test_twins_differ_in_the_normalization_alone(name):
    kn = twin(name)
    mine, theirs = flat(dict(load(name))), flat(dict(load(kn)))
    differ = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
    norm = re.compile(r'(model\.)?(backbone\.|(norm|conv|act)_cfg|data_preprocessor\.(mean|std)|'
                      r'(decode|auxiliary)_head\.(in_channels$|(norm|conv|act)_cfg)|'
                      r'decode_head\.type$)|custom_imports')
    assert differ and not [key for key in differ if not norm.match(key)]
    # nor do the backbones in what is not their architecture
    for key in ('depth', 'out_indices', 'strides', 'dilations'):
        mine, theirs = (load(n).model.backbone[key] for n in (name, kn))
        assert mine == theirs, key
