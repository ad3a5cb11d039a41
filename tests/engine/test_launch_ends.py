"""Programs that leave their process group to Python's end, as mmengine does."""
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


def pair(step):
    """The exit statuses of two processes; returns only in the parent."""
    children = []
    for rank in range(2):
        children.append(os.fork())
        if not children[-1]:
            program(step, rank)
            return None
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


for step in range(int(sys.argv[1])):
    statuses = pair(step)
    if statuses is None:
        break
    print(statuses, flush=True)
'''
RAISES = '''
import torch.distributed as dist

import mmseg_kn

dist.init_process_group('gloo', init_method='file://STORE', rank=0, world_size=1)
dist.destroy_process_group = lambda: print('destroyed')
raise KeyError('of the program')
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_processes_end_with_status_0(tmp_path):
    """Without the end in mmseg_kn.engine.launch about a third of these processes abort."""
    (tmp_path / 'ends.py').write_text(ENDS)
    printed = execute('ends.py', 4, cwd=tmp_path)
    assert printed.splitlines() == ['[0, 0]'] * 4


def test_a_failed_program_does_not_wait_for_the_others(tmp_path):
    (tmp_path / 'raises.py').write_text(RAISES.replace('STORE', f'{tmp_path}/store'))
    printed = execute('raises.py', cwd=tmp_path, check=False)
    assert "KeyError: 'of the program'" in printed and 'destroyed' not in printed
    (tmp_path / 'ends.py').write_text(
        RAISES.replace('STORE', f'{tmp_path}/other').replace('raise', 'pass  #'))
    assert execute('ends.py', cwd=tmp_path).strip() == 'destroyed'
