"""ChannelsLastHook: other strides, same training."""
import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmseg.models import SegTTAModel
from program import ROOT
from tiny_training import SIZE, build, samples, train
from torch import distributed

from mmseg_kn.engine.channels_last_hook import ChannelsLastHook, use_channels_last


def formats_of(model, work_dir, **hooks):
    """Trains ``model`` for two iterations; whether each feature map was channels_last."""
    formats = []
    handle = model.backbone.register_forward_hook(lambda module, args, outputs: formats.extend(
        y.is_contiguous(memory_format=torch.channels_last) for y in outputs))
    train(model, work_dir, **hooks)
    handle.remove()
    return formats


def test_the_maps_follow_and_the_training_is_the_same(tmp_path):
    usual = build()
    other = copy.deepcopy(usual)
    assert not any(formats_of(usual, tmp_path / 'usual'))
    formats = formats_of(other, tmp_path / 'other', channels_last=dict(type='ChannelsLastHook'))
    assert len(formats) == 8 and all(formats)
    for (name, one), two in zip(usual.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6,
                                   msg=lambda text, name=name: f'{name}: {text}')
        assert one.stride() == two.stride()


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0,
                                   world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize('wrap', [lambda model: model, MMDistributedDataParallel, SegTTAModel])
def test_it_ends_with_the_run(wrap, one_process):
    model, hook = build(), ChannelsLastHook()
    runner = SimpleNamespace(model=wrap(model))
    data = dict(inputs=[sample['inputs'] for sample in samples()],
                data_samples=[sample['data_samples'] for sample in samples()])

    def channels_last():
        inputs = model.data_preprocessor(data)['inputs']
        return not inputs.is_contiguous() and inputs.is_contiguous(
            memory_format=torch.channels_last)

    hook.before_run(runner)
    assert channels_last()
    hook.after_run(runner)
    assert not channels_last()


@pytest.mark.parametrize('device, takes_effect', [('cuda', False), ('cpu', True), (None, True)])
def test_it_may_be_for_one_kind_of_device(device, takes_effect):
    model = build()
    hook, runner = ChannelsLastHook(device=device), SimpleNamespace(model=model)
    hook.before_run(runner)
    assert bool(model.data_preprocessor._forward_hooks) == takes_effect
    hook.after_run(runner)
    assert not model.data_preprocessor._forward_hooks


@pytest.mark.parametrize('device', ['gpu', 3.5])
def test_a_device_that_torch_does_not_know(device):
    with pytest.raises(ValueError, match=f"got {device!r}; use 'cuda', 'cpu' or None"):
        ChannelsLastHook(device=device)


def test_the_configs_use_it_on_a_gpu():
    cfg = Config.fromfile(ROOT / 'configs/deeplabv3/deeplabv3_knr18-d8_1xb2-400_camvid-160x160.py')
    assert dict(type='ChannelsLastHook', device='cuda') in cfg.custom_hooks


def test_logits_reach_the_loss_in_the_usual_format():
    model = build()
    image = torch.rand(2, 3, *SIZE).contiguous(memory_format=torch.channels_last)

    def is_usual():
        return model.decode_head(model.extract_feat(image)).is_contiguous()

    assert not is_usual()
    handle = use_channels_last(model)
    assert is_usual()
    handle.remove()
    assert not is_usual()
