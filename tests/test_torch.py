"""PyTorch's tensors travel as arrays do: copied once, never inside a pickle; under `borrow` they are views."""

from __future__ import annotations

import gc
import pickle
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from support.checks import check_full
from support.workers import Crew, exit_code, finish, fork_off, in_segment, may_fork, script

import ringshm
from ringshm import Channel, Latest, SpecMismatch, UpTo

torch: Any = pytest.importorskip("torch")
import ringshm.torch  # noqa: E402

pytestmark = may_fork

DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "float16", "bfloat16", "float32", "float64"),
    *("complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
)
FORMS = {
    "contiguous": lambda t: t, "transposed": lambda t: t.transpose(0, 2), "strided": lambda t: t[1:, ::2, 1:2],
    "expanded": lambda t: t[:1].expand(5, 6, 3), "0-d": lambda t: t[1, 2, 0], "empty": lambda t: t[:0],
    "conjugate": lambda t: t.conj(),
}  # fmt: skip


def _same(one: Any, other: Any) -> bool:
    wide = torch.complex128
    return one.dtype == other.dtype and one.shape == other.shape and bool((one.to(wide) == other.to(wide)).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_arrives_as_it_was_sent(dtype: str, form: str) -> None:
    tensor = FORMS[form](torch.randint(0, 2, (4, 6, 3)).to(getattr(torch, dtype)))
    with Channel(2, "4KiB") as channel:
        for message, found in ((tensor, lambda got: got), ({"a": [tensor, 1]}, lambda got: got["a"][0])):
            channel.put(message)
            got = found(channel.get())
            assert type(got) is torch.Tensor
            assert _same(got, tensor)
            assert not got.numel() or not in_segment(got.data_ptr(), channel.name)
            if got.numel():
                got.view(-1)[0] = 1  # its owner's
            channel.put(message)
            with channel.borrow() as borrow:
                view = found(borrow.value)
                assert _same(view, tensor)
                assert not view.numel() or in_segment(view.data_ptr(), channel.name)
            del view


def test_a_tensors_data_are_not_in_the_pickle() -> None:
    """Nor are they copied before: what a codec makes of a tensor refers to its memory."""
    tensor = torch.arange(100_000, dtype=torch.bfloat16)
    with Channel(1, "1MB") as channel:
        meta, parts, _ = channel._codec.encode({"t": tensor})
        sources = [source for _, source in parts._parts]
        mine = [np.frombuffer(source, np.uint8) for source in sources if len(source) == tensor.nbytes]
        assert [array.ctypes.data for array in mine] == [tensor.data_ptr()]
        assert sum(len(source) for source in sources) - tensor.nbytes < 300
        assert meta >> 16 < tensor.nbytes + 400


def test_views_of_a_borrowed_tensor_keep_the_slot() -> None:
    with Channel(2, "64KiB") as channel:
        channel.put(torch.full((1000,), 7))
        with channel.borrow() as borrow:
            view = borrow.value[10:].reshape(30, 33)[::2]
        for k in range(20):
            channel.put(torch.full((1000,), k))
            assert channel.get()[0] == k
            assert (view == 7).all()
        assert [slot.state for slot in channel.stats().slots] == ["kept"]
        del view
        gc.collect()
        assert channel.stats().slots == ()


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_tensor_made_of_a_borrowed_array_keeps_the_slot() -> None:
    with Channel(1, 64) as channel:
        channel.put(np.arange(8))
        with channel.borrow() as borrow:
            tensor = torch.from_numpy(borrow.value)[2:].reshape(2, 3)
        check_full(channel.put, np.zeros(8, int), timeout=0.01)
        assert tensor.tolist() == [[2, 3, 4], [5, 6, 7]]
        del tensor
        channel.put(np.zeros(8, int), timeout=5)


def test_get_copies_into_tensors_that_the_caller_has() -> None:
    with Channel(2, "4KiB") as channel:
        sent, out = torch.arange(6.0).reshape(2, 3), torch.zeros(2, 3)
        channel.put(sent)
        assert channel.get(out=out) is out
        assert out.equal(sent)
        channel.put({"a": sent * 2, "b": np.arange(3), "c": "text"})
        mine, array = torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)
        got = channel.get(out={"a": mine, "b": array})
        assert got["a"] is mine
        assert mine.equal(sent * 2)
        assert array.tolist() == [0, 1, 2]
        assert got["c"] == "text"
        channel.put({"a": sent})
        for wrong, text in (
            (torch.zeros(3, 2), r"shape \(3, 2\)"),
            (torch.zeros(2, 3, dtype=torch.float64), "float64"),
        ):
            with pytest.raises(SpecMismatch, match=text):
                channel.get(out={"a": wrong})
        assert channel.qsize() == 1


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: torch.ones(3, requires_grad=True), "requires grad, which does not travel: send .detach()"),
        (lambda: torch.ones(3, requires_grad=True) * 2, "requires grad, which does not travel: send .detach()"),
        (lambda: torch.ones(3, device="meta"), r"is on meta, not on the CPU: send .cpu()"),
    ],
)
def test_what_is_not_plain_data_is_refused(make: Any, text: str) -> None:
    with Channel(2, "4KiB") as channel:
        with pytest.raises(TypeError) as raised:
            channel.put({"t": make()})
        assert text in str(raised.value)
        assert channel.qsize() == 0


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # PyTorch 2.11 warns of its own unpickling
def test_what_is_made_of_tensors_travels_as_pytorch_has_it() -> None:
    module = torch.nn.Linear(30, 20).to(torch.bfloat16)
    with Channel(2, "64KiB") as channel:
        channel.put(module)
        got = channel.get()
        assert got.weight.requires_grad
        assert _same(got.weight.detach(), module.weight.detach())
        channel.put(torch.eye(50).to_sparse())
        assert channel.get().to_dense().equal(torch.eye(50))
        with pytest.raises(TypeError, match=r"torch\.Tensor"), Channel(2, "4KiB", codec="plain") as plain:
            plain.put(torch.ones(3))


