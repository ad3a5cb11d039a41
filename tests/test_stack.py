"""What mmseg_kn.stack promises: a light import, clear errors, mmseg beside mmcv-lite."""
import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest
import torch
from mmengine.utils.dl_utils import mmcv_full_available
from program import ROOT

from mmseg_kn import stack

OURS = str(ROOT / 'mmseg_kn') + os.sep  # The clone itself, with its .venv, may have that name too.
COMPILED = mmcv_full_available()
OFFICIAL = stack._import_stack() < (1, 3)
STUBBED = OFFICIAL and not COMPILED
needs_stub = pytest.mark.skipif(
    not STUBBED, reason='only the official stack without compiled ops gets stand-ins'
)


def in_fresh_process(code, cwd):
    """Runs code in a new interpreter and returns the JSON it prints last."""
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, '-c', code], env=env, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_light_and_repeatable(tmp_path):
    code = f"""
import json, sys, warnings

package = {OURS!r}

class Wanted:
    names = []
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while 'importlib' in frame.f_code.co_filename:
            frame = frame.f_back
        # torch itself may look for triton
        ours = frame.f_code.co_filename.startswith(package)
        if ours and name.split('.')[0] in ('triton', 'opacus'):
            self.names.append(name)

sys.meta_path.insert(0, Wanted())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import mmseg_kn
import torch
from mmengine.runner import CheckpointLoader
before = dict(CheckpointLoader._schemes), set(sys.modules)
mmseg_kn.stack.setup()
import mmseg.models
from mmengine.utils.dl_utils import mmcv_full_available
import mmcv
print(json.dumps({{
    'ours': mmseg_kn.__file__.startswith(package),
    'optional': Wanted.names,
    'cuda': torch.cuda.is_initialized(),
    'warnings': [str(w.message) for w in caught if w.filename.startswith(package)],
    'same': before[0] == CheckpointLoader._schemes,
    'compiled': mmcv_full_available(),
    'stub left': 'mmcv._ext' in sys.modules or hasattr(mmcv, '_ext'),
}}))
"""
    found = in_fresh_process(code, tmp_path)
    assert found['ours']
    assert found['optional'] == []
    assert not found['cuda']
    assert found['warnings'] == []
    assert found['same']
    assert found['compiled'] == COMPILED
    assert found['stub left'] == COMPILED


def test_import_after_a_failed_or_successful_import_of_mmseg_models(tmp_path):
    code = """
import json
try:
    import mmseg.models
    failed = False
except ImportError:
    failed = True
import mmseg_kn
import mmseg.models
from mmseg.registry import MODELS
print(json.dumps([failed, 'SideAdapterCLIPHead' in MODELS, 'FocalLoss' in MODELS]))
"""
    assert in_fresh_process(code, tmp_path) == [STUBBED, True, True]


def test_what_is_missing_is_named_in_one_line(tmp_path):
    code = f"""
import json, sys

def attempt():
    sys.modules.pop('mmseg_kn', None)
    try:
        import mmseg_kn
    except ImportError as error:
        return type(error).__name__, str(error)

found = {{}}
if {OFFICIAL}:
    import mmcv
    version, mmcv.__version__ = mmcv.__version__, '2.2.0'
    found['2.2.0'] = attempt()
    mmcv.__version__ = version
for name in ('mmengine', 'mmcv', 'mmseg', *(('ftfy', 'regex') if {OFFICIAL} else ())):
    kept = sys.modules.pop(name, None)
    sys.modules[name] = None
    found[name] = attempt()
    del sys.modules[name]
    if kept:
        sys.modules[name] = kept
print(json.dumps(found))
"""
    found = in_fresh_process(code, tmp_path)
    assert len(found) == (6 if OFFICIAL else 3)
    for name, (kind, message) in found.items():
        assert kind == 'ImportError'
        assert name in message and '\n' not in message
        for extra in ('lite', 'mmcv', 'onedl'):
            assert f'"mmseg_kn[{extra}]"' in message


@needs_stub
def test_every_module_and_name_of_mmcv_ops_imports():
    ops = importlib.import_module('mmcv.ops')
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f'mmcv.ops.{module.name}')
    for name in ops.__all__:
        assert getattr(ops, name) is not None
    assert 'mmcv._ext' not in sys.modules
    assert not mmcv_full_available()


@needs_stub
def test_a_compiled_op_raises_when_it_is_called():
    from mmcv.ops import nms, roi_align, sigmoid_focal_loss

    boxes, scores = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([0.5])
    with pytest.raises(RuntimeError, match=r"'nms'.*mmseg_kn\[mmcv\]"):
        nms(boxes, scores, 0.5)
    with pytest.raises(RuntimeError, match="'roi_align_forward'"):
        roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]), (2, 2))
    with pytest.raises(RuntimeError, match="'sigmoid_focal_loss_forward'"):
        sigmoid_focal_loss(torch.zeros(1, 2), torch.tensor([1]))


@pytest.mark.skipif(not STUBBED and not COMPILED, reason='mmcv.ops cannot be imported here')
def test_point_sample_works():
    from mmcv.ops import point_sample

    image = torch.arange(16.0).view(1, 1, 4, 4)
    point = torch.tensor([[[0.5, 0.5]]])
    torch.testing.assert_close(point_sample(image, point), torch.tensor([[[7.5]]]))


def test_a_config_of_mmseg_is_converted_by_two_lines(tmp_path):
    """_base_ as docs/any_model.md has it, which names mmseg's file on either stack."""
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS

    import mmseg_kn

    page = (ROOT / 'docs/any_model.md').read_text().split("## mmseg's own configs")[1]
    config = tmp_path / 'config.py'
    config.write_text(page.split('```python\n')[1].split('```')[0])
    cfg = Config.fromfile(config)
    with torch.device('meta'), DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    layers = [type(layer) for layer in model.modules()]
    assert layers.count(mmseg_kn.KNConv2d) == 41
    assert not any(issubclass(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in layers)


def test_collect_env_works():
    from mmcv.utils import collect_env

    assert (collect_env()['MMCV Compiler'] == 'n/a') == (not COMPILED)
