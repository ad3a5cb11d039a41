"""Damaged and crafted checkpoints: each loads or is refused by name; none runs, hangs or swells.

The files are made from fixed seeds and read in one process of its own, so that a crash, a hang or
a hunger for memory is seen and has the file's name.
"""
import faulthandler
import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from mmengine.runner import CheckpointLoader
from program import ROOT
from runners import message_hub, tiny_runner

from mmseg_kn.engine.safe_checkpoint_hook import damage_of

LIMIT_S = 60  # for one file, far above what any takes
GROWTH_MIB = 64  # the largest file has 1 MiB

# Pickles, byte by byte


def text(value):
    value = value.encode()
    return b'X' + struct.pack('<I', len(value)) + value


def call(module, name, *args):
    """GLOBAL, arguments, REDUCE."""
    return f'c{module}\n{name}\n('.encode() + b''.join(args) + b'tR'


def program(body):
    return b'\x80\x02' + body + b'.'


def number(value):
    data = pickle.encode_long(value)
    return b'\x8a' + bytes([len(data)]) + data


def doubled(opcode, times, leaf, empty=b''):
    """A container that holds one container twice, that one another twice, and so on."""
    levels = (empty + b'(h%ch%c' % (i, i) + opcode + b'q%c' % (i + 1) for i in range(times))
    return leaf + b'q\0' + b''.join(levels)


COMMANDS = {  # module.name and its arguments, each a way to run the text
    'os.system': lambda c: call('os', 'system', text(f'touch {c}')),
    'posix.system': lambda c: call('posix', 'system', text(f'touch {c}')),
    'os.popen': lambda c: call('os', 'popen', text(f'touch {c}')),
    'subprocess.call': lambda c: call('subprocess', 'call', b'(' + text('touch') + text(c) + b't'),
    'subprocess.Popen': lambda c: call('subprocess', 'Popen',
                                       b'(' + text('touch') + text(c) + b't'),
    'subprocess.getoutput': lambda c: call('subprocess', 'getoutput', text(f'touch {c}')),
    'pty.spawn': lambda c: call('pty', 'spawn', b'(' + text('touch') + text(c) + b't'),
    'builtins.eval': lambda c: call('builtins', 'eval', text(f'open({c!r}, "w")')),
    '__builtin__.eval': lambda c: call('__builtin__', 'eval', text(f'open({c!r}, "w")')),
    'builtins.exec': lambda c: call('builtins', 'exec', text(f'open({c!r}, "w")')),
    'builtins.open': lambda c: call('builtins', 'open', text(c), text('w')),
    'io.open': lambda c: call('io', 'open', text(c), text('w')),
    'builtins.__import__': lambda c: call('builtins', '__import__', text('antigravity')),
    'builtins.compile': lambda c: call('builtins', 'compile', text('1'), text(c), text('exec')),
    'builtins.getattr': lambda c: call('builtins', 'getattr', b'ctorch\nTensor\n', text('mean')),
    'builtins.map': lambda c: call('builtins', 'map', b'cos\nsystem\n', text(c)),
    'importlib.import_module': lambda c: call('importlib', 'import_module', text('antigravity')),
    'runpy.run_path': lambda c: call('runpy', 'run_path', text(c)),
    'timeit.timeit': lambda c: call('timeit', 'timeit', text(f'open({c!r}, "w")')),
    'cProfile.run': lambda c: call('cProfile', 'run', text(f'open({c!r}, "w")')),
    'pickle.loads': lambda c: call('pickle', 'loads', text('cos\nsystem\n')),
    'ctypes.CDLL': lambda c: call('ctypes', 'CDLL', text('libc.so.6')),
    'shutil.copyfile': lambda c: call('shutil', 'copyfile', text(__file__), text(c)),
    'functools.partial': lambda c: call('functools', 'partial', b'cos\nsystem\n', text(c)),
    'operator.attrgetter': lambda c: call('operator', 'attrgetter', text('system')),
    'types.FunctionType': lambda c: call('types', 'FunctionType'),
    'numpy.load': lambda c: call('numpy', 'load', text(c), b'N\x88'),
    'numpy.ndarray.tofile': lambda c: call('numpy', 'ndarray.tofile', text(c)),
    'numpy.memmap': lambda c: call('numpy', 'memmap', text(c), text('u1'), text('w+'),
                                   b'K\x00\x85K\x01\x85'),
    'torch.load': lambda c: call('torch', 'load', text(c)),
    'torch.save': lambda c: call('torch', 'save', b'K\x01', text(c)),
    'torch.hub.load': lambda c: call('torch.hub', 'load', text('a/b'), text('c')),
    'torch.jit.load': lambda c: call('torch.jit', 'load', text(c)),
    'torch.from_file': lambda c: call('torch', 'from_file', text(c), b'\x88K\x01'),
    'torch.storage._load_from_bytes': lambda c: call('torch.storage', '_load_from_bytes', text(c)),
    'torch.utils.cpp_extension.load': lambda c: call('torch.utils.cpp_extension', 'load'),
    'mmengine.config.config.Config.fromstring': lambda c: call(
        'mmengine.config.config', 'Config.fromstring', text(f'open({c!r}, "w")'), text('.py')),
    'mmengine.fileio.io.dump': lambda c: call('mmengine.fileio.io', 'dump', b'K\x01', text(c)),
    'mmseg_kn.stack._import_stack': lambda c: call('mmseg_kn.stack', '_import_stack'),
}


