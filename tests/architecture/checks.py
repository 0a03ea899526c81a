"""House rules as functions: source text in, sentences about violations out. test_checks.py shows that each can fail."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80

# A package may import from packages of its own layer and of lower ones.
LAYERS = (
    ("config",),
    ("accelerators",),
    ("ops",),
    ("mpu",),
    ("model", "data", "tokenizer"),
    ("checkpoint",),
    ("training", "generation"),
    ("launch", "planner"),
)
LAYER = {package: level for level, packages in enumerate(LAYERS) for package in packages}

DEVICE_CODE = ("megatron/accelerators/", "megatron/ops/", "megatron/launch/", "megatron/config/device.py")
DEVICES = ("cuda", "hpu", "npu", "neuron", "xla", "gaudi", "ascend")
VENDOR_PACKAGES = (
    *("apex", "triton", "flash_attn", "transformer_engine", "liger_kernel", "deepspeed", "transformers"),
    *("torch_npu", "habana_frameworks", "torch_neuronx", "neuronx_distributed", "torch_xla", "mindspeed"),
    *("wandb", "matplotlib", "tensorboard"),
)

VENDOR_FAKES = "tests/sim/"
"""Stand-ins for vendors' packages imitate them, their module-level state included."""

_MUTABLE_CALLS = {"list", "dict", "set", "defaultdict", "OrderedDict", "Counter", "deque", "bytearray"}
_MUTATORS = {
    *("append", "extend", "insert", "add", "update", "pop", "popitem", "remove", "discard", "clear"),
    *("setdefault", "sort", "reverse", "appendleft", "popleft"),
}


