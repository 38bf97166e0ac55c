"""A channel whose spec is that of a TensorDict takes and gives TensorDicts."""

from __future__ import annotations

import gc
import json
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from support.tracer import Tracer
from support.workers import Crew, each_step, finish, in_segment, may_fork, script

import ringshm
from ringshm import Channel, Latest, SpecMismatch

torch: Any = pytest.importorskip("torch")
tensordict: Any = pytest.importorskip("tensordict")
from tensordict import (  # noqa: E402
    LazyStackedTensorDict,
    NonTensorData,
    NonTensorStack,
    TensorDict,
    TensorDictParams,
    tensorclass,
)

import ringshm.torch  # noqa: E402
from ringshm.messages.specs import Spec  # noqa: E402
from ringshm.messages.tensordicts import MEMORY, TensorDictSpec, spec_of_text  # noqa: E402

pytestmark = may_fork


def _step(seed: int = 0, size: tuple[int, ...] = (), device: str | None = None) -> Any:
    """What a collector gives: nested, with scalars, flags, an empty branch, and a dtype that NumPy lacks."""
    make = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Any:
        return torch.rand((*size, *shape), generator=make)

    following = TensorDict({"pixels": (drawn(2, 3) * 255).to(torch.uint8), "reward": drawn(1)}, [*size])
    return TensorDict(
        {
            "observation": drawn(4), "log_prob": drawn(), "done": drawn(1) > 0.5, "next": following,
            "hidden": TensorDict({"half": drawn(3).to(torch.bfloat16), "none": TensorDict({}, [*size])}, [*size]),
        },
        [*size], device=device,
    )  # fmt: skip


def _assert_same(one: Any, other: Any, *, devices: bool = True) -> None:
    assert type(one) is TensorDict
    assert one.batch_size == other.batch_size
    assert not devices or one.device == other.device
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert (value.dtype, value.shape) == (other[name].dtype, other[name].shape), name
            assert value.equal(other[name]), name
        else:
            _assert_same(value, other[name], devices=devices)


def _tensors(message: Any) -> list[Any]:
    return [*message.values(True, True)]


@pytest.fixture(params=[(), (5,), (2, 3)], ids=str)
def size(request: Any) -> tuple[int, ...]:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_what_is_put_is_got(size: tuple[int, ...], device: str | None) -> None:
    with Channel(2, spec=ringshm.torch.spec(_step(0, size, device))) as channel:
        for seed in range(3):
            sent = _step(seed, size, device)
            channel.put(sent)
            got = channel.get()
            _assert_same(got, sent)
            for tensor in _tensors(got):
                assert not in_segment(tensor.data_ptr(), channel.name)
                tensor.zero_()  # its owner's
            got["more"] = torch.zeros(*size, 2)
            got["next", "reward"] = torch.ones(*size, 1)
            _assert_same(sent, _step(seed, size, device))


def test_several_are_got_as_one(size: tuple[int, ...]) -> None:
    steps = [_step(seed, size) for seed in range(8)]
    with Channel(8, spec=ringshm.torch.spec(steps[0])) as channel:
        assert channel.put_many(steps) == 8
        for first, n in ((0, 3), (3, 5)):
            batch = channel.get_batch(n)
            _assert_same(batch, torch.stack(steps[first : first + n]).contiguous())
            assert batch.batch_size == (n, *size)
        assert channel.put_batch(torch.stack(steps).contiguous()) == 8
        _assert_same(channel.get(), steps[0])
        out = torch.stack(steps[:4]).contiguous().apply(torch.zeros_like)
        batch = channel.get_batch(4, out=out)
        _assert_same(batch, torch.stack(steps[1:5]).contiguous())
        _assert_same(out, batch)
        fewer = channel.get_batch(4, min=1, timeout=0.01)
        _assert_same(fewer, torch.stack(steps[5:]).contiguous())