def opcodes(canary):
    """Each opcode that makes, calls or refers to things, on its own."""
    command = text(f'touch {canary}')
    name = b'cos\nsystem\n'
    return {
        'STACK_GLOBAL': b'\x8c\x02os\x8c\x06system\x93' + command + b'\x85R',
        'INST': b'(' + command + b'ios\nsystem\n',
        'OBJ': b'(' + name + command + b'o',
        'NEWOBJ': name + command + b'\x85\x81',
        'NEWOBJ_EX': name + command + b'\x85}\x92',
        'NEWOBJ of a function': b'c_codecs\nencode\n' + command + b'\x85\x81',
        'BUILD of a class': b'ccollections\nOrderedDict\n}' + text('a') + b'K\x01sb',
        'BUILD by name': call('collections', 'OrderedDict') + b'}' + text('get') + name + b'sb',
        'BUILD of a dict': b'}}' + text('a') + b'K\x01sb',
        'EXT1': b'\x82\x01', 'EXT2': b'\x83\x01\x00', 'EXT4': b'\x84\x01\x00\x00\x00',
        'PERSID': b'Pstorage\n', 'BINPERSID of text': text('storage') + b'Q',
        'BINPERSID of a module': b'(' + text('module') + name + b'tQ',
        'BINPERSID of a command': b'(' + text('storage') + name + text('0') + text('cpu')
                                  + b'K\x01tQ',
        'BINPERSID of nothing': b'(' + text('storage') + b'tQ',
        'BINPERSID of a number': b'K\x07Q',
        'NEXT_BUFFER': b'\x97', 'READONLY_BUFFER': b'\x97\x98',
        'BYTEARRAY8': b'\x96' + struct.pack('<Q', 2**40),
        'BINUNICODE8': b'\x8d' + struct.pack('<Q', 2**40),
        'BINBYTES8': b'\x8e' + struct.pack('<Q', 2**62), 'FRAME': b'\x95' + b'\xff' * 8,
        'LONG4': b'\x8b' + struct.pack('<i', 2**31 - 1), 'BINUNICODE': b'X\xff\xff\xff\xff',
        'negative LONG4': b'\x8b' + struct.pack('<i', -5),
        'FROZENSET': b'(\x91', 'ADDITEMS': b'\x8f(K\x01\x90', 'DUP': b'K\x012', 'POP': b'K\x010',
        'STRING': b"S'a'\n", 'INT': b'I1\n', 'FLOAT': b'F1\n', 'GET': b'g0\n', 'PUT': b'K\x01p0\n',
        'empty stack': b'R', 'no mark': b't', 'no memo': b'h\x07', 'no stop': b'K\x01'[:-1],
        'SETITEM of a tensor': call('torch', 'Tensor', b'K\x03') + b'K\x00K\x01s',
        'APPEND to a tuple': b')K\x01a',
        'REDUCE of text': command + b')R',
        'REDUCE of an OrderedDict': call('collections', 'OrderedDict') + b')R',
    }


