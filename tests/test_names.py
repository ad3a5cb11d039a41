"""The names that users hold still work: helpers/public_names.py lists them."""
import zlib

import pytest
import torch
from mmengine.registry import FUNCTIONS, HOOKS
from public_names import EXPORTED, FILE_BACKEND, OPERATORS, REGISTERED, lookup, lost_names

import mmseg_kn


def test_no_name_is_lost():
    assert lost_names() == []


def test_lost_names_are_found(monkeypatch):
    monkeypatch.delitem(HOOKS.module_dict, 'DPHook')
    monkeypatch.setitem(FUNCTIONS.module_dict, 'private_collate', dict)
    monkeypatch.setattr(mmseg_kn, '__all__', ['KNConv2d'])
    monkeypatch.delattr('mmseg_kn.fsdp.wrap_blocks')
    monkeypatch.setattr('mmseg_kn.ops.IMPLS', ('auto', ))
    monkeypatch.setattr('public_names.OPERATORS', [*OPERATORS, 'box_sum'])
    monkeypatch.setattr('public_names.FILE_BACKEND', f'not {FILE_BACKEND}')
    lost = lost_names()
    assert lost[:2] == ['DPHook in mmengine.registry.HOOKS',
                        'private_collate in mmengine.registry.FUNCTIONS']
    assert 'mmseg_kn.__all__: KNResNet' in lost and 'mmseg_kn.__all__: KNConv2d' not in lost
    assert 'mmseg_kn.fsdp.wrap_blocks' in lost and 'operator mmseg_kn::box_sum' in lost
    assert len(lost) == 2 + 9 + 4


@pytest.mark.parametrize('registry', REGISTERED)
def test_the_list_has_every_registered_name(registry):
    ours = {name for name, kind in lookup(registry).module_dict.items()
            if kind.__module__.startswith('mmseg_kn.')}
    assert ours == set(REGISTERED[registry])


@pytest.mark.parametrize('module', EXPORTED)
def test_the_list_has_every_exported_name(module):
    assert sorted(lookup(f'{module}.__all__')) == sorted(EXPORTED[module])


def test_operators_have_schemas():
    for name in OPERATORS:
        schema = getattr(torch.ops.mmseg_kn, name).default._schema
        assert schema.name == f'mmseg_kn::{name}' and not schema.is_mutable


def weights(*names):
    return [f'{name}.{kind}' for name in names for kind in ('weight', 'bias')]


def test_keys_of_checkpoints_of_depth_18():
    block = ('conv1', 'conv2')
    keys = weights(
        'stem', *(f'layer1.{i}.{conv}' for i in (0, 1) for conv in block),
        'layer2.0.conv', *(f'layer2.{i}.{conv}' for i in (1, 2) for conv in block),
        'layer3.0.conv', *(f'layer3.1.{conv}' for conv in block),
        'layer4.0.conv', *(f'layer4.1.{conv}' for conv in block))
    assert list(mmseg_kn.KNResNet(18).state_dict()) == keys
    assert list(mmseg_kn.KNResNetClassifier(18).state_dict()) == [
        *(f'backbone.{key}' for key in [*keys, *weights('tail')]), *weights('head.fc')]


# A CRC-32 of all lines "name shape", from version 0.1.0.
@pytest.mark.parametrize('network,depth,expected', [
    ('KNResNet', 18, 428840598), ('KNResNet', 34, 1049482536),
    ('KNResNet', 50, 1746093794), ('KNResNet', 101, 4054161925),
    ('KNResNetClassifier', 18, 3678353644), ('KNResNetClassifier', 34, 1228505371),
    ('KNResNetClassifier', 50, 629190435), ('KNResNetClassifier', 101, 3213591453)])
def test_keys_and_shapes_of_checkpoints(network, depth, expected):
    with torch.device('meta'):
        state = getattr(mmseg_kn, network)(depth).state_dict()
    lines = [f'{name} {tuple(value.shape)}' for name, value in state.items()]
    assert zlib.crc32('\n'.join(lines).encode()) == expected
