"""Checks sizes of files, imports, public names, the README's length and what the wheel holds.

    python tools/dev/check_house.py

One line for each check; the exit status is 1 if any fails. It needs the environment of the
tests, because it imports the package and builds the wheel.
"""
import ast
import sys
import tempfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests/helpers')]

MAX_LINES = 300
MAX_ROOT_FILES = 6
MAX_README_WORDS = 900
TOP_FOLDERS = {'configs', 'docs', 'mmseg_kn', 'tests', 'tools'}


def module_name(path: Path, root: Path) -> str:
    """mmseg_kn/ops/__init__.py -> mmseg_kn.ops"""
    parts = path.relative_to(root).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def python_files(root: Path, folder: str) -> list[Path]:
    return sorted((root / folder).rglob('*.py'))


def imports(path: Path, root: Path, modules: Iterable[str] = ()) -> set[str]:
    """The modules that ``path`` imports, also inside of functions.

    ``from a import b`` is an import of a.b if ``modules`` has that, else of a. A package that is
    imported on the way to one of its modules does not count: otherwise each module of a package
    that re-exports would be in a circle with it.
    """
    here = module_name(path, root).split('.')
    package = here if path.name == '__init__.py' else here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            source = '.'.join([*above, *([node.module] if node.module else [])])
            inner = {f'{source}.{alias.name}' for alias in node.names}
            found |= inner & set(modules)
            if not inner <= set(modules):
                found.add(source)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """A circle of imports for each module that closes one; none if imports run one way."""
    found, done = [], set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module):], module])
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


# Each check returns what it found, and its faults.


def check_sizes(root: Path) -> tuple[str, list[str]]:
    lines = {path.relative_to(root).as_posix(): len(path.read_text().splitlines())
             for path in python_files(root, 'mmseg_kn')}
    longest = max(lines, key=lines.get)
    return (f'{len(lines)} files in mmseg_kn, the longest {longest} with {lines[longest]} lines',
            [f'{name} has {count} lines, more than {MAX_LINES}'
             for name, count in lines.items() if count > MAX_LINES])


def check_package_root(root: Path) -> tuple[str, list[str]]:
    files = sorted(path.name for path in (root / 'mmseg_kn').iterdir() if path.is_file())
    return (f"{len(files)} files at mmseg_kn's root: {', '.join(files)}",
            [f'more than {MAX_ROOT_FILES}'] if len(files) > MAX_ROOT_FILES else [])


def check_top_folders(root: Path) -> tuple[str, list[str]]:
    ignored = [line.strip('/') for line in (root / '.gitignore').read_text().split()]
    folders = {path.name for path in root.iterdir()
               if path.is_dir() and not path.name.startswith('.')
               and not any(fnmatch(path.name, pattern) for pattern in ignored)}
    return (f"top folders: {', '.join(sorted(folders))}",
            [f'{name} is new' for name in sorted(folders - TOP_FOLDERS)]
            + [f'{name} is gone' for name in sorted(TOP_FOLDERS - folders)])


def check_circles(root: Path) -> tuple[str, list[str]]:
    files = {module_name(path, root): path for path in python_files(root, 'mmseg_kn')}
    graph = {name: (imports(path, root, files) & set(files)) - {name}
             for name, path in files.items()}
    count = sum(map(len, graph.values()))
    return (f'{count} imports among {len(graph)} modules of mmseg_kn',
            [f"circle: {' -> '.join(circle)}" for circle in circles(graph)])


def check_foreign_imports(root: Path) -> tuple[str, list[str]]:
    """ops/ imports torch and itself; only privacy opacus; only ops/triton_*.py triton."""
    faults, ops = [], 0
    for path in python_files(root, 'mmseg_kn'):
        name = path.relative_to(root).as_posix()
        in_ops = name.startswith('mmseg_kn/ops/')
        ops += in_ops
        for target in sorted(imports(path, root)):
            first = target.split('.')[0]
            if first == 'triton':
                allowed = fnmatch(name, 'mmseg_kn/ops/triton_*.py')
            elif first == 'opacus':
                allowed = name.startswith('mmseg_kn/privacy/')
            elif in_ops:
                allowed = (first == 'torch' or first in sys.stdlib_module_names
                           or f'{target}.'.startswith('mmseg_kn.ops.'))
            else:
                allowed = True
            if not allowed:
                faults.append(f'{name} imports {target}')
    return f'{ops} files in ops import torch alone, opacus is in privacy, triton in ops', faults


def check_tests(root: Path) -> tuple[str, list[str]]:
    tests = python_files(root, 'tests')
    names = {path.stem for path in tests if path.stem.startswith('test_')} | {'conftest', 'tests'}
    faults = [f'{path.relative_to(root)} imports {target}' for path in tests
              for target in sorted(imports(path, root)) if names & set(target.split('.'))]
    # Both are imported by their bare names, in one process.
    tools = {path.stem for path in python_files(root, 'tools')}
    faults += [f'{path.relative_to(root)} is named as a file in tools' for path in tests
               if path.parent.name == 'helpers' and path.stem in tools]
    return f'{len(tests)} files in tests, none imports a test or is named as a tool', faults


def check_readme(root: Path) -> tuple[str, list[str]]:
    words = len((root / 'README.md').read_text().split())
    return (f'README.md has {words} words',
            [f'more than {MAX_README_WORDS}'] if words > MAX_README_WORDS else [])


def check_names(root: Path) -> tuple[str, list[str]]:
    from public_names import lost_names
    return 'the names that users hold', [f'{name} is lost' for name in lost_names()]


def check_wheel(root: Path) -> tuple[str, list[str]]:
    from wheels import build_wheel, copy_sources, wheel_faults
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(copy_sources(Path(folder, 'sources')), Path(folder))
        return (f'{wheel.name} of {wheel.stat().st_size // 1000} kB: configs, tools without the '
                'renderer, py.typed', wheel_faults(wheel))


CHECKS = [check_sizes, check_package_root, check_top_folders, check_circles,
          check_foreign_imports, check_tests, check_readme, check_names, check_wheel]


def main() -> int:
    failed = False
    for check in CHECKS:
        found, faults = check(ROOT)
        print(f"{'FAIL' if faults else 'ok':4} {'; '.join([found, *faults])}", flush=True)
        failed = failed or bool(faults)
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
