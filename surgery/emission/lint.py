"""Checks of emitted Python files by reading them: what loading would trip over, and what their headers promise.

Every check is a function from a parsed file to findings; nothing is imported or run. The rules are those of the loaders
(flat files, direct imports), of vLLM's search for attention, and of the promise "no network, no subprocess, no eval, no
file access". The promise is held by a short list of what may be imported, not by a long list of what may not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

MAX_LINES = 400
PROMISE = "No network, no subprocess, no eval, no file access."

INSTALLED_EVERYWHERE = frozenset({"torch", "transformers"})
HARMLESS_LIBRARY = frozenset(
    {
        "__future__", "collections", "contextlib", "contextvars", "copy", "dataclasses", "enum", "functools", "inspect",
        "itertools", "math", "numbers", "operator", "typing", "warnings",
    }
)  # fmt: skip
FORBIDDEN_NAMES = frozenset(
    {
        "__builtins__", "__import__", "breakpoint", "compile", "delattr", "eval", "exec", "exit", "getattr_static",
        "globals", "input", "locals", "open", "quit", "vars",
    }
)  # fmt: skip
# Attributes of torch and of ordinary objects that reach files, processes or the network, or run text.
FORBIDDEN_ATTRIBUTES = frozenset(
    {
        "__globals__", "__subclasses__", "cpp_extension", "from_file", "fromfile", "hub", "load", "load_library",
        "load_state_dict_from_url", "popen", "read_bytes", "read_text", "save", "system", "tofile", "urlopen",
        "write_bytes", "write_text",
    }
)  # fmt: skip
# Parts of a class name by which generate() decides what cache to build.
NAMES_WITH_MEANING = (
    "mamba", "minimax", "reformer", "xlnet", "rwkv", "xlstm", "jamba", "zamba", "bamba", "lfm2",
)  # fmt: skip
RESERVED = frozenset({"per_layer_config"})
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\S+)\s+import|^\s*import\s+\.(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, and where."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    source: str
    tree: ast.Module
    modules: frozenset[str]  # names of the files beside it, without `.py`

    def at(self, node: ast.AST | None, message: str) -> Finding:
        return Finding(self.name, getattr(node, "lineno", 1), message)


def lint(files: Mapping[str, bytes]) -> list[Finding]:
    """All findings in the `.py` files of a checkpoint, by file name; empty for files that keep every rule."""
    modules = frozenset(name.removesuffix(".py") for name in files if name.endswith(".py"))
    findings: list[Finding] = []
    for name in sorted(f"{module}.py" for module in modules):
        source = files[name].decode()
        try:
            file = _File(name, source, ast.parse(source), modules)
        except SyntaxError as error:
            findings.append(Finding(name, error.lineno or 1, f"does not parse: {error.msg}"))
            continue
        findings += [finding for check in CHECKS for finding in check(file)]
    return findings


def relative_imports(file: _File) -> Iterator[Finding]:
    """Flat files, `from .name import x`, and the modeling file imports every helper itself."""
    imported = set()
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        if node.level > 1 or not node.module or "." in node.module:
            yield file.at(node, "relative imports must read `from .name import x`")
        elif node.module not in file.modules:
            yield file.at(node, f"imports .{node.module}, which is not among the files")
        else:
            imported.add(node.module)
    for match in RELATIVE_IMPORT.finditer(file.source):
        found = match[1] or match[2]
        if found not in imported:  # the loader's pattern reads comments and docstrings too
            line = file.source.count("\n", 0, match.end()) + 1
            yield Finding(file.name, line, f"text that the loader takes for an import of .{found}")
    if file.name.startswith("modeling_"):
        helpers = {module for module in file.modules if not module.startswith(("modeling_", "configuration_"))}
        for missing in sorted(helpers - imported):
            yield file.at(None, f"does not import {missing} itself, and older loaders copy only what it imports")


def absolute_imports(file: _File) -> Iterator[Finding]:
    """torch, transformers and a few harmless modules of the standard library, wherever the import stands."""
    allowed = INSTALLED_EVERYWHERE | HARMLESS_LIBRARY
    for node in ast.walk(file.tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] not in allowed:
                yield file.at(node, f"imports {name}, which is not on the list of what may be imported")


def promise(file: _File) -> Iterator[Finding]:
    """The names and attributes that would break the promise."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            yield file.at(node, f"uses {node.id}")
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES:
            yield file.at(node, f"uses .{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*" or alias.name in FORBIDDEN_ATTRIBUTES | FORBIDDEN_NAMES:
                    yield file.at(node, f"imports {alias.name}")
    generated = file.name.startswith(("modeling_", "configuration_"))
    if generated and PROMISE not in (ast.get_docstring(file.tree) or ""):
        yield file.at(None, "the header lacks the promise")


def attention(file: _File) -> Iterator[Finding]:
    """What the layers of every release, and vLLM's reading of the code, ask of an attention class."""
    for kind in (node for node in ast.walk(file.tree) if isinstance(node, ast.ClassDef)):
        forward = next((f for f in kind.body if isinstance(f, ast.FunctionDef) and f.name == "forward"), None)
        if forward is None or not _reads_interface(kind):
            continue
        arguments = {argument.arg for argument in (*forward.args.args, *forward.args.kwonlyargs)}
        for name in sorted({"past_key_values", "past_key_value"} - arguments):
            yield file.at(forward, f"{kind.name}.forward does not accept {name}")
        if forward.args.kwarg is None:
            yield file.at(forward, f"{kind.name}.forward does not end in **kwargs")
        if _mentions(forward, "cache_position"):
            yield file.at(forward, f"{kind.name}.forward names cache_position")
        calls = interface_calls(forward)
        if len(calls) != 1:
            yield file.at(
                forward, f"{kind.name}.forward calls ALL_ATTENTION_FUNCTIONS[...] {len(calls)} times, not once"
            )
        for call in calls:
            if not _plain_scaling(call):
                yield file.at(call, "the attention call needs scaling= with a number or an attribute of self")


def interface_calls(forward: ast.FunctionDef) -> list[ast.Call]:
    """Calls, in `forward`, of local names that hold ALL_ATTENTION_FUNCTIONS[...]: how vLLM finds attention.

    Described in vLLM's transformers backend; `.get_interface(...)` counts as well. Written from the description.
    """
    locals_ = {
        target.id
        for node in ast.walk(forward)
        if isinstance(node, ast.Assign) and _is_interface(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    calls = (node for node in ast.walk(forward) if isinstance(node, ast.Call))
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in locals_]


def reserved_names(file: _File) -> Iterator[Finding]:
    """Names that transformers gives a meaning of its own."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ClassDef):
            for part in NAMES_WITH_MEANING:
                if part in node.name.lower():
                    yield file.at(node, f"class name {node.name} contains {part!r}")
        elif _name_of(node) in RESERVED:
            yield file.at(node, f"uses the reserved name {_name_of(node)}")
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(_name_of(target) == "layer_types" for target in targets):
                yield file.at(node, "assigns layer_types, whose values transformers validates")


def computed_buffers(file: _File) -> Iterator[Finding]:
    """Buffers that no file fills are garbage after loading on the meta device."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and any(keyword.arg == "persistent" for keyword in node.keywords):
            yield file.at(node, "a buffer that is not persistent")


def length(file: _File) -> Iterator[Finding]:
    """Short enough that people read it before they trust it."""
    lines = file.source.count("\n") + 1
    if lines > MAX_LINES:
        yield file.at(None, f"{lines} lines, more than {MAX_LINES}")


CHECKS: tuple[Callable[[_File], Iterator[Finding]], ...] = (
    relative_imports,
    absolute_imports,
    promise,
    attention,
    reserved_names,
    computed_buffers,
    length,
)


def _is_interface(value: ast.expr) -> bool:
    if isinstance(value, ast.Subscript):
        return isinstance(value.value, ast.Name) and value.value.id == "ALL_ATTENTION_FUNCTIONS"
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "get_interface":
        return isinstance(value.func.value, ast.Name) and value.func.value.id == "ALL_ATTENTION_FUNCTIONS"
    return False


def _reads_interface(kind: ast.ClassDef) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "ALL_ATTENTION_FUNCTIONS" for node in ast.walk(kind))


def _plain_scaling(call: ast.Call) -> bool:
    value = next((keyword.value for keyword in call.keywords if keyword.arg == "scaling"), None)
    if isinstance(value, ast.Attribute):
        return isinstance(value.value, ast.Name) and value.value.id == "self"
    return isinstance(value, ast.Constant)


def _mentions(forward: ast.FunctionDef, name: str) -> bool:
    return any(_name_of(node) == name for node in ast.walk(forward))


def _name_of(node: ast.AST) -> str | None:
    """The name that a node spells, whichever way it spells it."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=name):
            return name
        case ast.Constant(value=str(name)):
            return name
    return None
