"""A deprecation in our own code is an error in the tests; one in the stack is not."""
import warnings

import pytest
from program import execute


@pytest.mark.parametrize('module', [
    'mmseg_kn.models.layers', 'compare_norms', 'config_args', 'mmseg_script', 'shared'
])
def test_ours_are_errors(module):
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit('old', DeprecationWarning, f'{module}.py', 1, module)


def test_others_are_not():
    warnings.warn_explicit('old', DeprecationWarning, 'mmseg/apis.py', 1, 'mmseg.apis')


def test_programs(tmp_path):
    warn = 'import warnings\nwarnings.warn("old", DeprecationWarning)\n'
    (tmp_path / 'other.py').write_text(warn)
    (tmp_path / 'main.py').write_text(f'import other\nprint("so far")\n{warn}')
    log = execute(tmp_path / 'main.py', cwd=tmp_path, check=False)
    assert 'so far' in log and log.splitlines()[-1] == 'DeprecationWarning: old'