def crafted(canary):
    """Allowed parts, put together in ways that torch.save does not."""
    ordered = call('collections', 'OrderedDict')
    history = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
    state = b'}(' + text('max_length') + b'K\x02' + text('_log_history') + b']' + text(
        '_count_history') + b']u'
    return {
        'own get': ordered + b'}' + text('get') + b'ctorch\nTensor\nsb',
        'own items in state_dict': b'}' + text('state_dict') + ordered + b'}' + text('items')
                                   + b'ctorch\nSize\nsbs',
        'own get in metadata': b'}' + text('state_dict') + ordered + b'}' + text('_metadata')
                               + ordered + b'}' + text('get') + b'ctorch\nSize\nsbsbs',
        'history of a list': history + b'(' + doubled(b'e', 40, b']', b']') + b'h\x28tR',
        'history without state': history + b')R',
        'history with a method': history + b')R' + state + text('mean') + b'ctorch\nSize\nsb',
        'history of all': history + b')R' + state + text('statistics_methods')
                          + b'cbuiltins\neval\nsb',
        'bytes by number': call('builtins', 'bytes', number(2**36)),
        'bytes by a small number': call('builtins', 'bytes', number(2**28)),
        'lists, doubled': doubled(b'e', 60, b']', b']'),
        'dicts, doubled': b'}q\x00' + b''.join(
            b'}(K\x00h' + bytes([i]) + b'K\x01h' + bytes([i]) + b'uq' + bytes([i + 1])
            for i in range(60)),
        'tuples, doubled': doubled(b't', 60, b')'),
        'a list in itself': b']q\x00h\x00a',
        'a dict in itself': b'}q\x00K\x00h\x00s',
        'lists, deep': b']' * 100000 + b'a' * 99999,
        'tuples, deep': b')' + b'\x85' * 100000,
        'escape codes in a name': b'cevil\n\x1b[2J\x1b]0;owned\x07\n)R',
        'a long name': b'c' + b'a' * 2**12 + b'\nb\n)R',
        'a name in surrogates': b'ca\nb\xed\xa0\x80\n)R',
        'a long key': b'}' + text('k' * 2**20) + b'h\x09s',
        'dtype': call('numpy', 'dtype', text('O')),
        'dtype without size': call('numpy', 'dtype', text('U' + '9' * 30)),
        'scalar of nothing': call('numpy.core.multiarray', 'scalar', b'N', text('')),
        'array without state': call('numpy.core.multiarray', '_reconstruct',
                                    b'cnumpy\nndarray\nK\x00\x85' + text('b')),
        'sparse': call('torch._utils', '_rebuild_sparse_tensor', b'N', b'N'),
        'huge tensor class': call('torch', 'Tensor', number(2**60)),
        'a set of lists': call('builtins', 'set', b'(]]t'),
        'type': call('torch._tensor', '_rebuild_from_type_v2',
                     b'ctorch\nSize\nctorch\nTensor\n)}'),
        'bytearray by number': call('builtins', 'bytearray', number(2**60)),
    }


# Files


def zipped(pickled, tensors=(b'\0' * 8,), **changes):
    """A checkpoint as torch.save writes it; ``changes`` by member, None to leave one out."""
    members = {'data.pkl': pickled, 'byteorder': b'little', 'version': b'3\n'}
    members.update((f'data/{i}', data) for i, data in enumerate(tensors))
    members.update(changes)
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name, data in members.items():
            if data is not None:
                archive.writestr(f'archive/{name}', data)
    return file.getvalue()


def legacy(pickled, keys=(), tail=b''):
    """The format before zip: five pickles, then the storages."""
    head = [pickle.dumps(v, 2) for v in (
        0x1950a86a20f9469cfc6c, 1001, dict(protocol_version=1001, little_endian=True,
                                           type_sizes=dict(short=2, int=4, long=4)))]
    return b''.join([*head, pickled, pickle.dumps(list(keys), 2), tail])


