"""Dtypes as texts that travel, and dtypes made from texts that nobody trusts.

`describe_dtype` gives a text only if `parse_dtype` makes an equal dtype of it. `parse_dtype` imports nothing and runs
no code, whatever the text is: NumPy's own parser is called with strings of a known form only.
"""

from __future__ import annotations

import ast
import re
import sys
import types
from typing import Any

import numpy as np

#: The longest text of a dtype. Python's parser takes some hundred times the text's size, and recurses in C.
_MAX_LENGTH = 64 * 1024
#: The forms of `dtype.str`. NumPy's own parser takes more, and ends the process by a division by zero at "M8[s/0]".
_DTYPE_STR = re.compile(r"[<>|][biufcSUVMm][0-9]{1,10}(\[([1-9][0-9]{0,8})?[A-Za-zμ]{1,7}\])?")
#: What stands before the literal of a structured dtype whose scalars are of type `np.record`.
RECORD = "record"
_LITERAL_KEYS = {"names", "formats", "offsets", "itemsize", "aligned", "titles"}

_vars_of_module: Any = vars(types.ModuleType)["__dict__"].__get__
_vars_of_class: Any = vars(type)["__dict__"].__get__


def describe_dtype(dtype: np.dtype[Any]) -> str | None:
    """A text from which `parse_dtype` makes an equal dtype; None if there is no such text."""
    if dtype.hasobject or dtype.metadata:
        return None
    if dtype.type.__module__ == "ml_dtypes":
        return f"ml_dtypes.{dtype.name}"
    if dtype.names is None and dtype.subdtype is None:
        texts = [dtype.str]
    else:
        texts = [repr(_literal(dtype, spell_out)) for spell_out in (False, True)]
    for text in texts:
        try:
            parsed = parse_dtype(text)
        except (ValueError, TypeError):
            continue
        if parsed == dtype and _is_alike(parsed, dtype):
            return text
    return None


def _is_alike(parsed: np.dtype[Any], dtype: np.dtype[Any]) -> bool:
    """Whether a parsed dtype, which equals the other, has lost nothing of it: equality looks past the type of a
    structured scalar (`np.record`, or a class of the user's), past metadata, and past the alignment of fields.
    """
    if dtype.metadata or parsed.isalignedstruct != dtype.isalignedstruct:
        return False
    if dtype.kind == "V" and parsed.type is not dtype.type:
        return False
    if parsed.subdtype is not None and dtype.subdtype is not None:
        return _is_alike(parsed.subdtype[0], dtype.subdtype[0])
    if parsed.fields is None or dtype.fields is None:
        return True
    return all(_is_alike(parsed.fields[name][0], dtype.fields[name][0]) for name in dtype.names or ())


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The dtype's name in errors: "float32" where NumPy's name is clear, else its text."""
    if dtype.isbuiltin == 1 and dtype.kind in "biufc":
        return dtype.name
    return describe_dtype(dtype) or str(dtype)


def parse_dtype(text: str) -> np.dtype[Any]:
    """The dtype of a text that `describe_dtype` gave.

    Raises:
        ValueError, TypeError: if the text, which may come from anywhere, is none of those.
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"dtype of {len(text)} characters is longer than {_MAX_LENGTH}")
    try:
        dtype = _from_literal(ast.literal_eval(text) if text[:1] in ("[", "(", "{") else text)
    except (SyntaxError, MemoryError, RecursionError, LookupError) as error:  # MemoryError: the parser's stack
        raise ValueError(f"{text[:80]!r} is no dtype: {error}") from None
    if dtype.hasobject:
        raise ValueError(f"dtype {text[:80]} holds objects")
    return dtype


def _literal(dtype: np.dtype[Any], spell_out: bool) -> Any:
    """The dtype as a Python literal.

    A plain dtype is a string, a subarray is a tuple (base, shape). A structured dtype is a list of fields without gaps,
    or, spelled out, a dict with their offsets; one whose scalars are of type `np.record` is a tuple of RECORD and that.
    """
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return _literal(base, spell_out), shape
    if dtype.names is None:
        return dtype.str
    if dtype.type is np.record:
        return RECORD, _literal(np.dtype((np.void, dtype)), spell_out)
    fields: list[tuple[Any, ...]] = [dtype.fields[name] for name in dtype.names]  # type: ignore[index]
    titles = [field[2] if len(field) > 2 else None for field in fields]
    formats = [_literal(field[0], spell_out) for field in fields]
    if not spell_out:
        names = [name if title is None else (title, name) for title, name in zip(titles, dtype.names, strict=True)]
        return [(name, *_flattened(literal)) for name, literal in zip(names, formats, strict=True)]
    literal = {
        "names": list(dtype.names),
        "formats": formats,
        "offsets": [field[1] for field in fields],
        "itemsize": dtype.itemsize,
        "aligned": dtype.isalignedstruct,
    }
    return {**literal, "titles": titles} if any(title is not None for title in titles) else literal


def _flattened(literal: Any) -> tuple[Any, ...]:
    """What stands behind the name of a field: of a subarray its base and shape, else the literal."""
    return literal if isinstance(literal, tuple) and literal[0] != RECORD else (literal,)


def _from_literal(literal: Any) -> np.dtype[Any]:
    """The dtype of a literal, which need not be one of `_literal`'s: NumPy is given nothing that was not checked."""
    if isinstance(literal, tuple):
        base, shape = literal
        if base == RECORD:
            return _as_record(_from_literal(shape))
        return np.dtype((_from_literal(base), _checked_shape(shape)))
    if isinstance(literal, dict):
        if not literal.keys() <= _LITERAL_KEYS:
            raise ValueError(f"dtype with unknown keys {[*literal.keys() - _LITERAL_KEYS]!r:.80}")
        return np.dtype({**literal, "formats": [_from_literal(field) for field in literal["formats"]]})  # type: ignore[call-overload, no-any-return]
    if isinstance(literal, list):
        return np.dtype([(name, _from_literal(field), *map(_checked_shape, shape)) for name, field, *shape in literal])
    if isinstance(literal, str) and literal.startswith("ml_dtypes."):
        return _from_ml_dtypes(literal)
    if not isinstance(literal, str) or not _DTYPE_STR.fullmatch(literal):
        raise ValueError(f"{literal!r:.80} is no dtype")
    return np.dtype(literal)


def _as_record(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.names is None:
        raise ValueError(f"{dtype!r:.80} has no fields, and is no record")
    return np.dtype((np.record, dtype))


def _from_ml_dtypes(text: str) -> np.dtype[Any]:
    """A dtype that ml_dtypes adds to NumPy, if this process has imported ml_dtypes already."""
    found = find_class(text.replace(".", ":"))
    if not issubclass(type(found), type) or not issubclass(found, np.generic):
        raise ValueError(f"dtype {text:.80} is not known here: import ml_dtypes in this process first")
    return np.dtype(found)  # type: ignore[no-any-return]


def _checked_shape(shape: Any) -> tuple[int, ...]:
    """The shape of a subarray. NumPy would take anything else in its place for another dtype."""
    if not isinstance(shape, tuple) or any(type(length) is not int for length in shape):
        raise ValueError(f"{shape!r:.80} is no shape")
    return shape


def find_class(name: str) -> Any:
    """The class that "module:Outer.Inner" names among all that is imported; None if there is none.

    No attribute of any object on the way is asked for: a lazy module, or a metaclass, would run code.
    """
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        if issubclass(type(found), types.ModuleType):
            found = _vars_of_module(found).get(part)
        elif issubclass(type(found), type):
            found = _vars_of_class(found).get(part)
        else:
            return None
    return found
