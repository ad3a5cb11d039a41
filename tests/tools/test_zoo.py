"""The table of mmseg's families: how it is measured, and that the page shows it."""
import csv
import json

import pytest
import torch
from mmengine.registry import DefaultScope
from program import ROOT, load_tool

from mmseg_kn import kernelize

# isort: split
from mmengine.config import Config
from mmseg.registry import MODELS

CSV = ROOT / 'docs/benchmarks/zoo_cpu.csv'


@pytest.fixture(scope='module')
def tool():
    return load_tool(ROOT / 'tools/benchmarks/zoo.py')


def test_each_family_has_a_small_config(tool):
    configs = {family: tool.config_of(family).stem for family in tool.families()}
    assert len(configs) > 50
    assert configs['deeplabv3'].startswith('deeplabv3_r18') and '-b0' in configs['segformer']
    assert configs['danet'].startswith('danet_r50') and '-t_' in configs['segnext']


@pytest.mark.parametrize('family', ['bisenetv2', 'erfnet'])
def test_a_family_is_measured(tool, family, monkeypatch, capsys):
    monkeypatch.setattr(tool, 'SIZES', (64, ))
    monkeypatch.setattr('sys.argv', ['zoo.py', '--one', str(tool.config_of(family))])
    tool.main()
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row['error'] == row['meets'] == row['state'] == '' and row['size'] == '64x64'
    assert row['left'] == 0 and row['knconv'] + row['kernelnorm'] == row['batchnorms'] > 0
    assert float(row['images_per_s']) > 0 and float(row['loss']) > 0


def test_a_layer_in_which_images_meet_is_named(tool):
    with DefaultScope.overwrite_default_scope('mmseg'):
        cfg = Config.fromfile(ROOT / 'configs/fcn/fcn_r18-d8_1xb2-400_camvid-160x160.py').model
        cfg.backbone.update(base_channels=8, stem_channels=8)
        cfg.decode_head.update(in_channels=64, channels=8)
        cfg.auxiliary_head.update(in_channels=32, channels=8)
        model = MODELS.build(cfg)
        images, samples = tool.random_batch(3, (32, 32), 11, torch.Generator())
        meets, changed = tool.meeting(model, images, samples)
        assert meets == 'backbone.stem.1' and 'backbone.stem.1.running_mean' in changed
        assert not model.backbone.stem[1].running_mean.any()  # put back
        assert tool.meeting(kernelize(model), images, samples) == ('', [])


def test_a_failure_is_a_row_and_a_row_is_kept(tool, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'zoo.csv'
    rows = [dict(dict.fromkeys(tool.COLUMNS, '1'), family='stdc', error='')]
    tool.write_csv(rows, out)
    monkeypatch.setattr('sys.argv',
                        ['zoo.py', 'stdc', 'unet', '--limit', '0.1', '--out', str(out)])
    tool.main()
    assert 'unet: took more than 0.1 s' in capsys.readouterr().out
    with open(out, newline='') as file:
        assert [(row['family'], row['error']) for row in csv.DictReader(file)] == [
            ('stdc', ''), ('unet', 'took more than 0.1 s')]


def test_the_page_shows_the_rows(tool):
    with open(CSV, newline='') as file:
        rows = list(csv.DictReader(file))
    page = (ROOT / 'docs/any_model.md').read_text()
    assert tool.table(rows) in page
    trained = [row for row in rows if not row['error']]
    assert len(trained) >= 44 and not any(row['meets'] or int(row['left']) for row in trained)
    assert f'{len(trained)} of {len(rows)} families' in ' '.join(page.split())
    assert all(f"`{row['family']}`" in page for row in rows if row['error'] or row['state'])