def tensor(claimed=2, size=(2, ), key='0', location='cpu', offset=0, last=b''):
    """{'a': tensor} whose storage is said to have ``claimed`` elements."""
    storage = (b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text(key) + text(location)
               + number(claimed) + last + b'tQ')
    shape = b'(' + b''.join(map(number, size)) + b't'
    return program(b'}' + text('a') + call(
        'torch._utils', '_rebuild_tensor_v2', storage, number(offset), shape,
        b'(' + number(1) * len(size) + b't', b'\x89', call('collections', 'OrderedDict')) + b's')


def saved(content, **kwargs):
    file = io.BytesIO()
    torch.save(content, file, **kwargs)
    return file.getvalue()


def flipped(data, positions):
    data = bytearray(data)
    for position, bit in positions:
        data[position] ^= 1 << bit
    return bytes(data)


def mutations(name, data, seed, flips, cuts, inside):
    """Files with one to three flipped bits, half of them in the range ``inside``, and cut ones."""
    draw = random.Random(seed)
    for i in range(flips):
        start, end = inside if i % 2 else (0, len(data))
        spots = [(draw.randrange(start, end), draw.randrange(8)) for _ in range(1 + i % 3)]
        yield f'{name}, flip {i}', flipped(data, spots)
    for i in range(cuts):
        yield f'{name}, cut {i}', data[:draw.randrange(len(data))]


