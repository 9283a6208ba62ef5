"""Which configuration fields a source tree reads, by following types through its syntax trees."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field

from sharding.strict_model import StrictModel
from trainer.config.reference import element_of, section_of


@dataclass
class KnownTypes:
    """Types by name: of what functions return, and of what objects hold.

    Attributes:
        sections: the configuration models.
        returns: function or method name to the name of its type.
        attributes: class name to attribute name to the name of its type.
    """

    sections: dict[str, type[StrictModel]]
    returns: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, dict[str, str]] = field(default_factory=dict)


def find_reads(trees: Iterable[ast.Module], models: Iterable[type[StrictModel]]) -> set[tuple[str, str]]:
    """Pairs of model name and field name for every ``x.field`` whose ``x`` is of that model; an inherited field counts
    for the model that declares it.

    A type is known from an annotated parameter or attribute, from a function's annotated result, and from what was
    assigned; ``self.x`` is what ``__init__`` was given.
    """
    bases = {base for model in models for base in model.__mro__ if issubclass(base, StrictModel)}
    known = KnownTypes({model.__name__: model for model in bases})
    trees = list(trees)
    # Attributes may get their types from results and results from classes that come later: twice is enough.
    for _ in range(2):
        for tree in trees:
            _Declarations(known).visit(tree)
    reads: set[tuple[str, str]] = set()
    for tree in trees:
        _Reader(known, reads).visit(tree)
    return reads


class _Declarations(ast.NodeVisitor):
    def __init__(self, known: KnownTypes) -> None:
        self._known = known
        self._class = ""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._class = self._class, node.name
        held = self._known.attributes.setdefault(node.name, {})
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                held[statement.target.id] = annotated_type(statement.annotation)
        self.generic_visit(node)
        self._class = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        result = annotated_type(node.returns)
        if result:
            self._known.returns[node.name] = result
            if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
                self._known.attributes[self._class][node.name] = result
        if self._class and node.name == "__init__":
            reader = _Reader(self._known, set(), self._class)
            reader.visit(node)
        self.generic_visit(node)


class _Reader(ast.NodeVisitor):
    def __init__(self, known: KnownTypes, reads: set[tuple[str, str]], class_name: str = "") -> None:
        self._known, self._reads, self._class = known, reads, class_name
        self._types: dict[str, str] = {}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        inner = _Reader(self._known, self._reads, node.name)
        for statement in node.body:
            inner.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        inner = _Reader(self._known, self._reads, self._class)
        inner._types = dict(self._types)
        parameters = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        for parameter in parameters:
            inner._types[parameter.arg] = annotated_type(parameter.annotation)
        if self._class and parameters and parameters[0].arg == "self":
            inner._types["self"] = self._class
        for statement in node.body:
            inner.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self._bind(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
        self._set(node.target, annotated_type(node.annotation))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._type_of(node)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._set(node.target, self._item_type(node.iter))
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        for generator in node.generators:
            self._set(generator.target, self._item_type(generator.iter))
        self.generic_visit(node)

    def _item_type(self, node: ast.expr) -> str:
        """Name of the section of each item of a field that is a list of sections."""
        if isinstance(node, ast.Attribute):
            model = self._known.sections.get(self._type_of(node.value))
            if model is not None and node.attr in model.model_fields:
                item = element_of(model.model_fields[node.attr])
                return item.__name__ if item is not None else ""
        return ""

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for inner_target, inner_value in zip(target.elts, value.elts, strict=True):
                self._bind(inner_target, inner_value)
        else:
            self._set(target, self._type_of(value))

    def _set(self, target: ast.expr, type_name: str) -> None:
        if isinstance(target, ast.Name):
            self._types[target.id] = type_name
        elif isinstance(target, ast.Attribute) and type_name:
            holder = self._type_of(target.value)
            self._known.attributes.setdefault(holder, {}).setdefault(target.attr, type_name)

    def _type_of(self, node: ast.expr) -> str:
        """Name of an expression's type; empty where it is not known. Notes the fields that are read on the way."""
        if isinstance(node, ast.Name):
            return self._types.get(node.id, "")
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            return name if name in self._known.attributes else self._known.returns.get(name, "")
        if not isinstance(node, ast.Attribute):
            return ""
        holder = self._type_of(node.value)
        model = self._known.sections.get(holder)
        if model is None or node.attr not in model.model_fields:
            return self._known.attributes.get(holder, {}).get(node.attr, "")
        self._reads.add((declaring_model(model, node.attr), node.attr))
        section = section_of(model.model_fields[node.attr])
        return section.__name__ if section is not None else ""


def declaring_model(model: type[StrictModel], name: str) -> str:
    """Name of the model among a model and its bases that declares a field."""
    return next(base.__name__ for base in reversed(model.__mro__) if name in getattr(base, "__annotations__", {}))


def annotated_type(annotation: ast.expr | None) -> str:
    """The class that an annotation names: of ``X | None`` it is X."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):
        return annotated_type(annotation.left)
    return annotation.id if isinstance(annotation, ast.Name) else ""
