"""For TorchRL: a transport of weights whose readers see them whole, in versions, on a `Latest`.

    import ringshm.torchrl                                              registers the backend
    scheme = WeightSyncScheme.from_backend("ringshm")
    collector = MultiAsyncCollector(..., weight_sync_schemes={"policy": scheme})
    collector.update_policy_weights_()                                  in the learner, after each update

`update_policy_weights_` publishes a version, and waits for no worker. Before each forward of its policy a worker looks
whether there is a newer version, and copies it into the policy, in the thread that makes the forward. So each is
by one version, from its first layer to its last. One that begins after an update has returned is by that update or a
later one. A worker that starts late gets the newest version. One that is killed while it reads disturbs nobody.

TorchRL's own backends for one machine, "shared" and "process", give workers tensors in shared memory, which the learner
changes in place ("process", too: `torch.multiprocessing`'s queues share the memory of tensors), and a thread of the
worker copies new weights amid a forward. So a forward may see layers of two versions: perf/README.md has how often one
did, and `python -m perf.torn_weights` counts that. With "ringshm" none did.

Importing this module imports TorchRL, which `import ringshm` does not.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Mapping
from typing import Any

from .channel.latest import Latest
from .errors import EndOfChannel, missing
from .system import monotonic
from .torch import spec

try:
    import torch
    from tensordict import TensorDict, TensorDictBase
    from torchrl.weight_update import WeightSyncScheme
    from torchrl.weight_update.utils import _resolve_model
    from torchrl.weight_update.weight_sync_schemes import register_weight_sync_backend
except ImportError as error:
    raise missing("ringshm.torchrl", "TorchRL", "torchrl", error) from error

__all__ = ["LatestTransport", "LatestWeightSyncScheme"]

#: Stands for the model that only workers have.
_NOBODYS: Any = object()
#: Seconds of a wait for weights after which a reader looks whether anybody is left to send them.
_LOOK = 0.5


def _as_tensordict(weights: Any) -> Any:
    """A TensorDict or a state_dict of weights as a nested TensorDict on the CPU, without gradients."""
    if isinstance(weights, Mapping) and not isinstance(weights, TensorDictBase):
        weights = TensorDict(dict(weights))
    if not isinstance(weights, TensorDictBase):
        raise TypeError(f"weights are a {type(weights).__name__}: give a module, a TensorDict, or a state_dict")
    if any("." in name for name in weights.keys()):  # noqa: SIM118
        weights = weights.unflatten_keys(".")
    return weights.data.cpu()


class LatestTransport:
    """One `Latest` as TorchRL's transport of weights, for all workers.

    Args:
        latest: made with the `ringshm.torch.spec` of the weights' TensorDict.

    Attributes:
        latest: that one.
        version: that this process has received last; 0 if none was.
    """

    def __init__(self, latest: Latest[Any]) -> None:
        self.latest = latest
        self.version = 0

    def send_weights(self, weights: Any) -> None:
        """Publish weights. It waits for no reader.

        Raises:
            SpecMismatch: if they are not like those that the Latest was made for; names the entry.
        """
        self.latest.publish(_as_tensordict(weights))

    def receive_weights(
        self, timeout: float | None = None, *, weights: Any = None, model: Any = None, strategy: Any = None
    ) -> Any:
        """The newest weights, if they are newer than what was received last, applied to the model.

        Args:
            timeout: in seconds, for such weights; None waits for ever, 0 not at all.
            weights: not used.
            model, strategy: the strategy applies the weights to the model, if both are given.

        Returns:
            A TensorDict of weights on the CPU, which the caller owns; None if none came in time.

        Raises:
            EndOfChannel: if it waits for weights, and no process is left that has published any.
        """
        received = self._read(timeout)
        if received is not None and model is not None and strategy is not None:
            strategy.apply_weights(model, received)
        return received

    def _read(self, timeout: float | None) -> Any:
        if timeout is None:
            self.version, weights = self.latest.read(self.version)
            return weights
        end = monotonic() + timeout
        while True:
            left = max(0.0, end - monotonic())
            try:
                self.version, weights = self.latest.read(self.version, min(left, _LOOK))
                return weights
            except queue.Empty:
                if left <= 0:
                    return None
            if self.version and not self.latest.wait_for_peers(senders=1, timeout=0):
                raise EndOfChannel(
                    f"{self.latest.name!r} has no publisher any more; its newest version, {self.version}, was received"
                )

    def setup_connection_and_weights_on_sender(self) -> None:
        """Nothing: the scheme publishes the first weights when it is initialised."""

    def setup_connection_and_weights_on_receiver(
        self, *, worker_idx: int | None = None, weights: Any = None, model: Any = None, strategy: Any = None
    ) -> Any:
        """The newest weights."""
        return self._read(None)


class _Refresh:
    """Called before each forward of a model, and before its state_dict: brings it up to date.

    Copies of the model, and pickles, have one that does nothing: the scheme keeps its own model up to date.
    """

    def __init__(self, scheme: LatestWeightSyncScheme | None = None) -> None:
        self._scheme = (lambda: None) if scheme is None else weakref.ref(scheme)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def __call__(self, module: Any, *_: Any) -> None:
        scheme = self._scheme()
        if scheme is not None and scheme.model is module:
            scheme.receive(timeout=0)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Refresh, ()


@register_weight_sync_backend("ringshm")  # type: ignore[untyped-decorator, unused-ignore]
class LatestWeightSyncScheme(WeightSyncScheme):  # type: ignore[misc, unused-ignore]
    """Sends a model's weights to all workers by a `Latest`: whole and in versions.

    The model in a worker, a `torch.nn.Module`, is brought up to date before each of its forwards and each `state_dict`;
    with CUDA graphs, which run no Python, call `receive(timeout=0)` instead. All workers get the same weights: a scheme
    has no per-worker weights.

    A process that is no worker of the collector receives the same: it is given the scheme, which pickles once it was
    initialised, or makes one with the same name.

    Args:
        strategy: as of TorchRL's schemes: "tensordict" or "state_dict".
        name: for receivers that are not given the scheme; None makes a fresh one.
        readers: as of Latest: how many processes may receive at once.
    """

    def __init__(self, strategy: str = "tensordict", *, name: str | None = None, readers: int = 256) -> None:
        super().__init__(strategy)
        self._name, self._readers = name, readers
        self._source: Any = None  # what `send` sends that is not told: a module or a TensorDict
        self._hooks: list[Any] = []

    # --- the sender

    def _init_on_sender_impl(
        self,
        *,
        model_id: str | None = None,
        context: Any = None,
        weights: Any = None,
        model: Any = None,
        params_map: Mapping[int, Any] | None = None,
        **_: Any,
    ) -> None:
        """Make the Latest for these weights.

        Args:
            model_id, context: the collector, and what in it is to be sent.
            weights, model: what is to be sent, if there is no context.
            params_map: weights by worker, which are the same for all.

        Raises:
            ValueError: if workers are to have weights of their own, or there are none.
            TypeError: if there is no module, or an entry of its weights is no tensor.
        """
        if params_map is not None:
            weights = next(iter(params_map.values()))
            if any(other is not weights for other in params_map.values()):
                raise ValueError("params_map has weights of their own for workers: ringshm sends the same to all")
        elif context is not None and weights is None:
            model = self._model_of(context, model_id)
        if self._source is None:
            self._source = model if weights is None else weights
        if weights is None:
            if not isinstance(model, torch.nn.Module):
                raise TypeError(
                    f"ringshm sends the weights of a torch.nn.Module, and {model_id!r} is a {type(model).__name__}: a "
                    "policy without weights needs no scheme"
                )
            weights = self._strategy.extract_weights(model)
        self.model_id = model_id
        if context is not None:
            self.context = context
        first = _as_tensordict(weights)
        if first.is_empty():
            raise ValueError(f"{model_id!r} has no weights: a policy without weights needs no scheme")
        latest = Latest(spec=spec(first), name=self._name, readers=self._readers)
        self.shared_transport = LatestTransport(latest)
        self.shared_transport.send_weights(weights)  # from now on no receiver has to wait for them

    def _model_of(self, context: Any, model_id: str | None) -> Any:
        if model_id is None:
            raise ValueError("a context needs a model_id, which says what in it is to be sent")
        model = _resolve_model(context, model_id)
        factories = getattr(context, "policy_factory", None)
        if model is None and model_id == "policy" and factories:
            if any(factory is not factories[0] for factory in factories):
                raise ValueError("workers have policy factories of their own: ringshm sends the same weights to all")
            model = factories[0]()
            self._source = _NOBODYS  # but the first weights are its
        return model

    def _setup_connection_and_weights_on_sender_impl(
        self, *, worker_idx: int | None = None, weights: Any | None = None
    ) -> None:
        """Publish the first weights again, as they are now."""
        if weights is not None or self._source is not _NOBODYS:
            self.shared_transport.send_weights(
                self.prepare_weights(weights, self._model_id, self._strategy, self.context)
            )

    def prepare_weights(self, weights: Any, model_id: Any, strategy: Any, context: Any = None) -> Any:
        """The weights to send; if none are given, those of the context's model, or of what the scheme was made for.

        Raises:
            ValueError: if there is neither.
        """
        prepared = super().prepare_weights(weights, model_id, strategy, context)
        if prepared is None:
            if self._source is _NOBODYS:
                raise ValueError("policies are made in the workers, none is here to take weights from: give weights")
            prepared = super().prepare_weights(self._source, model_id, strategy, context)
        return prepared

    def send(self, weights: Any = None, worker_ids: int | list[int] | None = None) -> None:
        """Publish weights, for all workers. It waits for none of them.

        Args:
            weights: a module, a TensorDict, a state_dict; None sends those of the model that the scheme was made for.
            worker_ids: None, or all of the context's workers.

        Raises:
            ValueError: if some workers are left out, or are to have weights of their own; or there are no weights.
            SpecMismatch: if an entry differs from what was sent first; names it. Nothing was published.
        """
        workers = [worker_ids] if isinstance(worker_ids, int) else worker_ids
        if workers is not None and len({*workers}) < getattr(self.context, "num_workers", 1):
            raise ValueError(f"worker_ids={worker_ids!r} leaves workers out: ringshm sends the same weights to all")
        if isinstance(weights, dict) and weights and all(isinstance(worker, int) for worker in weights):
            raise ValueError("weights are given by worker: ringshm sends the same weights to all")
        super().send(weights)

    def create_transport(self, **_: Any) -> LatestTransport:
        """The transport, of which there is one for all."""
        return self.shared_transport  # type: ignore[no-any-return, unused-ignore]

    # --- receivers

    def _init_on_receiver_impl(
        self, *, model_id: str, context: Any = None, model: Any = None, worker_idx: int | None = None, **_: Any
    ) -> None:
        """Begin as a receiver.

        Args:
            model_id, context: the collector, and what in it gets the weights.
            model: what gets them, if there is no context.
            worker_idx: not used, but by TorchRL.

        Raises:
            ChannelNotFound: if there is no sender of the scheme's name.
        """
        if self._shared_transport is None:
            if self._name is None:
                raise RuntimeError("this scheme has no sender: init_on_sender comes first, or give it a sender's name")
            self.shared_transport = LatestTransport(Latest.attach(self._name))
        self.shared_transport.version = 0
        self.model_id, self._source = model_id, None
        if context is not None:
            self.context = context
            model = context.get_model(model_id) if hasattr(context, "get_model") else _resolve_model(context, model_id)
            worker_idx = getattr(context, "worker_idx", worker_idx)
        self.worker_idx = worker_idx
        if model is not None:
            self.model = model

    def _setup_connection_and_weights_on_receiver_impl(self, *, worker_idx: int | None = None) -> None:
        """Put the newest weights into the model."""
        weights = self.shared_transport.setup_connection_and_weights_on_receiver(worker_idx=worker_idx)
        if self.model is not None:
            self._strategy.apply_weights(self.model, weights, inplace=False)  # it may be on the device "meta"

    def receive(self, timeout: float | None = None) -> Any:
        """Put the newest weights into the model, if they are newer than what it has.

        Args:
            timeout: in seconds, for newer ones; None waits for ever, 0 not at all.

        Returns:
            Them, as a TensorDict; None if there are none.

        Raises:
            EndOfChannel: if it waits, and no process is left that sends weights.
            ChannelClosed: after `shutdown`.
        """
        transport = self.shared_transport
        if timeout == 0 and transport.latest.version == transport.version:
            return None
        if self.model_id == "policy":
            return super().receive(timeout)  # which also tells the collector, and those below it
        return transport.receive_weights(timeout, model=self.model, strategy=self._strategy)

    @property
    def weights(self) -> Any:
        """What was received or sent is in the model alone."""
        return None

    @property
    def model(self) -> Any:
        """What gets the weights, or whose weights are sent."""
        return WeightSyncScheme.model.fget(self)

    @model.setter
    def model(self, model: Any) -> None:
        WeightSyncScheme.model.fset(self, model)
        while self._hooks:
            self._hooks.pop().remove()
        if isinstance(model, torch.nn.Module):
            refresh = _Refresh(self)
            self._hooks.append(model.register_forward_pre_hook(refresh))
            self._hooks.append(model.register_state_dict_pre_hook(refresh))  # type: ignore[no-untyped-call, unused-ignore]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_hooks": [], "_source": None}

    def shutdown(self) -> None:
        """Close the Latest, and follow it no more. The model keeps the weights that it has."""
        while getattr(self, "_hooks", None):
            self._hooks.pop().remove()
        super().shutdown()
        if self._shared_transport is not None:
            self._shared_transport.latest.close()
