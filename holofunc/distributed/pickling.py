"""Functions as bytes, for a fresh process of the same Python: what it can import by name, all else by value.

By value go functions and classes of ``__main__`` (a notebook, a script), lambdas, and what is defined inside of
functions: code, defaults, closure, and the globals that the code names. Their globals in the other process are those of
its ``__main__``, so that what comes back by name is found again here.
"""

import dataclasses
import dis
import enum
import importlib
import importlib.util
import io
import marshal
import pickle
import sys
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType, MappingProxyType, MemberDescriptorType, ModuleType, new_class
from typing import Any

__all__ = ["dumps"]

MAIN = "__main__"
MADE_ANEW = {"__dict__", "__weakref__", "__slots__", "_abc_impl", "_backward_cls"}
"""Attributes that a class is born with."""


def dumps(value: Any) -> bytes:
    """``value`` for `pickle.loads` in a process that can import this module.

    Raises:
        TypeError: something in it cannot be pickled.
    """
    file = io.BytesIO()
    try:
        _Pickler(file).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError) as error:
        raise TypeError(f"what another process is to have must be picklable: {error}") from error
    return file.getvalue()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.namespaces: dict[int, dict[str, Any]] = {}

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, ModuleType):
            return _module, _located(value)
        if isinstance(value, MappingProxyType):
            return _read_only, (dict(value),)
        if type(value).__module__ == "dataclasses":  # what fields are marked with is compared by identity
            name = next((name for name, x in vars(dataclasses).items() if x is value), None)
            return NotImplemented if name is None else (_found, ("dataclasses", None, name))
        if isinstance(value, (staticmethod, classmethod)):
            return type(value), (value.__func__,)
        if isinstance(value, property):
            return property, (value.fget, value.fset, value.fdel, value.__doc__)
        if not isinstance(value, (FunctionType, type)) or value.__module__ in (__name__, "builtins"):
            return NotImplemented
        module = sys.modules.get(value.__module__)
        if module is not None and value.__module__ != MAIN and _attribute(module, value.__qualname__) is value:
            return _found, (*_located(module), value.__qualname__)
        return self._function(value, module) if isinstance(value, FunctionType) else _class(value)

    def _function(self, fn: FunctionType, module: ModuleType | None) -> Any:
        own = module is not None and vars(module) is fn.__globals__
        names = set() if own and fn.__module__ != MAIN else set(_global_names(fn.__code__))
        values = {name: fn.__globals__[name] for name in names if name in fn.__globals__}
        namespace = _located(module) if own and module else self.namespaces.setdefault(id(fn.__globals__), {})
        cells = [_content(cell) for cell in fn.__closure__ or ()]
        attributes = {"__defaults__": fn.__defaults__, "__kwdefaults__": fn.__kwdefaults__, **vars(fn)}
        named = {"__module__": fn.__module__, "__qualname__": fn.__qualname__, "__doc__": fn.__doc__}
        state = values, cells, {**attributes, **named}
        return _new_function, (marshal.dumps(fn.__code__), namespace, fn.__name__), state, None, None, _fill_function


def _class(cls: type) -> Any:
    if issubclass(cls, enum.Enum):
        members = {name: member.value for name, member in cls.__members__.items()}
        own = {name: x for name, x in vars(cls).items() if name not in members and name[0] != "_"}
        named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        return _new_class, (type(cls), cls.__name__, cls.__bases__, members), {**own, **named}, None, None, _fill_class
    slots = {"__slots__": vars(cls)["__slots__"]} if "__slots__" in vars(cls) else {}
    attributes = {
        name: x for name, x in vars(cls).items() if name not in MADE_ANEW and not isinstance(x, MemberDescriptorType)
    }
    return _new_class, (type(cls), cls.__name__, cls.__bases__, slots), attributes, None, None, _fill_class


def _global_names(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            yield instruction.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _global_names(inner)


def _content(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not bound yet
        return ()


def _located(module: ModuleType) -> tuple[str, str | None]:
    return module.__name__, getattr(module, "__file__", None)


def _attribute(node: Any, path: str) -> Any:
    for name in path.split("."):
        node = getattr(node, name, None)
    return node


# --- in the other process ----------------------------------------------------------------------------------------


def _module(name: str, file: str | None) -> ModuleType:
    """By its name; by its file, where that is how it was loaded, as pytest loads tests."""
    try:
        return importlib.import_module(name)
    except ImportError:
        spec = importlib.util.spec_from_file_location(name, file) if file else None
        if spec is None or spec.loader is None:
            raise
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def _read_only(content: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(content)


def _found(name: str, file: str | None, path: str) -> Any:
    return _attribute(_module(name, file), path)


def _new_function(code: bytes, namespace: dict[str, Any] | tuple[str, str | None], name: str) -> FunctionType:
    code_of: CodeType = marshal.loads(code)
    found = namespace if isinstance(namespace, dict) else vars(_module(*namespace))
    return FunctionType(code_of, found, name, None, tuple(CellType() for _ in code_of.co_freevars))


def _fill_function(fn: FunctionType, state: tuple[dict[str, Any], list[tuple[Any, ...]], dict[str, Any]]) -> None:
    values, cells, attributes = state
    fn.__globals__.update(values)
    for cell, content in zip(fn.__closure__ or (), cells, strict=True):
        if content:
            (cell.cell_contents,) = content
    for name, value in attributes.items():
        setattr(fn, name, value)


def _new_class(kind: type, name: str, bases: tuple[type, ...], first: dict[str, Any]) -> type:
    """A class that begins with its slots, or an enumeration's members; the rest may refer to it, and comes later."""

    def fill(namespace: dict[str, Any]) -> None:
        for name, value in first.items():
            namespace[name] = value  # enumerations count them one by one

    return new_class(name, bases, {"metaclass": kind}, fill)


def _fill_class(cls: type, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(cls, name, value)
