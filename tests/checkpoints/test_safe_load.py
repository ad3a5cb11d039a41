"""What safe loading promises: mmengine's checkpoints load, and no file runs code."""
import contextlib
import io
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.runner import CheckpointLoader, checkpoint, load_checkpoint
from runners import Tiny, message_hub, tiny_runner

import mmseg_kn  # noqa: F401 (makes loading safe)

# Checkpoints that must load


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A checkpoint that mmengine's Runner wrote, and the losses that it logged."""
    runner = tiny_runner(tmp_path_factory.mktemp('trained'), 2)
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    return Path(runner.work_dir) / 'iter_2.pth', losses, runner.model.state_dict()


def load(path, map_location='cpu'):
    return CheckpointLoader.load_checkpoint(str(path), map_location)


def test_a_training_checkpoint_loads_and_is_unchanged(trained):
    path, losses, weights = trained
    loaded = load(path)
    buffer = loaded['message_hub']['log_scalars']['train/loss']
    assert type(buffer) is HistoryBuffer
    np.testing.assert_array_equal(buffer.data[0], losses)
    assert buffer.mean(1) == losses[-1] and buffer.statistics('max') == max(losses)
    for name, weight in weights.items():
        torch.testing.assert_close(loaded['state_dict'][name], weight, rtol=0, atol=0)

    # The same values as the plain pickle (we wrote this one), and saved again in the same form.
    again = io.BytesIO()
    torch.save(loaded, again)
    for file in (path, io.BytesIO(again.getvalue())):
        plain = torch.load(file, weights_only=False)['message_hub']
        assert plain['runtime_info'] == loaded['message_hub']['runtime_info']
        for name, other in plain['log_scalars'].items():
            mine = loaded['message_hub']['log_scalars'][name]
            for ours, theirs in zip(mine.data, other.data, strict=True):
                np.testing.assert_array_equal(ours, theirs)
                assert ours.dtype == theirs.dtype and ours.flags.writeable


def test_resume_continues_and_does_not_run_the_config_in_the_file(trained, tmp_path):
    path, losses, _ = trained
    poisoned = load(path)
    poisoned['meta']['config'] = f'open({str(tmp_path / "ran")!r}, "w").close()'
    torch.save(poisoned, tmp_path / 'poisoned.pth')

    runner = tiny_runner(tmp_path, 4, resume=True, load_from=str(tmp_path / 'poisoned.pth'))
    runner.train()
    resumed = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(resumed) == 4
    np.testing.assert_array_equal(resumed[:2], losses)
    assert not (tmp_path / 'ran').exists()
    assert load(tmp_path / 'iter_4.pth')['meta']['iter'] == 4


def test_load_checkpoint_and_init_cfg_use_the_loader(trained):
    path, _, weights = trained
    model = Tiny()
    load_checkpoint(model, str(path), map_location='cpu', strict=True)
    torch.testing.assert_close(model.state_dict(), weights)

    class Part(BaseModule):
        def __init__(self):
            super().__init__(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
            self.linear = torch.nn.Linear(2, 1)

    part = Part()
    part.init_weights()
    torch.testing.assert_close(part.state_dict(), weights)


@pytest.mark.parametrize('core', ['numpy.core', 'numpy._core'])
def test_both_module_names_of_numpy(tmp_path, core):
    file = io.BytesIO()
    # The format without zip holds module names that can be exchanged as text.
    torch.save(message_hub(), file, _use_new_zipfile_serialization=False)
    data = file.getvalue()
    for other in (b'numpy.core.', b'numpy._core.'):
        data = data.replace(b'c' + other, b'c' + core.encode() + b'.')
    assert f'c{core}.multiarray\n_reconstruct'.encode() in data
    (tmp_path / 'hub.pth').write_bytes(data)
    loaded = load(tmp_path / 'hub.pth')
    assert loaded['log_scalars']['loss'].mean() == pytest.approx(0.25)
    best, epoch = loaded['runtime_info']['best'], loaded['runtime_info']['epoch']
    assert (best, type(best), epoch, type(epoch)) == (71.5, np.float32, 3, np.int64)


@pytest.mark.parametrize(
    'value',
    [
        np.arange(6, dtype='f4').reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype='i8').reshape(2, 3)),
        np.array([1.5, -2.0], dtype='>f8'),
        np.array([], dtype='f8'),
        np.array(3, dtype='u1'),
        np.array([True, False]),
        np.array([1 + 2j], dtype='c16'),
        np.array(['road', 'sky']),
        np.bool_(True),
        np.float16(0.5),
        np.str_('sky'),
    ],
    ids=repr,
)
def test_numpy_values_keep_type_and_value(tmp_path, value):
    torch.save(dict(a=[value, (value, 1)], dtype=value.dtype), tmp_path / 'a.pth')
    loaded = load(tmp_path / 'a.pth')
    assert loaded['dtype'] == value.dtype
    for found in (loaded['a'][0], loaded['a'][1][0]):
        assert type(found) is type(value) and found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)