def _double(tasks: Channel, answers: Channel) -> None:
    for tensor in tasks:
        answers.put(tensor * 2)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_tensors_pass_between_processes(method: str) -> None:
    with Channel(2, "4KiB") as tasks, Channel(2, "4KiB") as answers, Crew(method) as crew:
        crew.start(_double, tasks.receiver(), answers.sender())
        for k in range(5):
            tasks.put(torch.full((3, 4), k, dtype=torch.bfloat16))
            assert answers.get(timeout=50).equal(torch.full((3, 4), 2 * k, dtype=torch.bfloat16))
        tasks.shutdown()


def test_nothing_is_imported_that_the_user_did_not_import() -> None:
    source = """
import sys, numpy as np, ringshm
with ringshm.Channel(2, 1000) as channel, ringshm.Latest(1000) as latest:
    channel.put({"a": np.arange(3), "b": object})
    channel.get()
    latest.publish([np.arange(3)])
    latest.read()
print([name for name in ("torch", "jax", "jaxlib", "ml_dtypes") if name in sys.modules])
"""
    assert finish(script(source)) == "[]\n"


# --- typed slots


def test_fields_take_tensors_and_give_views() -> None:
    spec = ringshm.spec_like({"obs": torch.zeros(4, 3), "done": torch.tensor(False), "n": torch.tensor(1)})
    assert spec == ringshm.Spec({"obs": (np.float32, (4, 3)), "done": np.bool_, "n": np.int64})
    with Channel(2, spec=spec) as channel:
        obs = torch.rand(3, 4)
        channel.put({"obs": obs.T, "done": torch.tensor(True), "n": torch.tensor(5)})
        with channel.borrow() as message:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, of memory that is read-only
                view = torch.from_numpy(message["obs"])
            assert view.equal(obs.T)
            assert in_segment(view.data_ptr(), channel.name)
        with channel.loan() as loan:
            loan["obs"] = obs.T * 2
            torch.from_numpy(loan["obs"])[0] = 7
            loan["done"], loan["n"] = False, 3
        got = channel.get()
        del view
        assert torch.from_numpy(got["obs"])[1:].equal(obs.T[1:] * 2)
        assert (got["obs"][0] == 7).all()
        with pytest.raises(SpecMismatch, match=r"field 'obs' .*send \.detach\(\)"):
            channel.put({"obs": obs.T.clone().requires_grad_(), "done": True, "n": 1})
        assert channel.qsize() == 0


def test_a_trajectory_of_tensors_may_be_shorter() -> None:
    with Channel(2, spec={"steps": (np.float32, (UpTo(10), 2))}) as channel:
        channel.put({"steps": torch.ones(3, 2)})
        assert channel.get()["steps"].shape == (3, 2)


# --- modules


def _module(seed: int = 0, dtype: Any = None) -> Any:
    torch.manual_seed(seed)
    last = torch.nn.Linear(64, 2).to(dtype or torch.bfloat16)
    return torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.BatchNorm1d(64), last)


