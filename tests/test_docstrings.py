"""The docstrings of the public interface: their examples run, and what they name exists."""

from __future__ import annotations

import builtins
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import queue
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

import ringshm

#: Everything that a user may call: what it is called, and what it is.
Callables = dict[str, Any]
#: Made by ringshm only, with what no user passes.
MADE_BY_RINGSHM = {
    *("AsyncBorrow", "AsyncLoan", "Borrow", "ChannelStats", "Codec", "HeldVersion", "LatestBorrow", "LatestStats"),
    *("Loan", "ParticipantStats", "Receiver", "Sender", "SharedMemoryReceiver", "SharedMemorySender", "SlotStats"),
}


def _modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(ringshm.__path__, "ringshm.")]
    return ["ringshm", *(name for name in names if name != "ringshm.__main__")]


def _imported(name: str) -> Any:
    needs = {
        "environments": "gymnasium", "gymnasium": "gymnasium", "ray": "ray", "stable_baselines3": "stable_baselines3",
        "torch": "torch", "tools.plot": "matplotlib",
    }  # fmt: skip
    for part, library in needs.items():
        if name.startswith(f"ringshm.{part}"):
            pytest.importorskip(library)
    if name == "ringshm.segment.posix_semaphores" and not getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.skip("its library would switch the GIL on")
    return importlib.import_module(name)


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    for name in sorted(dir(cls)):
        if name.startswith("_"):
            continue
        found = inspect.getattr_static(cls, name)
        if isinstance(found, (classmethod, staticmethod)):
            found = found.__func__
        if isinstance(found, property) or inspect.isfunction(inspect.unwrap(found)):
            module = getattr(found.fget if isinstance(found, property) else found, "__module__", "")
            if module.startswith("ringshm"):
                yield f"{cls.__name__}.{name}", found


def _public() -> Callables:
    found: Callables = {}
    for name in ringshm.__all__:
        thing = getattr(ringshm, name)
        if isinstance(thing, str):
            continue
        found[name] = thing
        if inspect.isclass(thing):
            found.update(_methods(thing))
    return found


PUBLIC = _public()


def _section(text: str, title: str) -> str:
    """A section's lines, with their indent taken away."""
    match = re.search(rf"^(?:\w+, )?{title}(?:, .*)?(?: \(.*\))?:\n((?:    .*\n|\n)*)", text + "\n", re.MULTILINE)
    return textwrap.dedent(match[1]) if match else ""


def _entries(section: str) -> list[str]:
    """The names before the colons of a section."""
    found = re.findall(r"^((?:[\w.*]+, )*[\w.*]+):(?: |\n|$)", section, re.MULTILINE)
    return [name.strip("*") for names in found for name in names.split(", ")]


def _parameters(thing: Any) -> list[str]:
    if isinstance(thing, property):
        return []
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


def _text(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def _documented(name: str) -> list[str]:
    """The parameters that a docstring documents; those of another, if it refers to that in place of `Args`."""
    text, owner = _text(PUBLIC[name]), name.split(".")[0]
    if entries := _entries(_section(text, "Args")):
        return entries
    reference = re.search(r"\AAs `([\w.]+)`|^Args.*:\n    As `([\w.]+)`|\A`(\w+)\(.*\)`", text, re.MULTILINE)
    if reference is None:
        return []
    other = next(filter(None, reference.groups()))
    return _documented(other if other in PUBLIC else f"{owner}.{other}")


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_says_something_in_one_sentence_first(name: str) -> None:
    summary = _text(PUBLIC[name]).split("\n\n")[0]
    assert summary and summary[0] in "`ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert summary.rstrip()[-1] in ".:`"


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in MADE_BY_RINGSHM])
def test_docstring_names_each_parameter_and_no_other(name: str) -> None:
    thing, text = PUBLIC[name], _text(PUBLIC[name])
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return
    documented = _documented(name)
    if _entries(_section(text, "Args")):
        assert documented == _parameters(thing)
    else:  # another's, of which it has all or some
        assert set(_parameters(thing)) <= set(documented)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_raises_only_what_exists(name: str) -> None:
    for raised in _entries(_section(_text(PUBLIC[name]), "Raises")):
        found: Any = getattr(ringshm, raised, None) or getattr(builtins, raised, None)
        if raised.startswith("queue."):
            found = getattr(queue, raised.removeprefix("queue."))
        assert inspect.isclass(found) and issubclass(found, BaseException), raised


@pytest.mark.parametrize("name", [name for name in PUBLIC if dataclasses.is_dataclass(PUBLIC[name])])
def test_docstring_tells_each_field(name: str) -> None:
    told = [_text(base) for base in PUBLIC[name].__mro__ if base.__module__.startswith("ringshm")]
    entries = [entry for text in told for title in ("Args", "Attributes") for entry in _entries(_section(text, title))]
    assert sorted(entries) == sorted(field.name for field in dataclasses.fields(PUBLIC[name]))


@pytest.mark.parametrize("module", _modules())
def test_examples_run(module: str) -> None:
    failed, _ = doctest.testmod(_imported(module), optionflags=doctest.ELLIPSIS)
    assert failed == 0


@pytest.mark.parametrize(
    "name", ["Channel", "Channel.get_batch", "Channel.loan", "Channel.borrow", "Latest", "Queue", "Spec", "wait"]
)
def test_main_ones_have_an_example(name: str) -> None:
    assert doctest.DocTestParser().get_examples(_text(PUBLIC[name]))