def test_path_location_and_missing_file(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save(dict(w=torch.ones(2)), tmp_path / 'a.pth')
    assert load('~/a.pth')['w'].device.type == 'cpu'
    assert load('~/a.pth', 'meta')['w'].device.type == 'meta'
    assert load(tmp_path / 'a.pth', lambda storage, location: storage)['w'].sum() == 2
    with pytest.raises(FileNotFoundError, match='b.pth'):
        load('~/b.pth')


@pytest.mark.skipif(torch.cuda.is_available(), reason='the device that must be missing is there')
def test_a_missing_device_is_not_called_damage(tmp_path):
    torch.save(dict(w=torch.ones(2)), tmp_path / 'a.pth')
    with pytest.raises(RuntimeError, match='map_location'):
        load(tmp_path / 'a.pth', 'cuda')


# Checkpoints that must be refused


class Reduce:
    """Unpickles as function(*args), then, with a state, through BUILD."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __call__(self):
        """pickle insists that a function can be called."""

    def __reduce__(self):
        return self.parts


def touch(marker):
    return f'open({marker!r}, "w").close()'


def evaluate_by_getattr(marker):
    scope = Reduce(getattr, HistoryBuffer.__init__, '__globals__')
    builtins = Reduce(Reduce(getattr, scope, 'get'), '__builtins__')
    return Reduce(Reduce(getattr, builtins, 'get'), 'eval')


class Poisoned(HistoryBuffer):
    """A buffer whose pickle brings a method of its own."""

    def __init__(self, value):
        super().__init__([1.0], [1])
        self.mean = value

    def __reduce_ex__(self, protocol):
        return HistoryBuffer, (), self.__getstate__()


def _reconstruct(state):
    function = np.zeros(1).__reduce__()[0]
    return Reduce(function, np.ndarray, (0,), b'b', state=state)


ATTACKS = {
    'os.system': lambda m: Reduce(os.system, f'touch {m}'),
    'subprocess': lambda m: Reduce(subprocess.call, ['touch', m]),
    'eval': lambda m: Reduce(eval, touch(m)),
    'exec': lambda m: Reduce(exec, touch(m)),
    'method by getattr': lambda m: Reduce(Path.touch, Path(m)),
    'globals by getattr': lambda m: Reduce(evaluate_by_getattr(m), touch(m)),
    # torch allows this function, and it calls whatever it is given.
    'call by torch': lambda m: Reduce(
        torch._tensor._rebuild_from_type_v2, evaluate_by_getattr(m), torch.Tensor, (touch(m),), {}
    ),
    'object array': lambda m: np.array([Reduce(eval, touch(m))], dtype=object),
    'object field': lambda m: np.array([(Reduce(eval, touch(m)),)], dtype=[('a', object)]),
    'history': lambda m: dict(log_scalars={'loss': Poisoned(Reduce(eval, touch(m)))}),
}


def loaders():
    def by_url(path):
        return CheckpointLoader.load_checkpoint(f'https://checkpoints.invalid/{path.name}', 'cpu')

    yield 'local', load
    yield 'url', by_url
    if hasattr(checkpoint, '_safe_torch_load'):
        yield 'fork, path', lambda path: checkpoint._safe_torch_load(str(path))
        yield 'fork, bytes', lambda p: checkpoint._safe_torch_load(io.BytesIO(p.read_bytes()))


@pytest.fixture
def hub_dir(tmp_path, monkeypatch):
    """Where torch.hub looks for what it has downloaded before: no network is needed."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    return tmp_path / 'checkpoints'


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('attack', ATTACKS)
def test_a_malicious_pickle_is_refused_and_does_not_run(hub_dir, monkeypatch, attack, zipped):
    # A common advice on the web; it must not open the door either.
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    marker, path = hub_dir / 'ran', hub_dir / 'bad.pth'
    payload = dict(state_dict={}, meta=ATTACKS[attack](str(marker)))
    torch.save(payload, path, _use_new_zipfile_serialization=zipped)
    for name, loader in loaders():
        with pytest.raises(ValueError, match='was refused') as caught:
            loader(path)
        message = str(caught.value)
        assert not marker.exists(), name
        assert name == 'fork, bytes' or path.name in message
        assert 'weights_only' not in message and 'add_safe_globals' in message

    with contextlib.suppress(AttributeError):  # the control: this attack is a real one
        pickle.loads(pickle.dumps(payload, 2))
    assert marker.exists()


def test_the_refused_global_is_named(tmp_path):
    for function, name in ((os.system, 'posix.system'), (eval, 'eval'), (getattr, 'getattr')):
        torch.save(Reduce(function, HistoryBuffer, '__init__'), tmp_path / 'bad.pth')
        with pytest.raises(ValueError, match=rf'\(the global (builtins\.)?{name}'):
            load(tmp_path / 'bad.pth')


@pytest.mark.parametrize(
    'bad',
    [
        Reduce(np.dtype, 'O8', False, True, state=(3, '|', None, None, None, -1, -1, 0)),
        Reduce(np.dtype, 'V8', False, True, state=(3, '|', None, ('a',), {'a': 1}, 8, 1, 0)),
        _reconstruct((1, (1,), 'O', False, b'A' * 8)),
        _reconstruct((1, (2**40,), Reduce(np.dtype, 'f8'), False, b'A' * 8)),
        Reduce(getattr, HistoryBuffer, 'register_statistics'),
        Reduce(getattr, HistoryBuffer, '__init__'),
        Reduce(getattr, torch.Size, 'mean'),
    ],
    ids=['object dtype', 'fields', 'dtype by name', 'size', 'classmethod', 'init', 'owner'],
)
def test_crafted_states_are_refused(tmp_path, bad):
    torch.save([bad], tmp_path / 'bad.pth')
    with pytest.raises(ValueError, match='bad.pth'):
        load(tmp_path / 'bad.pth')


def test_a_history_cannot_replace_the_statistics_of_all(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(HistoryBuffer, '_statistics_methods', dict(mean=torch.Size))
        torch.save(HistoryBuffer([1.0, 2.0], [1, 1]), tmp_path / 'a.pth')
    buffer = load(tmp_path / 'a.pth')
    assert buffer.statistics('mean') == 1.5
    assert HistoryBuffer._statistics_methods['mean'] is HistoryBuffer.mean


def test_a_good_file_loads_by_url(hub_dir, trained):
    path, losses, _ = trained
    (hub_dir / 'good.pth').write_bytes(path.read_bytes())
    for _, loader in loaders():
        loaded = loader(hub_dir / 'good.pth')
        data = loaded['message_hub']['log_scalars']['train/loss'].data
        np.testing.assert_array_equal(data[0], losses)


@pytest.mark.parametrize(
    'damage', ['half', 'cut', 'large', 'empty', 'text', 'noise', 'zip', 'pickle']
)
def test_a_damaged_file_is_named(hub_dir, trained, damage):
    whole, other, large = trained[0].read_bytes(), io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(2**18), large)
    with zipfile.ZipFile(other, 'w') as archive:
        archive.writestr('a/b.txt', 'nothing')
        archive.writestr('a/c.txt', 'nothing')
    path = hub_dir / 'bad.pth'
    path.write_bytes(
        dict(
            half=whole[: len(whole) // 2],
            cut=whole[:-10],
            large=large.getvalue()[: 2**19],
            empty=b'',
            text=b'<html>404</html>\n',
            noise=bytes(range(255, 0, -1)),
            zip=other.getvalue(),
            pickle=pickle.dumps(dict(a=1), 4),
        )[damage]
    )
    for name, loader in loaders():
        with pytest.raises(ValueError, match='is damaged or not a checkpoint .*older one') as e:
            loader(path)
        assert name == 'fork, bytes' or path.name in str(e.value)
        assert '\n' not in str(e.value)


def test_a_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match='is a directory'):
        load(tmp_path)


def test_an_error_of_the_network_is_not_called_damage(hub_dir, monkeypatch):
    def refuse(url, *args, **kwargs):
        raise ConnectionRefusedError(111, 'Connection refused', url)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    with pytest.raises(ConnectionRefusedError, match='new.pth'):
        load('https://checkpoints.invalid/new.pth')
