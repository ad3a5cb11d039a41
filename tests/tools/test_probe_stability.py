"""What the tool reports of the first iterations, and how it counts windows without variance."""
import re

import pytest
import torch
import torch.nn.functional as F
from program import ROOT, execute, load_tool
from toy_cityscapes import generate

from mmseg_kn import KNConv2d
from mmseg_kn.ops.geometry import make_geometry, pad

TOOL = ROOT / 'tools/benchmarks/probe_stability.py'
CONFIG = ROOT / 'configs/deeplabv3/deeplabv3_knr18-d8_1xb4-600_toy-cityscapes-128x256.py'


@pytest.mark.parametrize('kwargs', [
    dict(kernel_size=2, padding=(1, 0, 2, 1)),
    dict(kernel_size=(3, 2), padding=(2, 1), dilation=2),
    dict(kernel_size=3, stride=2, padding=1),
])
def test_flat_share_counts_windows_below_eps(kwargs):
    tool = load_tool(TOOL)
    torch.manual_seed(0)
    x = torch.rand(2, 3, 17, 15)
    x[:, :, :9] = 0.5  # flat but at the padding
    x[1] = 0
    layer = KNConv2d(3, 4, dropout_p=0, **kwargs)
    geometry = make_geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    units = F.unfold(pad(x.double(), geometry), geometry.kernel, dilation=geometry.dilation,
                     stride=geometry.stride)
    share = (units.var(1, correction=0) < layer.eps).float().mean().item()
    assert 0.5 < share < 1
    assert tool.flat_share(layer, x) == pytest.approx(share)


def test_reports_layers_and_seeds(tmp_path):
    generate(tmp_path, train=4, val=1, size=(64, 128))
    out = execute(TOOL, CONFIG, '--iterations', 5, '--seeds', 0, 1, '--cfg-options',
                  f'train_dataloader.dataset.data_root={tmp_path}',
                  f'val_dataloader.dataset.data_root={tmp_path}',
                  f'test_dataloader.dataset.data_root={tmp_path}',
                  'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
                  'train_dataloader.batch_size=1', 'model.data_preprocessor.size=(64,128)',
                  cwd=tmp_path)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()
            if line.startswith(('backbone.', 'decode_head.', 'auxiliary_head.'))}
    assert list(rows)[0] == 'backbone.stem' and len(rows) == 23
    for row in rows.values():
        flat, first, largest, end, *signal, size, _ = map(float, row)
        assert 0 <= flat <= 1 and max(first, end) <= largest + .01
        assert len(signal) == 2 and all(0 <= share <= 1 for share in signal) and size > 0
    # blocks start as identity: no gradient reaches their first convolution
    assert float(rows['backbone.layer1.0.conv1'][1]) == 0
    assert float(rows['backbone.layer1.0.conv2'][1]) > 0
    seeds = re.findall(r'^seed (\d): loss ([\d.]+) -> ', out, re.M)
    assert [seed for seed, _ in seeds] == ['0', '1'] and seeds[0][1] != seeds[1][1]
    assert not list(tmp_path.glob('work_dirs'))