@dataclass(frozen=True)
class Source:
    """One Python file."""

    path: str
    """Relative to the repository, with forward slashes."""
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @property
    def package(self) -> str:
        """The package of megatron/ this file is in; empty for megatron/__init__.py and files elsewhere."""
        parts = self.path.split("/")
        return parts[1] if parts[0] == "megatron" and len(parts) > 2 else ""

    def at(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


def _imports(source: Source, tree: ast.AST | None = None) -> Iterator[tuple[ast.stmt, str]]:
    """Every imported module (`from a import b` counts as a and as a.b), with the statement."""
    for node in ast.walk(tree or source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = source.path.removesuffix(".py").split("/")[: -node.level]
                base = ".".join([*folder, base] if base else folder)
            yield node, base
            for alias in node.names:
                yield node, f"{base}.{alias.name}"


def import_direction(source: Source) -> list[str]:
    """Imports of a package in a higher layer, of tools or tests, or of anything but the standard library in config/."""
    if not source.path.startswith("megatron/"):
        return []
    found = []
    for node, name in _imports(source):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top in ("tools", "tests", "examples", "pretrain_gpt"):
            found.append(f"{source.at(node)} imports {name}; the package stands on its own")
        if top == "megatron" and target in LAYER and source.package in LAYER and LAYER[target] > LAYER[source.package]:
            found.append(f"{source.at(node)} {source.package} imports {name}, which is in a higher layer")
        if source.package == "config" and top not in sys.stdlib_module_names | {"megatron"}:
            found.append(f"{source.at(node)} config imports {name}; it may use the standard library only")
    return found


def unknown_packages(source: Source) -> list[str]:
    """Packages of megatron/ that have no layer."""
    if source.package and source.package not in LAYER and not source.package.endswith(".py"):
        return [f"{source.path} is in megatron/{source.package}/, which has no place in LAYERS"]
    return []


def device_names(source: Source) -> list[str]:
    """Device names outside device code: a string that is one, an attribute like torch.cuda, a test for "cpu"."""
    if not source.path.startswith("megatron/") or source.path.startswith(DEVICE_CODE):
        return []
    device_string = re.compile(rf"({'|'.join(DEVICES)})(:\d+)?")
    found = []
    choices = _literal_choices(source.tree)
    for node in ast.walk(source.tree):
        if node in choices:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and device_string.fullmatch(node.value):
            found.append(f"{source.at(node)} names the device {node.value!r}")
        elif isinstance(node, ast.Attribute) and node.attr in {*DEVICES, "is_cuda", "is_hpu", "is_npu", "is_xla"}:
            found.append(f"{source.at(node)} uses .{node.attr}")
        elif isinstance(node, ast.Compare) and _mentions_device(node) and _mentions_cpu(node):
            found.append(f'{source.at(node)} branches on the device "cpu"')
    return found


def _literal_choices(tree: ast.Module) -> set[ast.AST]:
    """Constants in `Literal[...]`: what a setting may be (a collective backend is called neuron), not a branch."""
    literals = [n for n in ast.walk(tree) if isinstance(n, ast.Subscript) and ast.unparse(n.value).endswith("Literal")]
    return {part for literal in literals for part in ast.walk(literal.slice)}


def _mentions_cpu(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Constant) and part.value == "cpu" for part in ast.walk(node))


def _mentions_device(node: ast.AST) -> bool:
    """Whether a name in `node` speaks of a compute device; an offload target named "cpu" is no branch on one."""
    names = [getattr(part, "id", "") or getattr(part, "attr", "") for part in ast.walk(node)]
    about = [name for name in names if re.search(r"device|accelerator", name)]
    return bool(about) and not any("offload" in name or name == "remote_device" for name in names)


def mutable_state(source: Source) -> list[str]:
    """`global`, and containers of a module or class that are not constants: not in capitals, or changed somewhere."""
    if source.path.startswith(VENDOR_FAKES):
        return []
    found = [f"{source.at(node)} uses global" for node in ast.walk(source.tree) if isinstance(node, ast.Global)]
    tables = set()
    for statement, scope in _module_and_class_level(source.tree):
        for name, value in _assignments(statement):
            if not _is_mutable(value) or (name.startswith("__") and name.endswith("__")):
                continue
            if scope == "module" and name == name.upper():
                tables.add(name)
            else:
                found.append(f"{source.at(statement)} {name} is a mutable {scope}-level object")
    found += [f"{source.at(node)} changes the constant {name}" for node, name in _mutations(source.tree, tables)]
    return found


def _module_and_class_level(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    for node in tree.body:
        yield node, "module"
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                yield inner, "class"


def _assignments(statement: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets = [statement.target]
    for target in targets:
        if isinstance(target, ast.Name):
            value = statement.value  # type: ignore[attr-defined]
            yield target.id, value


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        called = value.func
        return (called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")) in _MUTABLE_CALLS
    return isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp))


def _mutations(tree: ast.Module, tables: set[str]) -> Iterator[tuple[ast.AST, str]]:
    """Where one of the names in `tables` is changed in place."""
    for node in ast.walk(tree):
        changed: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MUTATORS:
            changed = [node.func.value]
        elif isinstance(node, (ast.Assign, ast.Delete)):
            changed = [target.value for target in node.targets if isinstance(target, ast.Subscript)]
        elif isinstance(node, ast.AugAssign):
            changed = [node.target.value if isinstance(node.target, ast.Subscript) else node.target]
        for expression in changed:
            if isinstance(expression, ast.Name) and expression.id in tables:
                yield node, expression.id


def vendor_imports(source: Source) -> list[str]:
    """Optional packages imported when a module of megatron/ is imported, rather than where they are used."""
    if not source.path.startswith("megatron/"):
        return []
    at_import = ast.Module(body=list(_run_at_import(source.tree.body)), type_ignores=[])
    return [
        f"{source.at(node)} imports {name} at the top; import it where it is used"
        for node, name in _imports(source, at_import)
        if name in VENDOR_PACKAGES or (name.partition(".")[0] in VENDOR_PACKAGES and isinstance(node, ast.Import))
    ]


def _run_at_import(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Import statements executed when the module is: not in functions, not under `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _run_at_import(node.orelse)
        else:
            for name in ("body", "orelse", "finalbody"):
                yield from _run_at_import(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from _run_at_import(handler.body)


def sizes(source: Source) -> list[str]:
    """Files and functions that are too long."""
    lines = len(source.text.splitlines())
    found = [f"{source.path} has {lines} lines; {MAX_FILE_LINES} are allowed"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{source.at(node)} {node.name} has {length} lines; {MAX_FUNCTION_LINES} are allowed")
    return found


_NEEDS_REASON = {"pytest.skip": 1, "pytest.mark.skip": 1, "pytest.mark.skipif": None, "pytest.mark.xfail": None}
"""What leaves a test out -> number of positional arguments that hold a reason; None where only the keyword does."""


def silent_skips(source: Source) -> list[str]:
    """Tests that are skipped, or expected to fail, without saying why."""
    found = []
    called = {node.func for node in ast.walk(source.tree) if isinstance(node, ast.Call)}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and _leaves_out(node.func):
            position = _NEEDS_REASON[ast.unparse(node.func)]
            named = any(keyword.arg == "reason" for keyword in node.keywords)
            if not named and (position is None or len(node.args) < position):
                found.append(f"{source.at(node)} {ast.unparse(node.func)} gives no reason")
        elif _leaves_out(node) and node not in called and ast.unparse(node) != "pytest.skip":
            found.append(f"{source.at(node)} {ast.unparse(node)} gives no reason")
    return found


def _leaves_out(node: ast.AST) -> bool:
    known = isinstance(node, ast.Attribute) and node.attr in ("skip", "skipif", "xfail")
    return known and ast.unparse(node) in _NEEDS_REASON


def unordered_cases(source: Source) -> list[str]:
    """Tests parametrized over a set: its order differs between the processes that share the test run."""
    return [
        f"{source.at(node)} parametrizes over a set; sort it"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "parametrize"
        if len(node.args) > 1 and _is_set(node.args[1])
    ]


def _is_set(value: ast.expr) -> bool:
    if isinstance(value, ast.BinOp) and isinstance(value.op, (ast.Sub, ast.BitAnd, ast.BitOr)):
        return _is_set(value.left) or _is_set(value.right)
    called = value.func if isinstance(value, ast.Call) else None
    return isinstance(value, (ast.Set, ast.SetComp)) or getattr(called, "id", "") in ("set", "frozenset")


def private_paths(source: Source) -> list[str]:
    """Words that belong to a machine or to how the work was organised rather than to the project."""
    private = re.compile(
        r"(^|[^A-Za-z0-9_.])[/](work|farm|root)/|[.][.]/shared\b|\bCONTRACT[.]md|\bDESIGN[.]md|\bDEVELOPERS[.]md"
        r"|(?<![\w/])facts/\w+[.]md|[/]opt[/](wheels|pypi)|-index-(?=url)",
    )
    return [
        f"{source.path}:{number} mentions {match[0].strip()!r}"
        for number, line in enumerate(source.text.splitlines(), start=1)
        if (match := private.search(line))
    ]


def settings_of(source: Source) -> list[tuple[str, str]]:
    """Where and what the settings of a configuration module are: fields made by `option`, `resolved` or `derived`."""
    return [
        (f"{source.at(node)} {holder.name}", node.target.id)
        for holder in ast.walk(source.tree)
        if isinstance(holder, ast.ClassDef)
        for node in holder.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call)
        if ast.unparse(node.value.func) in ("option", "resolved", "derived")
    ]


def unread_settings(sources: Iterable[Source]) -> list[str]:
    """Settings that no module but the one that defines them names, as an attribute or as a key."""
    everything = list(sources)
    definitions = {source.path: settings_of(source) for source in everything}
    named: set[str] = set()
    for source in everything:
        if not definitions[source.path]:
            for node in ast.walk(source.tree):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    named.add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    named.add(node.value)
    defined = [setting for found in definitions.values() for setting in found]
    return [f"{place}.{name} is never read" for place, name in defined if name not in named]


FILE_CHECKS: tuple[Callable[[Source], list[str]], ...] = (
    import_direction,
    unknown_packages,
    device_names,
    mutable_state,
    vendor_imports,
    sizes,
    silent_skips,
    unordered_cases,
)
