"""Where the memory of a training step goes: what backward keeps by layer, and the peak."""
from collections import Counter

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def kept_by_layer(module: nn.Module, call, leave_out: tuple[Tensor, ...] = ()) -> Counter:
    """Bytes that backward of ``call()`` keeps, under the name of the layer that keeps them first.

    Every storage counts once. Parameters, buffers and the storages of ``leave_out``, such as the
    input, do not count. What no layer of ``module`` keeps, such as the loss, stands under ''.
    """
    known = {t.untyped_storage().data_ptr()
             for t in (*module.parameters(), *module.buffers(), *leave_out)}
    kept, running = Counter(), ['']

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            alive.append(storage)  # else another map could get its address
            kept[running[-1]] += storage.nbytes()
        return tensor

    def leave(*_):
        running.pop()

    alive, handles = [], []
    for name, layer in module.named_modules():
        handles += [layer.register_forward_pre_hook(lambda *_, name=name: running.append(name)),
                    layer.register_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = call()
    finally:
        for handle in handles:
            handle.remove()
    del result  # until here, so that no graph was freed
    return kept


def peak_bytes(call, device: torch.device) -> int:
    """The most memory that ``call()`` holds above what was there before.

    On a GPU it is what the allocator gave out. On the CPU every allocation and release of torch
    is traced, those inside of operators too.
    """
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events()
              if event.name() == '[memory]']
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
