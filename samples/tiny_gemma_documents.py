"""The text that ships with Python, as documents to train samples/tiny-gemma on.

A document is one documentation topic, or the docstrings or the comments of one module; its
paragraphs are parted by an empty line.
"""

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

HELD_OUT_ONE_IN = 20
# Tests and tables are not prose; distutils and lib2to3 are gone from later versions of Python.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "turtledemo", "encodings", "pydoc_data", "site-packages"}
    | {"ensurepip", "distutils", "lib2to3"}
)
# Typographic quotes, dashes, ellipsis, no-break space; form feeds go.
_ASCII = str.maketrans(
    "\u2018\u2019\u201c\u201d\u2013\xa0",
    "''\"\"- ",
    "\f",
) | {0x2014: "--", 0x2026: "..."}
_RULE = re.compile(r"\s*([*=\-~^#\"'.+_])\1{2,}")
_CODE = re.compile(r"^\s*(>>>|\.\.\.|@|\||\+)|[\\{(\[=]$|\S {3,}\S| = | == |::=")
_LIST_ITEM = re.compile(r"\s*([*\-•o]|\d+[.)]|:\w+[^:]*:|@\w+)\s+")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the name that decides whether it is trained on."""

    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """Whether the model must not see it: a fixed share of the names, whatever else is read."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def read_documents() -> Iterator[Document]:
    """Yield the documentation of this Python, normalized, each long paragraph only once."""
    seen: set[str] = set()
    for document in itertools.chain(
        _topics(), _source_files(), _extension_modules(), _source_comments()
    ):
        kept, new_chars = [], 0
        for paragraph in document.text.split("\n\n"):
            key = " ".join(paragraph.lower().split())
            # Short ones (signatures, "Example:") belong to the text around them.
            if len(key) >= 30:
                if key in seen:
                    continue
                seen.add(key)
                new_chars += len(key)
            kept.append(paragraph)
        if new_chars >= 80:
            yield Document(document.name, "\n\n".join(kept))


def _topics() -> Iterator[Document]:
    # Longest first: short topics repeat sections of long ones and are then dropped as repetitions.
    for name, text in sorted(topics.topics.items(), key=lambda item: (-len(item[1]), item[0])):
        yield Document(f"topic:{name}", normalize(text))


def _source_paths() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED_FOLDERS.intersection(parts) and not parts[0].startswith("config-"):
            yield ".".join(parts), path


def _source_files() -> Iterator[Document]:
    """Docstrings of the standard library's modules, classes and functions, read without importing."""
    for name, path in _source_paths():
        tree = ast.parse(path.read_bytes())
        described = [(f"Module {name}", ast.get_docstring(tree)), *_docstrings(tree, "")]
        yield Document(f"module:{name}", _sections(described))


def _sections(described: list[tuple[str, str | None]]) -> str:
    return "\n\n".join(f"{title}\n\n{normalize(text)}" for title, text in described if text)


def _docstrings(parent: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield what each class or function under `parent` is called, and its docstring."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.If | ast.Try):
            yield from _docstrings(node, prefix)
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            title = f"class {prefix}{node.name}" + (f"({bases})" if bases else "")
        else:
            title = f"{prefix}{node.name}({ast.unparse(node.args)})"
        if text := ast.get_docstring(node):
            yield title, text
        if isinstance(node, ast.ClassDef):
            yield from _docstrings(node, f"{prefix}{node.name}.")


def _extension_modules() -> Iterator[Document]:
    """Docstrings of modules written in C; these have no source here, so they are imported."""
    for name in sorted(sys.stdlib_module_names):
        spec = importlib.util.find_spec(name) if not name.startswith(("_test", "_xx")) else None
        is_extension = spec is not None and isinstance(
            spec.loader, importlib.machinery.ExtensionFileLoader
        )
        if is_extension or name in sys.builtin_module_names:
            module = importlib.import_module(name)
            described = [(f"Module {name}", inspect.getdoc(module)), *_members(module, "", name)]
            yield Document(f"extension:{name}", _sections(described))


def _members(parent: object, prefix: str, module: str) -> Iterator[tuple[str, str]]:
    """Yield what each public member that `parent` defines itself is called, and its docstring."""
    for name, member in sorted(vars(parent).items()):
        is_foreign = getattr(member, "__module__", None) not in {None, module, "builtins"}
        if is_foreign or name.startswith("__") or inspect.ismodule(member):
            continue
        text = getattr(member, "__doc__", None)
        # Plain values show their type's docstring.
        if isinstance(text, str) and text != type(member).__doc__:
            signature = getattr(member, "__text_signature__", None) or ""
            signature = re.sub(r"\$module(, /)?(, )?|\$", "", signature)
            title = f"class {name}" if inspect.isclass(member) else f"{prefix}{name}"
            yield title + signature, inspect.cleandoc(text)
        if inspect.isclass(member) and not prefix:
            yield from _members(member, f"{name}.", module)


def _source_comments() -> Iterator[Document]:
    """Comments of at least three lines that read as prose."""
    for name, path in _source_paths():
        source = path.read_text(encoding="utf-8", errors="replace")
        blocks = re.findall(r"(?:^[ \t]*#(?: .*)?\n){3,}", source, re.MULTILINE)
        texts = [re.sub(r"^[ \t]*# ?", "", block, flags=re.MULTILINE) for block in blocks]
        prose = [text for text in texts if _is_prose(text)]
        yield Document(f"comments:{name}", "\n\n".join(map(normalize, prose)))


def _is_prose(text: str) -> bool:
    is_legal = re.search(r"copyright|license|permission|@", text, re.IGNORECASE)
    word_pairs = re.findall(r"[a-z]{2,} [a-z]{2,}", text)
    return not is_legal and len(text) >= 150 and len(word_pairs) >= len(text) / 40


def normalize(text: str) -> str:
    """Return `text` in ASCII punctuation, wrapped lines joined, one empty line between paragraphs."""
    lines = [line.rstrip() for line in text.translate(_ASCII).expandtabs(8).split("\n")]
    lines = ["" if _RULE.fullmatch(line) else line for line in lines]
    paragraphs = re.split(r"\n{2,}", "\n".join(lines).strip("\n"))
    joined = "\n\n".join(_join_wrapped(paragraph.split("\n")) for paragraph in paragraphs)
    return re.sub(r"(?<=\w[.?!:;\"')]|[.?!]['\")]) {2}(?=[A-Za-z0-9\"(])", " ", joined)


def _join_wrapped(lines: list[str]) -> str:
    """Undo line wrapping: a line goes on where the next one's first word had no room on it."""
    width = min(max(map(len, lines)), 72)
    out = previous = lines[0]
    for line in lines[1:]:
        indent = len(line) - len(line.lstrip())
        item = _LIST_ITEM.match(previous)
        is_aligned = indent == (item.end() if item else len(previous) - len(previous.lstrip()))
        is_full = width >= 45 and len(previous) + 1 + len(line.split(maxsplit=1)[0]) > width
        is_text = not (_CODE.search(previous) or _CODE.search(line) or _LIST_ITEM.match(line))
        out += f" {line.strip()}" if is_aligned and is_full and is_text else f"\n{line}"
        previous = line
    return out
