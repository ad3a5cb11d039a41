"""CudaGraphHook: networks compiled as a GPU would have them in graphs, here without the graphs."""
import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from tiny_training import SIZE, build, samples, train

from mmseg_kn.engine.cuda_graph_hook import CudaGraphHook, use_cuda_graphs

# What reduce-overhead puts before inductor, without a C++ compiler's minutes.
TRACED = dict(backend='aot_eager', fullgraph=True)


class Look(Hook):
    """Notes whether the networks are compiled while they train."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.compiled = ['forward' in vars(part) for part in (
            runner.model.backbone, runner.model.decode_head)]


def test_a_training_is_the_same_and_leaves_no_trace(tmp_path):
    usual = build(dropout_p=0.05)
    other, look = copy.deepcopy(usual), Look()
    train(usual, tmp_path / 'usual')
    train(other, tmp_path / 'other', graphs=dict(type='CudaGraphHook', **TRACED),
          stem=dict(type='StemSignalHook', interval=1), look=look)
    assert look.compiled == [True, True]
    assert not any('forward' in vars(module) for module in other.modules())
    assert other.state_dict().keys() == usual.state_dict().keys()
    for (name, one), two in zip(usual.named_parameters(), other.parameters(), strict=True):
        assert (one - two).norm() <= 1e-4 * one.norm(), name


def test_each_call_draws_other_dropout_and_evaluation_stays_eager(monkeypatch):
    net = build(dropout_p=0.05)
    x, calls = torch.rand(2, 3, *SIZE), []
    compile_ = torch.compile

    def counted(function, **options):
        compiled = compile_(function, **options)
        return lambda *args: calls.append(function.__self__) or compiled(*args)

    monkeypatch.setattr(torch, 'compile', counted)
    handle = use_cuda_graphs(net, **TRACED)
    first, second = (net.train().backbone(x)[-1] for _ in range(2))
    assert calls == [net.backbone] * 2 and not torch.equal(first, second)
    with torch.no_grad():
        evaluated = net.eval()(x, mode='tensor')
        assert len(calls) == 2
        handle.remove()
        use_cuda_graphs(net, training=False, **TRACED)
        again = net(x, mode='tensor')
        assert (again - evaluated).norm() <= 1e-4 * evaluated.norm()
    assert calls[2:] == [net.backbone, net.decode_head]


def test_the_loss_calls_the_compiled_heads(monkeypatch):
    """mmseg calls ``head.forward``, not the head: nn.Module.compile would not see it."""
    net, called = build(), []
    monkeypatch.setattr(torch, 'compile', lambda function, **options: (
        lambda *args: called.append(function.__self__) or function(*args)))
    use_cuda_graphs(net)
    data = net.data_preprocessor(dict(
        inputs=[s['inputs'] for s in samples()[:2]],
        data_samples=[s['data_samples'] for s in samples()[:2]]), training=True)
    net.train().loss(data['inputs'], data['data_samples'])
    assert called == [net.backbone, net.decode_head]


def test_what_cannot_be_compiled_is_refused():
    class Other(BaseModel):
        def forward(self, inputs, data_samples=None, mode='tensor'):
            return inputs

    with pytest.raises(ValueError, match="one of .'backbone', .* got Other; call torch.compile"):
        use_cuda_graphs(Other())


def test_sharded_models_are_refused(tmp_path):
    class Sharded(torch.nn.Module):
        pass

    net = build()
    net.backbone.add_module('shard', Sharded())
    hook = CudaGraphHook()
    hook.SHARDED = Sharded
    with pytest.raises(ValueError, match='FSDP exchanges .* leave CudaGraphHook out'):
        hook.before_train(SimpleNamespace(model=net, optim_wrapper=SimpleNamespace()))


@pytest.mark.parametrize('several', [False, True])
def test_gradients_of_several_iterations_are_refused(several):
    net = build()
    wrapper = OptimWrapper(torch.optim.SGD(net.parameters(), 0.1), accumulative_counts=4)
    if several:
        wrapper = OptimWrapperDict(whole=wrapper)
    with pytest.raises(ValueError, match='got accumulative_counts=4 .* CudaGraphHook out'):
        CudaGraphHook().before_train(SimpleNamespace(model=net, optim_wrapper=wrapper))
    assert 'forward' not in vars(net.backbone)


def test_graphs_are_what_is_asked_for_by_default(monkeypatch):
    options = []
    monkeypatch.setattr(torch, 'compile',
                        lambda function, **given: options.append(given) or function)
    use_cuda_graphs(build())
    assert options == [dict(mode='reduce-overhead')] * 2
    assert CudaGraphHook().options == {}