def _equal(one: Any, other: Any) -> bool:
    return all(a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("typed", [True, False])
def test_a_modules_weights_are_published_and_loaded(typed: bool) -> None:
    module, other = _module(1), _module(2)
    with Latest(None if typed else "64KiB", spec=ringshm.torch.spec(module) if typed else None) as latest:
        assert ringshm.torch.publish(latest, module) == 1
        assert not _equal(module, other)
        weight = other[0].weight
        assert ringshm.torch.load_into(latest, other, timeout=0) == 1
        assert _equal(module, other)
        assert other[0].weight is weight
        assert weight.requires_grad
        assert ringshm.torch.publish(latest, _module(3).state_dict()) == 2
        assert ringshm.torch.load_into(latest, other, newer_than=1) == 2
        assert _equal(_module(3), other)
        assert latest.stats().held == ()


@pytest.mark.parametrize("typed", [True, False])
def test_weights_of_another_module_are_refused_and_nothing_is_changed(typed: bool) -> None:
    module = _module(1)
    with Latest(None if typed else "64KiB", spec=ringshm.torch.spec(module) if typed else None) as latest:
        ringshm.torch.publish(latest, module)
        wider = torch.nn.Sequential(torch.nn.Linear(4, 65), *module[1:])
        for other, text in (
            (torch.nn.Linear(4, 64), r"lacks \['bias', 'weight'\]"),
            (wider, r"'0.weight' is .*\(64, 4\), in the module it is torch.float32 \(65, 4\)"),
            (_module(2, torch.float16), r"'2.weight' is .*, in the module it is torch.float16"),
        ):
            before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
            with pytest.raises(SpecMismatch, match=text):
                ringshm.torch.load_into(latest, other)
            assert all(before[name].equal(tensor) for name, tensor in other.state_dict().items())
        if typed:
            with pytest.raises(SpecMismatch, match=r"0\.weight"):
                ringshm.torch.publish(latest, wider)
            assert latest.version == 1
        with pytest.raises(TypeError, match="source=3"):
            ringshm.torch.publish(latest, 3)
        with pytest.raises(TypeError, match="'x' is a int, no tensor"):
            ringshm.torch.spec({"x": 3})


def test_weights_are_loaded_though_no_further_version_may_be_held() -> None:
    module, other = _module(1), _module(2)
    with Latest(spec=ringshm.torch.spec(module), borrows=1) as latest:
        ringshm.torch.publish(latest, module)
        with latest.borrow() as _held:
            ringshm.torch.publish(latest, _module(3))
            assert ringshm.torch.load_into(latest, other) == 2
            assert _equal(_module(3), other)


def test_a_forked_actor_follows_the_weights() -> None:
    module = _module(1)
    with Latest(spec=ringshm.torch.spec(module)) as latest:

        def act() -> None:
            mine, version = _module(0), 0
            while version < 5:
                version = ringshm.torch.load_into(latest, mine, newer_than=version, timeout=50)
                assert _equal(mine, _module(version))

        actor = fork_off(act)
        for k in range(1, 6):
            ringshm.torch.publish(latest, _module(k))
        assert exit_code(actor) == 0


# --- CUDA


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_pinning_without_a_gpu_says_so() -> None:
    with Channel(2, 100) as channel, pytest.raises(RuntimeError, match="finds no CUDA device"):
        ringshm.torch.pin(channel)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: PyTorch finds no CUDA device")
@pytest.mark.parametrize("kind", ["channel", "latest"])
def test_a_pinned_rings_views_are_copied_to_the_gpu_without_waiting(kind: str) -> None:
    spec = {"obs": (np.uint8, (64, 84, 84, 4))}
    obs = np.random.default_rng(1).integers(0, 255, (64, 84, 84, 4), np.uint8)
    with Channel(2, spec=spec) if kind == "channel" else Latest(spec=spec) as handle:
        ringshm.torch.pin(handle)
        ringshm.torch.pin(handle)  # once is enough
        (handle.put if kind == "channel" else handle.publish)({"obs": obs})
        with handle.borrow() as message:
            view = torch.from_numpy(ringshm.messages.tensors.unprotected(message["obs"]))
            assert view.is_pinned()
            there = view.to("cuda", non_blocking=True)
            torch.cuda.synchronize()
        assert there.cpu().equal(torch.from_numpy(obs))


def test_importing_this_module_needs_no_gpu() -> None:
    assert pickle.loads(pickle.dumps(ringshm.torch.load_into)) is ringshm.torch.load_into
    assert "ringshm.torch" in sys.modules


class Steps(torch.utils.data.IterableDataset):  # type: ignore[misc]
    """What comes out of a channel, in each worker of a DataLoader."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel

    def __iter__(self) -> Any:
        return iter(self.channel)


def _act(sender: Any) -> None:
    for _ in range(20):
        sender.put(torch.zeros(4))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_data_loader_starts_its_workers_after_the_creator_has_closed(method: str) -> None:
    channel = Channel(8, "4KiB")
    with Crew("fork") as crew:
        for _ in range(2):
            crew.start(_act, channel.sender())
        steps = Steps(channel.receiver())
        loader = torch.utils.data.DataLoader(steps, batch_size=10, num_workers=2, multiprocessing_context=method)
        channel.close()  # the workers start below, by a handle that the DataLoader has held
        assert sum(len(batch) for batch in loader) == 40
        steps.channel.close()
