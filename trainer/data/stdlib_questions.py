"""The embedded conversations: what the functions of the standard library do and what their arguments are.

Questions are asked of the source files, which are parsed and never imported.
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.data.python_stdlib import stdlib_files, stdlib_folder

QUESTIONS_VERSION = 1
"""To be raised when other questions are asked of the same files."""

_MAX_ANSWER_CHARACTERS = 300
# The end of a sentence: not behind an abbreviation such as "e.g.", whose next word goes on in small letters.
_SENTENCE = re.compile(r"(.+?[.!?])(?:\s+(?=[^a-z\s])|$)", re.DOTALL)
_FIRST = ("What does {} do?", "What is {} for?", "Tell me what {} does.")
_SECOND = ("What are the arguments of {}?", "How is {} called?", "Which parameters does {} take?")

_Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Question:
    """A conversation about one function or class.

    Attributes:
        conversation: as ``trainer.data.conversations`` keeps them.
        source_id: file and name.
        module: the module that it is about.
    """

    conversation: str
    source_id: str
    module: str


def stdlib_questions() -> Iterator[Question]:
    """What can be asked about the public functions and classes that have a docstring, in the order of the files.

    Both questions about a function are of one module, and no two functions have the same answer, so that a split by
    modules holds out what training does not have.
    """
    answers: set[str] = set()
    for path in stdlib_files():
        relative = path.relative_to(stdlib_folder())
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            # Some files of the library are there to be no Python, or of another version.
            continue
        for name, node in _public(tree.body, module):
            sentence = _first_sentence(ast.get_docstring(node) or "")
            # What is said of several is about none of them.
            if sentence is None or sentence in answers:
                continue
            answers.add(sentence)
            for index, (question, answer) in enumerate(_asked(name, node, sentence, len(answers))):
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                conversation = json.dumps({"messages": turns}, ensure_ascii=False)
                yield Question(conversation, f"{relative}#{name}-{index}", module)


def _asked(name: str, node: _Documented, sentence: str, number: int) -> Iterator[tuple[str, str]]:
    """Questions and answers about one function; its number decides how they are put."""
    yield _FIRST[number % len(_FIRST)].format(name), sentence
    if signature := _signature(node):
        yield _SECOND[number % len(_SECOND)].format(name), f"{name}{signature}"


def _public(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, _Documented]]:
    """Functions, classes and their methods without a leading underscore, each name once."""
    seen: set[str] = set()
    for node in body:
        if not isinstance(node, _Documented) or node.name.startswith("_") or node.name in seen:
            continue
        seen.add(node.name)
        name = f"{prefix}.{node.name}"
        yield name, node
        if isinstance(node, ast.ClassDef):
            yield from _public(node.body, name)


def _first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring's first paragraph on one line; None where there is none, or a long one."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    found = _SENTENCE.match(paragraph)
    sentence = found[1] if found else ""
    return sentence if sentence and len(sentence) <= _MAX_ANSWER_CHARACTERS else None


def _signature(node: _Documented) -> str | None:
    """The arguments as they are written, without ``self``, ``cls`` and annotations; None of a class, or of many."""
    if isinstance(node, ast.ClassDef):
        return None
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    for several in (arguments.vararg, arguments.kwarg):
        if several is not None:
            several.annotation = None
    text = ast.unparse(arguments)
    text = re.sub(r"^(self|cls)\b(, )?", "", text)
    return f"({text})" if len(text) <= _MAX_ANSWER_CHARACTERS else None
