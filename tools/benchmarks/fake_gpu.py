"""A GPU that is not there: Triton specialises and compiles for it, and launches nothing.

Triton asks its driver which GPU there is and how to launch. :class:`FakeDriver` answers compute
capability 9.0, and its launcher only notes what would run. So Triton's own binder chooses the
variants that a training would, on tensors of any device: on the meta device at full size, or on
the CPU where the host's time is wanted.

Machine code is read with the tools in Triton's wheel. A process of its own is needed, without
TRITON_INTERPRET.
"""
import re
import subprocess
import tempfile
from collections import defaultdict
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from mmseg_kn.ops.memory_format import is_channels_last

CAPABILITY = (9, 0)
THREADS = 32  # of a warp


class Launch(NamedTuple):
    """One launch of a variant."""

    source: object
    values: tuple  # of its arguments, last

    @property
    def kernel(self) -> str:
        return self.source.fn.__name__

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By argument."""
        names = self.source.fn.arg_names
        return {name: value for name, value in zip(names, self.values[-len(names):], strict=True)
                if isinstance(value, Tensor)}


class _Utils:
    """What Triton asks of a device before a first launch."""

    @staticmethod
    def get_device_properties(device):
        return dict(max_shared_mem=227 * 1024, multiprocessor_count=132)

    @staticmethod
    def load_binary(name, kernel, shared, device):
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads

    @staticmethod
    def unload_module(module):
        pass


class FakeDriver:
    """``launches`` is the list of what was launched since it was last cleared, None for none."""

    utils = _Utils()

    def __init__(self) -> None:
        self.launches: list[Launch] | None = []

    def launcher_cls(self, source, metadata):
        def launch(*args):
            if self.launches is not None:
                self.launches.append(Launch(source, args))

        return launch

    @staticmethod
    def get_current_target():
        return GPUTarget('cuda', CAPABILITY[0] * 10 + CAPABILITY[1], THREADS)

    @staticmethod
    def get_current_device():
        return 0

    @staticmethod
    def get_current_stream(device=None):
        return 0

    @staticmethod
    def get_device_capability(device=0):
        return CAPABILITY

    @staticmethod
    def get_active_torch_device():
        return torch.device('cpu')


def install() -> FakeDriver:
    """Makes this process believe in the GPU, and every ``impl='triton'`` run on any device."""
    from mmseg_kn.ops import dispatch, triton_passes
    if triton_passes.INTERPRETED:
        raise RuntimeError('triton interprets its kernels here; run with TRITON_INTERPRET=0')
    driver = FakeDriver()
    triton.runtime.driver.set_active(driver)
    dispatch._triton_obstacle = lambda device, dtype: None
    return driver


def _as_cudnn(out: Tensor | None, operands: list[Tensor]) -> Tensor | None:
    """The result of a convolution on the meta device in the memory format that cuDNN gives it."""
    if out is None or out.dim() != 4 or not any(map(is_channels_last, operands)):
        return out
    return out.contiguous(memory_format=torch.channels_last)


class Operations(TorchDispatchMode):
    """Records torch's operations: those that run something on a GPU, and all that it is asked.

    Views and allocations run nothing there, but cost the host's time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []
        self.run: list[tuple[str, int]] = []  # name, bytes read and written

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ('convolution', 'convolution_backward'):
            operands = [t for t in args[:3] if isinstance(t, Tensor)]
            out = torch.utils._pytree.tree_map(lambda t: _as_cudnn(t, operands), out)
        if name == 'promote_types':  # of dtypes
            return out
        self.all.append(name)
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not views and not name.startswith(('empty', 'new_empty', 'detach')):
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out))
                       if isinstance(t, Tensor)]
            self.run.append((name, sum(t.nbytes for t in tensors)))
        return out


def variants_asked(call) -> set[tuple[str, str]]:
    """(kernel, specialisation) of every variant that ``call`` would compile; nothing is."""
    found, hooks = set(), triton.knobs.runtime

    def hook(**given):
        found.add((given['fn'].name, given['compile']['key']))
        return True  # means: it is compiled elsewhere

    before, hooks.jit_cache_hook = hooks.jit_cache_hook, hook
    try:
        call()
    finally:
        hooks.jit_cache_hook = before
    return found


def compiled_variants(*kernels) -> list:
    """What was compiled so far of each kernel."""
    return [variant for kernel in kernels for caches in kernel.device_caches.values()
            for variant in caches[0].values()]


def _tool(name: str, cubin: bytes, *options: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True,
                              check=True).stdout


def resources(variant) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: spilled ones, as nothing else lies there."""
    report = _tool('cuobjdump', variant.asm['cubin'], '-res-usage')
    return tuple(int(re.search(rf'{what}:(\d+)', report)[1]) for what in ('REG', 'STACK'))


def access_bits(variant) -> dict[str, set[int]]:
    """By pointer argument, the widths of a thread's loads and stores in bits.

    An address in PTX is followed back to the argument that it started from.
    """
    names = [name for name, kind in variant.src.signature.items() if kind != 'constexpr']
    origin, found = {}, defaultdict(set)
    for line in variant.asm['ptx'].splitlines():
        if match := re.search(r'ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\]', line):
            if int(match[2]) < len(names):
                origin[match[1]] = names[int(match[2])]
        elif match := re.search(r'(?:ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\s.*?\[ ?(%rd\d+)',
                                line):
            if match[3] in origin:
                found[origin[match[3]]].add(int(match[1] or 1) * int(match[2]))
        elif match := re.search(r'\s(?:add|mad|cvta|mov|selp)\S*\s+(%rd\d+), (.*);', line):
            for register in re.findall(r'%rd\d+', match[2]):
                if register in origin:
                    origin.setdefault(match[1], origin[register])
    return dict(found)


def largest_loop(variant) -> list[str]:
    """The opcodes of a variant's largest loop: what a branch back to a label encloses."""
    code, labels, loops = [], {}, []
    for line in _tool('nvdisasm', variant.asm['cubin'], '-c').splitlines():
        if match := re.match(r'\s*(\.L_\w+):', line):
            labels[match[1]] = len(code)
        elif match := re.match(r'\s*/\*[0-9a-f]+\*/\s+(.*?);', line):
            code.append(match[1])
            target = re.search(r'BRA\S*.*`\((\.L_\w+)\)', match[1])
            if target and labels.get(target[1], len(code)) < len(code) - 1:
                loops.append(code[labels[target[1]]:])
    opcodes = [re.sub(r'^@!?U?P\w+\s+', '', line).split()[0] for line in max(loops, key=len)]
    return [opcode for opcode in opcodes if opcode != 'NOP']


def moved_bits(opcodes: list[str]) -> int:
    """What these load from global memory, of one thread."""
    return sum(next((int(n) for n in re.findall(r'\.[US]?(8|16|64|128)\b', opcode)), 32)
               for opcode in opcodes if opcode.startswith('LDG'))


def constants(variant) -> dict[str, object]:
    """Of the constexpr arguments of a variant, and of those that are None."""
    return {variant.src.fn.arg_names[path[0]]: value
            for path, value in variant.src.constants.items()}
