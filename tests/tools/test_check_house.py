"""The checks of tools/dev/check_house.py: each passes a sound tree and finds what is wrong."""
import pytest
from dev import check_house as house

SOUND = {
    'mmseg_kn/__init__.py': 'from . import ops\nfrom .models import Net\n',
    'mmseg_kn/models/__init__.py': 'from .net import Net\n',
    'mmseg_kn/models/net.py': 'from ..ops import kn_conv\nclass Net:\n    conv = kn_conv\n',
    'mmseg_kn/ops/__init__.py': 'from .conv import kn_conv\n',
    'mmseg_kn/ops/conv.py': 'import math\nfrom torch import nn\n'
                            'def kn_conv():\n    from . import triton_conv\n',
    'mmseg_kn/ops/triton_conv.py': 'import torch\nimport triton.language as tl\n',
    'mmseg_kn/privacy/loop.py': 'import opacus\nfrom ..models.net import Net\n',
    'tests/helpers/nets.py': 'import mmseg_kn\n',
    'tests/test_ops.py': 'from nets import Net\n',
    'tests/models/test_net.py': 'import pytest\n',
    'configs/a.py': '', 'docs/a.md': '', 'tools/a.py': '', 'data/a.png': '', '.ci/run': '',
    '.gitignore': '/data\n__pycache__/\n', 'README.md': 'word ' * 900,
}
CIRCLE = 'circle: mmseg_kn.models.net -> mmseg_kn.ops -> mmseg_kn.ops.conv -> mmseg_kn.models.net'


@pytest.mark.parametrize('check,files,faults', [
    (house.check_sizes, {'mmseg_kn/ops/conv.py': 'x = 1\n' * 300}, []),
    (house.check_sizes, {'mmseg_kn/ops/conv.py': 'x = 1\n' * 301},
     ['mmseg_kn/ops/conv.py has 301 lines, more than 300']),
    (house.check_package_root, {f'mmseg_kn/{i}.py': '' for i in range(5)}, []),
    (house.check_package_root, {f'mmseg_kn/{i}.py': '' for i in range(6)}, ['more than 6']),
    (house.check_top_folders, {}, []),
    (house.check_top_folders, {'examples/a.py': ''}, ['examples is new']),
    (house.check_circles, {}, []),
    (house.check_circles, {'mmseg_kn/ops/conv.py': 'def f():\n    from ..models import net\n'},
     [CIRCLE]),
    (house.check_circles, {'mmseg_kn/ops/conv.py': 'from . import IMPLS\n'},
     ['circle: mmseg_kn.ops -> mmseg_kn.ops.conv -> mmseg_kn.ops']),
    (house.check_foreign_imports, {}, []),
    (house.check_foreign_imports,
     {'mmseg_kn/ops/conv.py': 'import numpy as np\nfrom .. import stack\n',
      'mmseg_kn/ops/fused.py': 'def f():\n    import triton\n',
      'mmseg_kn/models/net.py': 'from opacus import PrivacyEngine\n'},
     ['mmseg_kn/models/net.py imports opacus', 'mmseg_kn/ops/conv.py imports mmseg_kn',
      'mmseg_kn/ops/conv.py imports numpy', 'mmseg_kn/ops/fused.py imports triton']),
    (house.check_tests, {}, []),
    (house.check_tests, {'tests/models/test_net.py': 'def test():\n    from test_ops import x\n',
                         'tests/helpers/nets.py': 'from tests.models.test_net import net\n'},
     ['tests/helpers/nets.py imports tests.models.test_net',
      'tests/models/test_net.py imports test_ops']),
    (house.check_tests, {'tools/misc/nets.py': ''},
     ['tests/helpers/nets.py is named as a file in tools']),
    (house.check_readme, {}, []),
    (house.check_readme, {'README.md': 'word ' * 901}, ['more than 900']),
])
def test_faults_are_found(tmp_path, check, files, faults):
    for name, text in {**SOUND, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert check(tmp_path)[1] == faults


@pytest.mark.parametrize('faults,status,mark', [([], 0, 'ok'), (['ten'], 1, 'FAIL')])
def test_exit_status(monkeypatch, capsys, faults, status, mark):
    monkeypatch.setattr(house, 'CHECKS', [lambda root: ('nine', faults), lambda root: ('one', [])])
    assert house.main() == status
    assert capsys.readouterr().out.splitlines() == [
        f'{mark:4} {"; ".join(["nine", *faults])}', 'ok   one']