def archives(good, bad):
    """Members left out, doubled, renamed, resized and compressed."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}

    def packed(*members, compression=zipfile.ZIP_STORED):
        file = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(
                file, 'w', compression, compresslevel=9) as archive:
            warnings.simplefilter('ignore')  # names that occur twice
            for name, data in members:
                archive.writestr(name, data)
        return file.getvalue()

    items, pickled = list(members.items()), next(n for n in members if n.endswith('data.pkl'))
    for name in members:
        yield f'without {name}', packed(*(i for i in items if i[0] != name))
        yield f'empty {name}', packed(*((n, b'' if n == name else d) for n, d in items))
        yield f'longer {name}', packed(*((n, d + b'\0' * 99 * (n == name)) for n, d in items))
    yield 'good, then bad', packed(*items, (pickled, bad))
    yield 'bad, then good', packed((pickled, bad), *items)
    yield 'another folder', packed(*items, ('other/data.pkl', bad))
    yield 'bad in another folder first', packed(('other/data.pkl', bad), *items)
    yield 'upwards', packed(*((f'../../{n}', d) for n, d in items))
    yield 'rooted', packed(*((f'/{n}', d) for n, d in items))
    yield 'renamed', packed(*((n.upper(), d) for n, d in items))
    yield 'script', packed(*items, (pickled.replace('data.pkl', 'constants.pkl'), bad))
    yield 'compressed', packed(*items, compression=zipfile.ZIP_DEFLATED)
    bomb = [(pickled, program(b'}')), ('archive/version', b'3\n')]
    zeros = b'\0' * (128 * 2**20)
    yield 'bomb, pickle', packed((pickled, zeros), compression=zipfile.ZIP_DEFLATED)
    yield 'bomb, storage', packed(
        ('archive/data.pkl', tensor(claimed=2**25, size=(2**25, ))), ('archive/data/0', zeros),
        ('archive/version', b'3\n'), compression=zipfile.ZIP_DEFLATED)
    yield 'bomb, version', packed(*bomb[:1], ('archive/version', zeros),
                                  compression=zipfile.ZIP_DEFLATED)
    # Sizes in the directory at the end, and in both places, that the file does not have.
    at = good.index(b'PK\x01\x02')
    for field, place in (('packed', 20), ('plain', 24), ('offset', 42)):
        yield f'{field} size claimed', (good[:at + place] + struct.pack('<I', 2**31)
                                        + good[at + place + 4:])
    yield 'comment', good[:-2] + struct.pack('<H', 9) + b'a comment'
    yield 'something before', b'#!/bin/sh\n' + good


def files(content, canary):
    """Names and contents of all files; ``content`` is that of a good checkpoint."""
    good, old = saved(content), saved(content, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        info = archive.getinfo(archive.namelist()[0])
        start = info.header_offset + 30 + len(info.filename)
        inside = start, start + info.file_size
    bad = program(COMMANDS['os.system'](canary))
    yield 'good zip', good
    yield 'good legacy', old
    yield from mutations('zip', good, 1, 40, 12, inside)
    # Without tensors: this format names them by their address, another in every run.
    hub = saved(content['message_hub'], _use_new_zipfile_serialization=False)
    yield from mutations('legacy', hub, 2, 24, 8, (100, len(hub) - 20))
    for name, body in opcodes(canary).items():
        yield f'opcode {name}', zipped(program(body))
        yield f'opcode {name}, legacy', legacy(program(body))
    for name, make in COMMANDS.items():
        yield f'command {name}', zipped(program(b'}' + text('meta') + make(canary) + b's'))
    for name, body in crafted(canary).items():
        yield f'crafted {name}', zipped(program(body))
    for name, data in archives(good, bad):
        yield f'archive {name}', data
    yield 'tensor good', zipped(tensor())
    yield 'tensor good, legacy', legacy(tensor(last=b'N'), ['0'], struct.pack('<Qff', 2, 1, 2))
    for name, options in dict(
            more=dict(claimed=3), huge=dict(claimed=2**33), overflow=dict(claimed=2**62 + 2),
            negative=dict(claimed=-2), key=dict(key='7'), upwards=dict(key='../version'),
            location=dict(location='cpv'), command=dict(location='os.system'),
            view=dict(size=(3, )), view_huge=dict(size=(2**33, )), rank=dict(size=(1, ) * 100),
            view_overflow=dict(size=(2**62, 2**62)), size=dict(size=(-2, )),
            offset=dict(offset=1), offset_huge=dict(offset=2**62),
            offset_negative=dict(offset=-1)).items():
        yield f'tensor {name}', zipped(tensor(**options))
        yield f'tensor {name}, legacy', legacy(
            tensor(**options, last=b'N'), [options.get('key', '0')], struct.pack('<Qff', 2, 1, 2))
    yield 'legacy, no storages', legacy(
        tensor(claimed=2**33, size=(2**33, ), last=b'N'))
    for name, key, size in (('other storages', '5', 2), ('size claimed', '0', 2**40)):
        yield f'legacy, {name}', legacy(tensor(last=b'N'), [key], struct.pack('<Qff', size, 1, 2))
    yield 'legacy, bad last', legacy(tensor(last=b'N')).replace(pickle.dumps([], 2), bad)
    yield 'legacy, bad first', bad + legacy(tensor(last=b'N'))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode='w') as archive:
        for name in ('sys_info', 'pickle', 'storages', 'tensors', '../escaped'):
            member = tarfile.TarInfo(name)
            member.size = len(bad)
            archive.addfile(member, io.BytesIO(bad))
    yield 'tar', tar.getvalue()
    yield 'gzip', zlib.compress(good)


# Reading


def read(path, runner):
    found = dict(name=path.name)
    for way, load in (('load', lambda: CheckpointLoader.load_checkpoint(str(path))),
                      ('resume', lambda: runner.resume(str(path), map_location='cpu'))):
        try:
            load()
            found[way] = ['loaded', '']
        except Exception as error:
            found[way] = [type(error).__name__, str(error)]
    found['damage'] = damage_of(path)
    return found


def peak_mib():
    """The most memory that this process had; getrusage would tell its parent's too."""
    status = Path('/proc/self/status')
    return int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text())[1]) // 1024 if (
        status.exists()) else None


def read_all(folder, limit_s=LIMIT_S):
    """Reads folder/*.pth by order of name in this process, and writes to folder/report.

    A line with the name before each file, then one with what came of it, and the largest memory
    of the process until then, in MiB.
    """
    folder = Path(folder)
    runner = tiny_runner(folder / 'work', 4)
    with open(folder / 'report', 'a') as report:
        for path in sorted(folder.glob('*.pth')):
            print(json.dumps(path.name), file=report, flush=True)
            faulthandler.dump_traceback_later(limit_s, exit=True)
            found = read(path, runner)
            faulthandler.cancel_dump_traceback_later()
            found['mib'] = peak_mib()
            found['ran'] = (folder / 'canary').exists()
            print(json.dumps(found), file=report, flush=True)