def test_one_is_received_into_a_tensordict_that_the_caller_has(size: tuple[int, ...]) -> None:
    sent, out = _step(1, size), _step(2, size)
    with Channel(2, spec=ringshm.torch.spec(sent)) as channel:
        channel.put(sent)
        got = channel.get(out=out)
        _assert_same(out, sent)
        assert [tensor.data_ptr() for tensor in _tensors(got)] == [tensor.data_ptr() for tensor in _tensors(out)]
        channel.put(sent)
        with pytest.raises(SpecMismatch, match=r"field 'next\.reward' is missing"):
            channel.get(out=out.exclude(("next", "reward")))
        assert channel.qsize() == 1


def test_a_borrowed_one_is_views_which_keep_the_slot(size: tuple[int, ...]) -> None:
    sent = _step(1, size)
    with Channel(2, spec=ringshm.torch.spec(sent)) as channel:
        channel.put(sent)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with channel.borrow() as message:
                _assert_same(message.value, sent)
                assert message["next"]["reward"].equal(sent["next", "reward"])
                with pytest.raises(SpecMismatch, match="has no field 'nxt', did you mean 'next'"):
                    message["nxt"]
                assert all(in_segment(tensor.data_ptr(), channel.name) for tensor in _tensors(message.value))
                view = message.value["next"]
        for seed in range(5):
            channel.put(_step(seed, size))
            channel.get()
        _assert_same(view, sent["next"])
        assert [slot.state for slot in channel.stats().slots] == ["kept"]
        del view
        gc.collect()
        assert channel.stats().slots == ()


def test_a_latest_gives_them() -> None:
    first, second = _step(1), _step(2)
    with Latest(spec=ringshm.torch.spec(first), borrows=1) as latest:
        latest.publish(first)
        with latest.borrow() as held:
            _assert_same(held.value, first)
            assert latest.publish(second) == 2
            version, value = latest.read()  # a copy without a pin: no further version may be held
            assert version == 2
            _assert_same(value, second)
        _assert_same(latest.read()[1], second)


