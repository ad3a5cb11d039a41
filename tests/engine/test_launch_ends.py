"""Programs that leave their process group to Python's end, as mmengine does."""
import os
import re
import sys

import pytest
from program import execute

ENDS = '''
import os
import sys

import torch
import torch.distributed as dist

import mmseg_kn

torch.set_num_threads(1)


def starve(core):
    """gloo's threads run only while the program waits, so that they hold tensors at its end."""
    for thread in map(int, os.listdir('/proc/self/task')):
        os.sched_setaffinity(thread, {core})
        if thread != os.getpid():
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def program(step, rank):
    store = os.path.abspath(f'store{step}')
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    cores = sorted(os.sched_getaffinity(0))
    dist.barrier()
    starve(cores[rank % len(cores)])
    dist.broadcast_object_list([dict(area=torch.ones(3))] * 2, 0)  # as mmengine shares results


def told():
    print('destroyed', flush=True)


def pair(step, raises=False, patched=False):
    """The exit statuses of two processes; returns only in the parent."""
    children = []
    for rank in range(2):
        children.append(os.fork())
        if not children[-1]:
            program(step, rank)
            if patched:
                dist.destroy_process_group = told
            if raises:
                raise KeyError('of the program')
            return None
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


for step in range(int(sys.argv[1])):
    statuses = pair(step)
    if statuses is None:
        break
    print(statuses, flush=True)
else:
    statuses = pair('raises', raises=True, patched=True)
    if statuses is not None:
        print(statuses, flush=True)
        statuses = pair('ends', patched=True)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_processes_end_with_status_0(tmp_path):
    """Without the end in mmseg_kn.engine.launch about a third of these processes abort.

    One that fails does not destroy its group, for which the others may be waiting.
    """
    (tmp_path / 'ends.py').write_text(ENDS)
    pairs = int(os.environ.get('PAIRS', 4))
    log = execute('ends.py', pairs, cwd=tmp_path)
    *well, failed, first, second = re.findall(r'^\[-?\d+, -?\d+\]$|^destroyed$', log, re.M)
    assert well == ['[0, 0]'] * pairs and first == second == 'destroyed'
    assert '0' not in failed and "KeyError: 'of the program'" in log


HELD = '''
import os

import torch
import torch.distributed as dist
from mmseg_kn.engine import launch

from mmengine.model import MMDistributedDataParallel


def threads():
    names = (open(f'/proc/self/task/{task}/comm').read() for task in os.listdir('/proc/self/task'))
    return sum('gloo' in name for name in names)


class Runner:
    """Refers to itself, as mmengine's does, and holds a model that holds the group."""

    def __init__(self):
        self.me = self
        self.model = MMDistributedDataParallel(torch.nn.Linear(2, 2))
        self.model.module(torch.rand(1, 2)).sum().backward()


dist.init_process_group('gloo', init_method=f'file://{os.path.abspath("store")}', rank=0,
                        world_size=1)
Runner()
print('threads:', threads())
launch._leave_group()
print('threads:', threads())
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_no_thread_of_the_group_is_left(tmp_path):
    """Else one that still holds a tensor aborts the process, as in one of a few trainings."""
    (tmp_path / 'held.py').write_text(HELD)
    before, after = re.findall(r'^threads: (\d+)$', execute('held.py', cwd=tmp_path), re.M)
    assert int(before) > 0 and int(after) == 0