@pytest.fixture(scope='module')
def reports(tmp_path_factory):
    """What came of each file, by its name."""
    folder = tmp_path_factory.mktemp('hostile')
    torch.manual_seed(0)
    trained = tiny_runner(folder / 'work', 2, randomness=dict(seed=0))
    trained.train()
    content = CheckpointLoader.load_checkpoint(str(folder / 'work/iter_2.pth'))
    # Without times and paths, so that the flipped bits are the same in every run.
    content['meta'] = {key: content['meta'][key] for key in ('epoch', 'iter', 'seed')}
    content['message_hub'] = message_hub()
    names = {}
    for i, (name, data) in enumerate(files(content, str(folder / 'canary'))):
        names[f'{i:03}.pth'] = name
        (folder / f'{i:03}.pth').write_bytes(data)
    assert len(set(names.values())) == len(names) >= 200
    tests = ROOT / 'tests'
    path = [ROOT, tests, tests / 'checkpoints', tests / 'helpers']
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, path)))
    code = f'import conftest, test_hostile_files; test_hostile_files.read_all({str(folder)!r})'
    done = subprocess.run([sys.executable, '-c', code], env=env, text=True, cwd=folder,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    report = folder / 'report'
    assert report.exists(), done.stderr[-3000:]
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert done.returncode == 0, f'{names[lines[-1]]}: {done.stderr[-3000:]}'
    return {names[found['name']]: found for found in lines[1::2]}


def test_none_runs(reports):
    assert [name for name, found in reports.items() if found['ran']] == []


def test_each_is_loaded_or_refused_by_name(reports):
    def clear(kind, message, file):
        return (kind == 'ValueError' and file in message and message.isprintable()
                and len(message) < 1000)

    refused = {n: found for n, found in reports.items() if found['load'][0] != 'loaded'}
    assert {n: f for n, f in refused.items() if not clear(*f['load'], f['name'])} == {}
    # Runner.resume names a device, which a file's tag for one does not matter to.
    assert {n: f for n, f in refused.items() if not clear(*f['resume'], f['name'])
            and 'load it with map_location' not in f['load'][1]} == {}


def test_damage_is_told_in_plain_text(reports):
    damage = {name: found['damage'] for name, found in reports.items()}
    assert damage['good zip'] is None and 'BadZipFile' in damage['good legacy']
    # What the loader does not unpack is not unpacked for its checksums either.
    refused = {n for n, found in reports.items() if 'members that are' in found['load'][1]}
    assert 'archive bomb, storage' in refused
    assert [n for n in refused if 'members that are' not in damage[n]] == []
    assert [n for n, d in damage.items() if d and not (d.isprintable() and len(d) < 400)] == []


def test_what_must_load_and_what_must_not(reports):
    loaded = {name for name, found in reports.items() if found['load'][0] == 'loaded'}
    assert {'good zip', 'good legacy', 'tensor good', 'tensor good, legacy'} <= loaded
    for name in ('good zip', 'good legacy'):
        assert reports[name]['resume'][0] == 'loaded'
    assert not [name for name in loaded if name.startswith('command ')]
    for name in COMMANDS:
        assert 'was refused' in reports[f'command {name}']['load'][1]
    assert 'compressed' in reports['archive compressed']['load'][1]
    assert 'attributes' in reports['crafted own get']['load'][1]
    assert {'crafted lists, doubled', 'crafted a dict in itself'} <= loaded


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='tells the memory')
def test_memory_is_in_proportion(reports):
    peaks = [found['mib'] for found in reports.values()]
    grown = {name: b - a for name, a, b in zip(list(reports)[1:], peaks, peaks[1:], strict=False)
             if b - a > GROWTH_MIB}
    assert grown == {}
