"""Two processes with one image each compute what one process computes with both."""
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from mmseg_kn import KNResNet


def gradients(net, images, parameters):
    sum(y.mean() for y in net(images)).backward()
    return [p.grad for p in parameters]


def make_net():
    torch.manual_seed(0)
    return KNResNet(18, out_indices=(0, 1), dropout_p=0., zero_init_residual=False).double()


def make_images():
    return torch.rand(2, 3, 32, 40, dtype=torch.float64, generator=torch.manual_seed(1))


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    net = DistributedDataParallel(make_net())
    result = gradients(net, make_images()[rank:rank + 1], net.parameters())
    torch.save(result, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(one_of_two, (str(tmp_path), ), nprocs=2)
    net = make_net()
    expected = gradients(net, make_images(), net.parameters())
    for rank in range(2):
        for a, b in zip(torch.load(tmp_path / f'{rank}.pt'), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