def test_others_like_it_are_taken() -> None:
    @tensorclass
    class Pair:
        a: torch.Tensor
        b: torch.Tensor

    plain = TensorDict({"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}, [2])
    likes = [
        TensorDict({"b": plain["b"], "a": plain["a"]}, [2]),
        Pair(a=plain["a"], b=plain["b"], batch_size=[2]),
        LazyStackedTensorDict(*plain.unbind(0)),
        plain.clone().lock_(),
        plain.clone().memmap_(),
        TensorDictParams(plain.clone(), no_convert=True),
        TensorDict({"a": plain["a"].T.contiguous().T, "b": plain["b"].repeat(2)[::2].clone()}, [2]),
        {"a": plain["a"].numpy(), "b": [1, 2]},
    ]
    likes[-2]["b"] = plain["b"]
    for made_of in (plain, *likes[:3]):
        with Channel(1, spec=ringshm.torch.spec(made_of)) as channel:
            for like in likes:
                channel.put(like)
                got = channel.get()
                assert type(got) is TensorDict
                assert got.batch_size == (2,)
                assert got["a"].equal(plain["a"])
                assert got["b"].equal(plain["b"])


@pytest.mark.parametrize("dtype", MEMORY)
def test_any_dtype_travels(dtype: str) -> None:
    kind = getattr(torch, dtype)
    bits = torch.arange(2 * 3 * kind.itemsize, dtype=torch.uint8).reshape(2, -1)
    tensor = bits.to(torch.bool) if dtype == "bool" else bits.view(kind)
    sent = TensorDict({"x": tensor, "y": torch.zeros(2)}, [2])
    with Channel(3, spec=ringshm.torch.spec(sent)) as channel:
        channel.put_many([sent] * 3)
        with channel.borrow() as message:
            views = message.value["x"]
            assert views.dtype == kind
            assert views.view(torch.uint8).equal(tensor.view(torch.uint8))
        batch = channel.get_batch(2)
        del views, message
    assert batch["x"].dtype == kind
    assert all(row.view(torch.uint8).equal(tensor.view(torch.uint8)) for row in batch["x"])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_conjugates_travel_as_what_they_are() -> None:
    x = torch.view_as_complex(torch.rand(3, 2))
    sent = TensorDict({"x": x}, [3])
    with Channel(1, spec=ringshm.torch.spec(sent)) as channel:
        channel.put(TensorDict({"x": x.conj()}, [3]))
        assert channel.get()["x"].equal(x.conj().resolve_conj())


def _other(**changes: Any) -> Any:
    message = _step()
    for name, value in changes.items():
        path = tuple(name.split("__"))
        if value is None:
            del message[path]
        else:
            message._set_tuple(path, value, inplace=False, validated=True, non_blocking=False)
    return message


def _nested() -> Any:
    """A tensor whose rows differ in length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


def _ragged() -> Any:
    """A stack of TensorDicts whose tensors differ in shape."""
    return LazyStackedTensorDict(TensorDict({"x": torch.zeros(2)}), TensorDict({"x": torch.zeros(3)}))


def _uneven() -> Any:
    """A stack of TensorDicts of which one has an entry more: the stack itself does not show it."""
    one = TensorDict({"x": torch.zeros(2)})
    return LazyStackedTensorDict(one, one.clone().set("more", torch.zeros(1)))


def _texts() -> Any:
    """What becomes of texts in TensorDicts that are stacked."""
    return NonTensorStack(NonTensorData("one"), NonTensorData("two"))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: _other(next__reward=None), "field 'next.reward' is missing"),
        (lambda: _other(observations=torch.zeros(4)), "message has no field 'observations', did you mean"),
        (lambda: _other(next__reward=torch.zeros(2)), r"'next.reward' holds a tensor of float32 \(1,\), not a "
                                                      r"Tensor of float32 \(2,\) on cpu"),
        (lambda: _other(next__reward=torch.zeros(1).double()), r"'next.reward' .*, not a Tensor of float64 \(1,\)"),
        (lambda: _other(hidden__half=torch.zeros(3).to(torch.int16)), r"field 'hidden.half' holds a tensor of bfloat16 "
                                                                      r"\(3,\), not a Tensor of int16"),
        (lambda: _other(hidden__half=torch.zeros(3, device="meta").bfloat16()), r"'hidden.half'.*send .cpu\(\)"),
        (lambda: _other(observation=torch.zeros(4, device="meta")), r"'observation'.* on meta: .*send .cpu\(\)"),
        (lambda: _other(observation=torch.zeros(4, requires_grad=True)), r"'observation'.*send .detach\(\)"),
        (lambda: _other(observation=torch.zeros(4).to_sparse()), "field 'observation' holds"),
        (lambda: _other(observation=NonTensorData("text")), "field 'observation' .* not a NonTensorData"),
        (lambda: _other(observation=TensorDict({}, [])), "field 'observation' .* not a TensorDict"),
        (lambda: _other(observation=_nested()), r"field 'observation' .*, not a Tensor of float32 nested on cpu"),
        (lambda: _other(next=torch.zeros(3)), r"field 'next' is a TensorDict, not a Tensor of float32 \(3,\)"),
        (lambda: _other(hidden__none=TensorDict({"x": torch.zeros(1)}, [])), "field 'hidden.none' has no field 'x'"),
        (lambda: _step(0, (2,)), r"message has batch_size \[\], not \[2\]"),
        (lambda: _other(next=_step(0, (1,))["next"]), r"field 'next' has batch_size \[\], not \[1\]"),
        (lambda: 3, "message is a mapping of 'observation', .*, not int 3"),
    ],
)  # fmt: skip
def test_what_differs_is_named_and_nothing_is_sent(make: Any, text: str) -> None:
    with Channel(2, spec=ringshm.torch.spec(_step()), name="differs") as channel:
        for call in (channel.put, lambda message: channel.put_many([message])):
            with pytest.raises(SpecMismatch, match=text) as raised:
                call(make())
            assert str(raised.value).startswith("channel 'differs': ")
        assert channel.qsize() == 0
        channel.put(_step())
        _assert_same(channel.get(), _step())


def test_what_a_handler_raises_is_not_taken_for_pytorchs() -> None:
    raised, message = RuntimeError("of a handler"), _step()

    def handle() -> None:
        raise raised

    for step in each_step(500):
        with Channel(2, spec=ringshm.torch.spec(message)) as channel:
            caught = None
            functions = ("_take_apart", "_array_of", "_items", "as_array", "bits_of")
            with Tracer(handle, step, folders=("messages",), functions=functions, lines=True) as steps:
                try:
                    channel.put(message)
                except Exception as error:
                    caught = error
            assert caught is (raised if steps.count >= step else None), f"step {step}: {caught!r}"
            channel.put(message)
            _assert_same(channel.get(), message)
        if steps.count < step:
            break
    assert step > 20


def test_stacks_of_what_is_no_tensor_or_differs_in_shape_are_refused() -> None:
    some = TensorDict({"x": torch.zeros(2)}, [2])
    sent = TensorDict({"x": torch.zeros(2, 3), "none": TensorDict({}, [2]), "some": some}, [2])
    with Channel(2, spec=ringshm.torch.spec(sent)) as channel:
        for name, stack, text in (
            ("none", _texts(), "field 'none' is a TensorDict, not a NonTensorStack"),
            ("some", _texts(), "field 'some.x' is missing"),
            ("some", _ragged(), "field 'some' has entries that cannot be stacked: "),
            ("some", _uneven(), "field 'some' .*: only some of the stacked TensorDicts have 'more'"),
        ):
            other = sent.copy()
            other[name] = stack
            with pytest.raises(SpecMismatch, match=text):
                channel.put(other)
        assert channel.qsize() == 0


def test_a_batch_that_differs_is_named() -> None:
    steps = torch.stack([_step(seed) for seed in range(3)]).contiguous()
    with Channel(4, spec=ringshm.torch.spec(_step())) as channel:
        for batch, text in (
            (_step(), r"message has batch_size \[n\], not \[\]"),
            (_step(0, (2, 2)), r"message has batch_size \[n\], not \[2, 2\]"),
            (steps.exclude("done"), "field 'done' is missing"),
        ):
            with pytest.raises(SpecMismatch, match=text):
                channel.put_batch(batch)
        channel.put_batch(steps)
        with pytest.raises(SpecMismatch, match=r"field 'observation' .*out needs shape \(3 or more, 4\)"):
            channel.get_batch(3, out=steps[:2])
        assert channel.qsize() == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: PyTorch finds no CUDA device")
def test_tensors_on_a_gpu_are_refused_and_their_spec_is_of_the_cpu() -> None:
    there = _step().to("cuda")
    with Channel(2, spec=ringshm.torch.spec(there)) as channel:
        with pytest.raises(SpecMismatch, match=r"on cuda:0: .*send \.cpu\(\)"):
            channel.put(there)
        channel.put(there.cpu())
        _assert_same(channel.get(), _step(device="cpu"))


def test_a_spec_is_made_of_tensors_alone() -> None:
    for wrong, text in (
        (NonTensorData("text"), "entry 'next.x' is a NonTensorData, neither a tensor nor a TensorDict: leave it out"),
        (torch.eye(3).to_sparse(), "'next.x' is a tensor of torch.float32, torch.sparse_coo, which does not travel"),
        (_nested(), "'next.x' is a tensor of torch.float32, nested, torch.strided, which does not travel"),
        (_texts(), "entry 'next.x' is a NonTensorStack, neither a tensor nor a TensorDict: leave it out"),
        (_ragged(), "entry 'next.x' has entries that cannot be stacked: "),
        (_uneven(), "entry 'next.x' .*: only some of the stacked TensorDicts have 'more'"),
    ):
        with pytest.raises(TypeError, match=text):
            ringshm.torch.spec(_other(next__x=wrong))


def test_a_spec_without_bytes_is_refused() -> None:
    for wrong, text in (
        (TensorDict({}, [3]), "spec is empty"),
        (TensorDict({"x": torch.zeros(0, 3)}, [0]), r"of batch_size \[0\].* holds no bytes"),
        (_ragged(), "the TensorDict has entries that cannot be stacked: "),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            ringshm.torch.spec(wrong)


def test_a_spec_is_kept_as_it_is() -> None:
    spec = ringshm.torch.spec(_step(0, (2,)))
    assert isinstance(spec, TensorDictSpec)
    assert spec == ringshm.torch.spec(_step(3, (2,)))
    for other in (_step(0, (3,)), _step(0, (2,), "cpu"), _step(0, (2,)).exclude("done")):
        assert spec != ringshm.torch.spec(other)
    assert Spec(spec) != spec  # of dicts
    assert ringshm.spec_like(spec) is spec
    assert spec_of_text(spec.to_text()) == pickle.loads(pickle.dumps(spec)) == spec
    assert repr(spec).startswith("<spec of TensorDicts of batch_size [2]: Spec({'observation': ('float32', (2, 4))")
    with Channel(1, spec=spec) as channel:
        assert channel.spec == spec
        Channel.attach(channel.name, spec=spec).close()
        with pytest.raises(SpecMismatch):
            Channel.attach(channel.name, spec=Spec(spec))


def test_a_text_that_is_none_is_refused() -> None:
    text = ringshm.torch.spec(_step(0, (2,))).to_text()
    sound = json.loads(text)
    for change in (
        {"device": "cuda"}, {"device": 3}, {"tensordict": [[2], []]}, {"tensordict": [[-1], [["x", "bool", [-1]]]]},
        {"tensordict": [[True], [["x", "bool", [1]]]]}, {"tensordict": [[3], [["x", "bool", [2]]]]},
        {"tensordict": [[], [["x", "os.system", [2]]]]}, {"tensordict": [[], [[3, "bool", [2]]]]},
        {"tensordict": [[], [["x", [1], []], ["y", "bool", []]]], "more": 1}, {"tensordict": 3},
        {"tensordict": [[], [[]]]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="is no spec"):
            spec_of_text(json.dumps({**sound, **change}, separators=(",", ":")))
    deep: Any = [[], [["x", "bool", []]]]
    for _ in range(40):
        deep = [[], [["d", *deep]]]
    for wrong in (
        text[:-1], text.replace("[2]", "[2 ]", 1), json.dumps({"device": None, "tensordict": deep}),
        '{"tensordict":' + "[" * 100_000,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="is no spec"):
            spec_of_text(wrong)


# --- other processes


def _double(name: str, answers: Channel) -> None:
    with Channel.attach(name, timeout=50) as tasks:  # which says what the messages are
        for step in tasks:
            step["observation"] *= 2
            answers.put(step)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_they_pass_between_processes(method: str) -> None:
    spec = ringshm.torch.spec(_step(0, (3,)))
    with Channel(2, spec=spec) as tasks, Channel(2, spec=spec) as answers, Crew(method) as crew:
        crew.start(_double, tasks.name, answers.sender())
        for seed in range(5):
            sent = _step(seed, (3,))
            tasks.put(sent)
            got = answers.get(timeout=100)
            sent["observation"] *= 2
            _assert_same(got, sent)
        tasks.shutdown()


def test_a_process_without_tensordict_is_told_what_it_needs() -> None:
    with Channel(2, spec=ringshm.torch.spec(_step())) as channel:
        source = f"""
import sys
sys.modules["tensordict"] = None
from ringshm import Channel
try:
    Channel.attach({channel.name!r})
except ImportError as error:
    print(error)
"""
        told = finish(script(source))
        assert "whose messages are TensorDicts, needs tensordict, which is in the extra [torchrl]" in told
        channel.put(_step())
        _assert_same(channel.get(), _step())


def test_a_message_of_a_typed_channel_is_damaged_as_any_other() -> None:
    """The bytes that a TensorDict is made of are not looked at, but for flags: NumPy's, too, take any."""
    sent = TensorDict({"x": torch.arange(4), "flag": torch.tensor(True)}, [])
    with Channel(2, spec=ringshm.torch.spec(sent)) as channel:
        channel.put({"x": np.arange(4), "flag": np.bool_(True)})
        _assert_same(channel.get(), sent)
