"""How the registry and relays are found, by name, and called."""

from __future__ import annotations

from typing import Any

import ray

from ..errors import ChannelClosed, RingshmError
from ..segment import layout
from ..system import sleep
from .locality import Place, label
from .records import RECEIVER, SENDER

#: The Ray namespace of all actors of ringshm: a name in a user's own namespace might be taken, and may be anonymous.
ACTORS = "ringshm"
#: Seconds between two tries to reach a registry that is being started again, and how many of them.
_PAUSE, _TRIES = 0.5, 60

#: Registries by the namespace and the connection to Ray that they were found by: another `ray.init` knows none of them.
_found: dict[tuple[str, str, str], Any] = {}


def _key(namespace: str) -> tuple[str, str, str]:
    context = ray.get_runtime_context()
    return namespace, context.get_node_id(), context.get_worker_id()


def _registry(namespace: str) -> Any:
    """The registry for a user's Ray namespace.

    Raises:
        ValueError: if there is none.
    """
    key = _key(namespace)
    if (registry := _found.get(key)) is None:
        registry = _found[key] = ray.get_actor(registry_name(namespace), ACTORS)
    return registry


def registry_name(namespace: str) -> str:
    """The name of the registry for a user's Ray namespace."""
    return f"registry of {namespace}"


def registries() -> list[Any]:
    """Those of all namespaces."""
    named = ray.util.list_named_actors(all_namespaces=True)
    names = [one["name"] for one in named if one["namespace"] == ACTORS and one["name"].startswith(registry_name(""))]
    return [ray.get_actor(name, ACTORS) for name in names]


def relay_name(channel: str, place: Place) -> str:
    """The name of the relay of a channel at a place."""
    return f"relay of {channel} at {label(place)}"


def relay(channel: str, place: Place) -> Any:
    """The relay of a channel at a place.

    Raises:
        ValueError: if there is none.
    """
    return ray.get_actor(relay_name(channel, place), ACTORS)


def call(namespace: str, method: str, *args: Any) -> Any:
    """Call the registry, and wait for its answer, through its restarts.

    Raises:
        RingshmError: what the registry raises; ChannelClosed if there is none any more.
    """
    for attempt in range(_TRIES):
        try:
            return ray.get(getattr(_registry(namespace), method).remote(*args))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, RingshmError) else error from None
        except ValueError:
            raise ChannelClosed(
                f"the Ray namespace {namespace!r} has no channel of ringshm any more: make a new one"
            ) from None
        except ray.exceptions.ActorUnavailableError:
            sleep(_PAUSE)
        except ray.exceptions.RayActorError:
            _found.pop(_key(namespace), None)
            sleep(_PAUSE if attempt else 0)
    raise ChannelClosed(f"the registry of the Ray namespace {namespace!r} does not answer: does the cluster live?")


def tell(namespace: str, method: str, *args: Any) -> None:
    """Call the registry without waiting for its answer, which Ray sees through the registry's restarts.

    A process that ends may do so: Ray's core does not bear that a thread waits for an answer while it goes.
    """
    getattr(_registry(namespace), method).remote(*args)


class Nobody:
    """Says whether really nobody may come to a ring in a role, when the ring itself knows of nobody.

    A relay that says in the ring that others may come may have been killed, and not be there again yet.
    """

    def __init__(self, namespace: str, channel: str, ring: str) -> None:
        self._namespace, self._channel, self._ring = namespace, channel, ring

    def __call__(self, role: int) -> bool:
        """Ask the registry; False also if it does not answer soon: the caller asks again after a slice."""
        name = SENDER if role == layout.SENDER else RECEIVER
        try:
            registry = _registry(self._namespace)
            return not ray.get(registry.comes_to.remote(self._channel, self._ring, name), timeout=1.0)
        except ValueError:
            return True
        except ray.exceptions.RayError:
            _found.pop(_key(self._namespace), None)
            return False


def closed(name: str, why: str) -> ChannelClosed:
    """The error for a handle that may not be used."""
    return ChannelClosed(f"channel {name!r}: {why}")
