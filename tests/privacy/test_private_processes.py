"""Two private processes: one model, one noise, the sum of what each clipped."""
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip('opacus')

from private import Net, loss_of, make_input, wrapper_for  # noqa: E402

from mmseg_kn.privacy import MMDPDistributedDataParallel  # noqa: E402

BOUND, SIGMA, BATCH = 0.02, 1.5, 2  # a batch of two on each process


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def big_head():
    torch.manual_seed(0)
    net = Net().double()
    net.head = torch.nn.Conv2d(8, 2000, 3, dtype=torch.double)
    return net


def one_of_two(rank, folder, clipping):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    torch.manual_seed(rank)  # other weights until the wrapper equals them
    net = Net().double()
    MMDPDistributedDataParallel(net)
    start = weights(net)
    wrapper = wrapper_for(net, max_grad_norm=BOUND, batch_size=BATCH, clipping=clipping)
    x = make_input(n=5)
    mine = x[:3] if rank == 0 else x[3:]
    wrapper.update_params(loss_of(net, mine))
    clipped = weights(net)
    if rank == 0:  # one draws nothing, the other two
        wrapper.step_empty()
    else:
        wrapper.update_params(loss_of(net, x[:2]))
    second = weights(net)

    net = big_head()
    before = weights(net)
    noisy = wrapper_for(net, noise_multiplier=SIGMA, max_grad_norm=BOUND, batch_size=BATCH,
                        clipping=clipping)
    noisy.step_empty()
    torch.save(dict(start=start, clipped=clipped, second=second, before=before,
                    after=weights(net), history=noisy.counter.history), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.parametrize('clipping', ['flat', 'ghost'])
def test_two_processes(tmp_path, clipping):
    mp.spawn(one_of_two, (str(tmp_path), clipping), nprocs=2)
    a, b = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    for key in ('start', 'clipped', 'second', 'after'):
        assert all(torch.equal(p, q) for p, q in zip(a[key], b[key], strict=True)), key

    # what one process does with all five samples, and the expected batch of both
    net = Net().double()
    with torch.no_grad():
        for p, value in zip(net.parameters(), a['start'], strict=True):
            p.copy_(value)
    wrapper = wrapper_for(net, max_grad_norm=BOUND, batch_size=2 * BATCH, clipping=clipping)
    x = make_input(n=5)
    wrapper.update_params(loss_of(net, x))
    for p, value in zip(net.parameters(), a['clipped'], strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=1e-14)
    wrapper.update_params(loss_of(net, x[:2]))
    for p, value in zip(net.parameters(), a['second'], strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=1e-14)

    # noise of standard deviation sigma * C in the sum, once and not twice
    noise = torch.cat([(p - q).flatten() for p, q in zip(a['before'], a['after'], strict=True)])
    noise *= 2 * BATCH
    assert abs(noise.std() / (SIGMA * BOUND) - 1) < 5 / math.sqrt(2 * len(noise))
    assert a['history'] == [(SIGMA, 0.5, 1)]
