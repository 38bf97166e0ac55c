"""Channels with a spec: messages of fixed fields, in place, by copy, and stacked into batches."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest
from support.checks import check_empty
from support.tracer import in_python
from support.workers import METHODS, Crew, may_fork, until

from ringshm import Batch, Channel, ChannelCorrupted, EndOfChannel, Receiver, Spec, SpecMismatch, UpTo
from ringshm.segment.files import path_of
from ringshm.segment.layout import Layout

pytestmark = may_fork

SPEC = {"obs": (np.uint8, (4, 3)), "action": np.int64, "info": {"reward": np.float32, "name": "U5"}}
RAGGED = {"steps": (np.float32, (UpTo(5), 2)), "done": bool}


def message(k: int) -> dict[str, Any]:
    info = {"reward": np.float32(k / 2), "name": f"n{k}"}
    return {"obs": np.full((4, 3), k % 256, np.uint8), "action": k, "info": info}


def ragged(k: int) -> dict[str, Any]:
    return {"steps": np.full((k % 6, 2), k, np.float32), "done": bool(k % 2)}


def same(one: Any, other: Any) -> bool:
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in other)
    return np.array_equal(one, other)


# --- the spec of a channel


def test_a_channel_takes_a_slot_size_or_a_spec() -> None:
    with Channel(2, spec=SPEC) as channel:
        assert channel.spec == Spec(SPEC)
        assert channel.slot_size == Spec(SPEC).slot_size
    with Channel(2, 64) as channel:
        assert channel.spec is None
    for arguments in ({}, {"slot_size": 64, "spec": SPEC}):
        with pytest.raises(TypeError, match="slot_size or spec"):
            Channel(2, **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="codec='plain' and spec"):
        Channel(2, spec=SPEC, codec="plain")
    with pytest.raises((TypeError, ValueError), match="obs"):
        Channel(2, spec={"obs": object})


def test_attaching_finds_the_spec_and_refuses_another_and_shows_both() -> None:
    with Channel(2, spec=SPEC) as channel, Channel(2, 64) as plain:
        with Channel.attach(channel.name) as attached, Channel.attach(channel.name, spec=SPEC) as checked:
            assert attached.spec == checked.spec == channel.spec
            attached.put(message(3))
            assert same(checked.get(), message(3))
        with pytest.raises(SpecMismatch) as caught:
            Channel.attach(channel.name, spec={"pixels": (np.int8, 7)})
        for part in (channel.name, "obs", "uint8 (4, 3)", "info.name", "pixels", "int8 (7,)"):
            assert part in str(caught.value)
        with pytest.raises(SpecMismatch, match="has no spec"):
            Channel.attach(plain.name, spec=SPEC)
        assert len(channel.stats().participants) == len(plain.stats().participants) == 1


def _attach(name: str) -> str:
    try:
        Channel.attach(name).close()
    except ChannelCorrupted as error:
        return str(error)
    return "attached"


@pytest.mark.parametrize("damage", [b"\0", b"{", Spec({"a": np.int8}).to_text().encode()])
def test_a_damaged_spec_is_refused(damage: bytes) -> None:
    with Channel(2, spec=SPEC) as channel, Crew("spawn") as crew:
        layout = Layout(2, channel.slot_size, 256, len(Spec(SPEC).to_text()))
        with open(path_of(channel.name), "r+b") as file:
            file.seek(layout.spec)
            file.write(damage.ljust(layout.spec_nbytes, b" "))
        assert "spec" in crew.start(_attach, channel.name).result()


# --- messages


@pytest.mark.parametrize(("spec", "make"), [(SPEC, message), (RAGGED, ragged)])
@pytest.mark.parametrize("method", METHODS)
def test_messages_arrive_as_they_were_put(method: str, spec: Any, make: Any) -> None:
    with Channel(3, spec=spec) as channel, Crew(method) as crew:
        member = crew.start(_put_all, channel.sender(), make, 20)
        for k in range(20):
            received = channel.get()
            assert same(received, make(k))
            assert all(array.flags.writeable for array in received.values() if isinstance(array, np.ndarray))
        member.result()


def _put_all(sender: Any, make: Any, count: int) -> None:
    for k in range(count):
        sender.put(make(k))
    sender.close()


def test_a_message_of_another_form_is_refused_and_nothing_is_sent() -> None:
    with Channel(2, spec=SPEC) as channel:
        good = message(1)
        bad: list[tuple[Any, str]] = [
            ({**good, "obs": good["obs"].T}, "obs"), ({**good, "action": 1.5}, "action"),
            ({**good, "action": 2**63}, "action"), ({**good, "info": {"reward": 1.0}}, "info.name"),
            ({**good, "info": {"reward": 1.0, "name": "too long"}}, "info.name"), ({**good, "more": 1}, "more"),
            ({"obs": good["obs"]}, "action"), ([1, 2], "message"),
        ]  # fmt: skip
        for wrong, named in bad:
            for send in (channel.put, channel.put_nowait, lambda wrong: channel.put_many([good, wrong])):
                with pytest.raises(SpecMismatch, match=named) as caught:
                    send(wrong)
                assert channel.name in str(caught.value)
        assert channel.stats().sent == 0


def test_fields_are_written_and_read_in_place() -> None:
    with Channel(2, spec=SPEC) as channel:
        with channel.loan() as loan:
            loan["obs"][...] = 7
            loan["action"] = 5
            loan["info"]["reward"] = 0.5
            loan["info"]["name"] = "abc"
            array = loan["obs"]
            with pytest.raises(SpecMismatch, match="action"):
                loan["action"] = 1.5
            with pytest.raises(SpecMismatch, match="nothing"):
                loan["nothing"]
            for what in (lambda: loan.array(1), lambda: loan.buffer):
                with pytest.raises(TypeError, match="spec"):
                    what()
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1
        with channel.borrow() as borrow:
            assert (borrow["obs"] == 7).all()
            assert borrow["obs"].base is not None
            assert not borrow["obs"].flags.writeable
            assert (borrow["action"], borrow["info"]["reward"], borrow["info"]["name"]) == (5, 0.5, "abc")
            kept = borrow["obs"][1:]
        for k in range(6):
            channel.put(message(k))
            channel.get()
        assert (kept == 7).all()
        assert [slot.state for slot in channel.stats().slots] == ["kept"]


FLAT = {
    "small": np.int8, "word": np.uint64, "single": np.float32, "double": np.float64, "half": np.float16,
    "flag": bool, "complex": np.complex64, "swapped": ">i4", "date": "M8[s]", "text": "U3", "array": (np.int16, (2, 3)),
    "nothing": (np.int16, 0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("small", -128), ("small", 127), ("small", np.int8(5)), ("small", True), ("word", 2**64 - 1),
        ("word", 2**63 - 1), ("word", np.uint8(7)), ("single", 0.1), ("single", 3), ("single", -(2**24) - 1),
        ("single", float("inf")), ("single", float("nan")), ("single", np.float32(1.5)),
        ("double", 1e308), ("double", 2**53 + 1), ("half", 0.1),
        ("half", 7), ("flag", True), ("flag", np.bool_(False)), ("complex", 1j), ("complex", 2), ("swapped", 258),
        ("swapped", -1), ("date", np.datetime64("2024-05-06T07:08:09")), ("text", "abc"),
        ("array", np.ones((2, 3), "i2")), ("array", np.ones((3, 2), "i2").T), ("array", [[1, 2, 3], [4, 5, 6]]),
        ("nothing", []),
    ],
)  # fmt: skip
def test_what_a_loan_and_a_put_are_given_arrives_the_same(name: str, given: Any) -> None:
    """However it is sent, and received, and with the compiled path or without."""
    plain = {"word": 2**63, "single": 0.5, "flag": True, "complex": np.complex64(1j), "array": np.ones((2, 3), "i2")}
    message = {**plain, name: given}
    with Channel(8, spec={field: FLAT[field] for field in message}) as channel:
        with in_python():
            channel.put(message)
            expected = channel.get()
        received = []
        for sends_in_python, takes_in_python in itertools.product((False, True), repeat=2):
            with in_python(sends_in_python):
                channel.put(message)
                with channel.loan() as loan:
                    for field, value in message.items():
                        loan[field] = value
            with in_python(takes_in_python):
                received.append(channel.get())
                with channel.borrow() as borrow:
                    received.append(borrow.value)
                    for value in borrow.value.values():
                        assert not value.shape or not value.flags.writeable
        for one in received:
            assert [*one] == [*expected]
            for field, value in expected.items():
                assert type(one[field]) is type(value)
                assert (one[field].dtype, one[field].shape) == (value.dtype, value.shape)
                np.testing.assert_array_equal(one[field], value)


def test_what_a_typed_get_returns_is_the_callers() -> None:
    with Channel(2, spec=FLAT) as channel:
        with channel.loan() as loan:
            loan["array"][...] = 1
        received = channel.get()
        received["array"][...] = 2
        for _ in range(3):
            with channel.loan() as loan:
                loan["array"][...] = 3
            channel.get()
        assert (received["array"] == 2).all()
        assert received["nothing"].flags.owndata


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("small", 128), ("small", -129), ("small", 1.0), ("small", "1"), ("word", -1), ("word", 2**64),
        ("single", 1e39), ("half", 1e6), ("flag", 1), ("text", "abcd"), ("array", np.ones((3, 2), "i2")),
        ("array", np.ones((2, 3), "f4")), ("swapped", 2**31), ("no such", 1),
    ],
)  # fmt: skip
def test_what_a_field_cannot_hold_is_refused_by_a_loan_and_changes_nothing(name: str, given: Any) -> None:
    with Channel(1, spec=FLAT) as channel:
        with channel.loan() as loan:
            for field in FLAT:
                loan[field][...] = np.ones((), loan[field].dtype)
            before = {field: loan[field].copy() for field in FLAT}
            with pytest.raises(SpecMismatch, match=f"{channel.name}.*{name}"):
                loan[name] = given
            assert same({field: loan[field] for field in FLAT}, before)
        assert same(channel.get(), before)


def test_the_views_of_a_loans_fields_are_the_same_each_time_and_end_with_it() -> None:
    with Channel(2, spec=FLAT) as channel:
        for also_by_fields in (False, True):
            with channel.loan() as loan:
                views = [loan["array"], loan["small"]]
                assert loan["array"] is views[0]
                views[1][...] = 3
                views[0][...] = 4
                if also_by_fields:
                    views += [loan.fields["array"], loan["small"]]
                    loan.fields["small"] = 5
            for view in views:
                assert not view.flags.writeable
            with pytest.raises(ValueError, match="ended"):
                loan["array"]
            with pytest.raises(ValueError, match="ended"):
                loan["small"] = 1
            received = channel.get()
            assert (received["small"], received["array"].tolist()) == (5 if also_by_fields else 3, [[4] * 3] * 2)
        with pytest.raises(KeyError), channel.loan() as loan:
            view = loan["array"]
            raise KeyError
        assert not view.flags.writeable
        assert channel.stats().free == 2


def test_a_trajectory_is_as_long_as_it_is() -> None:
    with Channel(2, spec=RAGGED) as channel:
        with channel.loan() as loan:
            loan["steps"][:3] = 4
            loan.set_length("steps", 3)
            loan["done"] = True
        with channel.borrow() as borrow:
            assert borrow["steps"].tolist() == [[4.0, 4.0]] * 3
        del borrow
        with channel.loan() as loan:
            loan["steps"] = np.ones((2, 2))
            loan["done"] = False
        assert same(channel.get(), {"steps": np.ones((2, 2), np.float32), "done": False})
        with pytest.raises(SpecMismatch, match="steps"):
            channel.put({"steps": np.zeros((6, 2)), "done": True})


# --- into the caller's memory


def test_get_copies_into_arrays_that_the_caller_has() -> None:
    with Channel(2, spec=SPEC) as channel:
        channel.put(message(9))
        out = {"obs": np.zeros((4, 3), np.uint8), "info": {}}
        received = channel.get(out=out)
        assert received["obs"] is out["obs"]
        assert same(received, message(9))
        channel.put(message(1))
        with pytest.raises(SpecMismatch, match="obs"):
            channel.get(out={"obs": np.zeros((4, 3), np.int8)})
        assert channel.qsize() == 1


def test_get_of_any_message_copies_into_what_the_caller_has() -> None:
    with Channel(2, 4096) as channel:
        array, out = np.arange(6.0).reshape(2, 3), np.zeros((2, 3))
        channel.put(array)
        assert channel.get(out=out) is out
        assert (out == array).all()
        buffer = bytearray(48)
        channel.put(array)
        assert channel.get(out=buffer) is buffer
        assert buffer == array.tobytes()
        channel.put(bytes(range(48)))
        assert channel.get(out=buffer) == bytes(range(48))
        channel.put({"a": array, "b": {"c": array[0], "d": [array[1], 5]}, "e": "text"})
        nested: dict[str, Any] = {"a": out * 0, "b": {"c": np.zeros(3)}}
        a, c = nested["a"], nested["b"]["c"]
        assert channel.get(out=nested) is nested
        assert nested["a"] is a
        assert nested["b"]["c"] is c
        assert (a == array).all()
        assert (c == array[0]).all()
        assert nested["e"] == "text"
        assert (nested["b"]["d"][0] == array[1]).all()
        assert nested["b"]["d"][0].flags.writeable
        assert nested["b"]["d"][1] == 5
        filled = bytearray(3)
        channel.put({"a": b"xyz", "b": np.arange(2), "c": 1})
        got = channel.get(out={"a": filled, "b": None, "c": [0]})
        assert got["a"] is filled
        assert filled == b"xyz"
        assert got["b"].tolist() == [0, 1]
        assert got["c"] == 1
        assert channel.stats().free == 2


MISFITS: list[tuple[Any, Any, str]] = [
    (np.zeros(3), np.zeros(4), r"shape \(3,\)"),
    (np.zeros(3), np.zeros(3, np.float32), "float32"),
    ("text", np.zeros(3), "str"),
    (b"1234", bytearray(3), r"shape \(4,\)"),
    ({"a": np.zeros(3)}, {"b": np.zeros(3)}, "'b'"),
    ({"a": {"b": np.zeros(3)}}, {"a": {"b": np.zeros(2)}}, r"\['a'\]\['b'\]"),
    (np.zeros(3), {"a": np.zeros(3)}, "ndarray"),
    ({"a": np.zeros(3)}, {"a": np.broadcast_to(0.0, 3)}, r"message\['a'\]: out is read-only"),
    ({"a": np.zeros(3)}, {"a": memoryview(bytes(24))}, r"message\['a'\]: out is read-only"),
    ({"a": 1.0}, {"a": np.zeros(3)}, r"message\['a'\] is a float, out is a ndarray"),
    ({"a": [np.zeros(3)]}, {"a": {"b": np.zeros(3)}}, r"message\['a'\] is list"),
    ({"a": b"123"}, {"a": bytearray(4)}, r"message\['a'\] has shape \(3,\)"),
]


@pytest.mark.parametrize(("sent", "out", "told"), MISFITS)
def test_what_does_not_fit_stays_in_its_place(sent: Any, out: Any, told: str) -> None:
    with Channel(3, 4096) as channel:
        channel.put(sent)
        channel.put("next")
        with pytest.raises(SpecMismatch, match=told) as caught:
            channel.get(out=out)
        assert channel.name in str(caught.value)
        assert channel.qsize() == 2
        assert channel.stats().redelivered == 0
        with channel.borrow() as borrow:
            assert borrow.delivery_count == 1
        assert channel.get() == "next"


@pytest.mark.parametrize("out", [b"read-only", np.broadcast_to(0.0, 3), 5, "text"])
def test_what_cannot_be_written_is_refused_before_anything_is_taken(out: Any) -> None:
    with Channel(1, 64) as channel:
        channel.put(np.zeros(3))
        with pytest.raises((TypeError, ValueError), match="out"):
            channel.get(out=out)
        assert channel.qsize() == 1


# --- batches


def stacked(messages: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {key: [m[key] for m in messages] for key in messages[0]}
    return {
        key: stacked(column) if isinstance(column[0], dict) else np.stack(column) for key, column in columns.items()
    }


def test_a_batch_is_its_messages_stacked() -> None:
    with Channel(7, spec=SPEC) as channel:
        sent = 0
        for n in (1, 3, 7, 2, 5, 6):  # the slots wrap round
            for k in range(sent, sent + n):
                channel.put(message(k))
            batch = channel.get_batch(n)
            assert same(batch, stacked([message(k) for k in range(sent, sent + n)]))
            assert channel.stats().free == 7
            sent += n
        assert channel.stats().received == sent


def test_a_batch_of_trajectories_is_padded_and_tells_their_lengths() -> None:
    with Channel(6, spec=RAGGED) as channel:
        for k in range(6):
            channel.put(ragged(k))
        batch = channel.get_batch(6)
        assert batch["steps"].shape == (6, 5, 2)
        assert batch.lengths["steps"].tolist() == [0, 1, 2, 3, 4, 5]
        for k in range(6):
            assert (batch["steps"][k, : k % 6] == k).all()
            assert not batch["steps"][k, k % 6 :].any()
        assert channel.put_batch(batch) == 6
        for k in range(6):
            assert same(channel.get(), ragged(k))


def test_a_batch_lands_in_the_callers_arrays() -> None:
    with Channel(4, spec=SPEC) as channel:
        info = {"reward": np.zeros(8, np.float32), "name": np.zeros(8, "U5")}
        out = {"obs": np.zeros((8, 4, 3), np.uint8), "action": np.zeros(8, np.int64), "info": info}
        for k in range(4):
            channel.put(message(k))
        batch = channel.get_batch(4, out=out)
        assert np.shares_memory(batch["obs"], out["obs"])
        assert same(batch, stacked([message(k) for k in range(4)]))
        channel.put(message(1))
        for wrong in ({**out, "obs": out["obs"][:0]}, {**out, "action": out["action"].astype(float)}, {}):
            with pytest.raises(SpecMismatch):
                channel.get_batch(1, out=wrong)
        assert channel.qsize() == 1


def test_a_batch_is_whole_or_not_taken_unless_less_will_do() -> None:
    with Channel(8, spec=SPEC) as channel:
        for k in range(3):
            channel.put(message(k))
        for timeout in (0, 0.05):
            check_empty(channel.get_batch, 4, timeout=timeout)
            check_empty(channel.get_batch, 8, min=4, timeout=timeout)
        assert channel.qsize() == 3
        assert same(channel.get_batch(8, min=2, timeout=0.05), stacked([message(k) for k in range(3)]))
        threading.Timer(0.1, lambda: [channel.put(message(k)) for k in range(4)]).start()
        assert same(channel.get_batch(4), stacked([message(k) for k in range(4)]))


def test_arguments_of_a_batch_that_make_no_sense_are_refused() -> None:
    with Channel(4, spec=SPEC) as channel, Channel(4, 64) as untyped:
        for arguments, named in (((5,), "n=5 must be at most 4, the capacity"), ((0,), "n=0"), (("2",), "n='2'")):
            with pytest.raises((TypeError, ValueError), match=named):
                channel.get_batch(*arguments)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="min=3"):
            channel.get_batch(2, min=3)
        for call in (lambda: untyped.get_batch(1), lambda: untyped.put_batch({})):
            with pytest.raises(TypeError, match="no spec"):
                call()


def test_a_batch_at_the_end_of_the_stream_is_the_rest_if_that_will_do() -> None:
    with Channel(8, spec=SPEC) as channel, Crew("fork") as crew:
        crew.start(_put_all, channel.sender(), message, 5).result()
        with pytest.raises(EndOfChannel, match="5 messages are left"):
            channel.get_batch(8)
        with pytest.raises(EndOfChannel, match="5 messages are left"):
            channel.get_batch(8, min=6)
        assert same(channel.get_batch(8, min=1), stacked([message(k) for k in range(5)]))
        with pytest.raises(EndOfChannel, match="all its messages"):
            channel.get_batch(8, min=1)


def test_a_batch_is_sent_as_its_messages() -> None:
    with Channel(4, spec=SPEC) as channel:
        batch = stacked([message(k) for k in range(6)])
        assert channel.put_batch(batch, timeout=0) == 4
        assert [channel.get()["action"] for _ in range(4)] == [0, 1, 2, 3]
        assert channel.put_batch(Batch(batch), timeout=0.05) == 4
        assert same(channel.get_batch(4), stacked([message(k) for k in range(4)]))
        few, others = {**batch, "action": batch["action"][:3]}, {**batch, "obs": batch["action"]}
        for wrong in (few, others, {"obs": batch["obs"]}):
            with pytest.raises(SpecMismatch, match=channel.name):
                channel.put_batch(wrong)
        assert channel.qsize() == 0


def _get_batches(receiver: Receiver, n: int) -> list[int]:
    seen: list[int] = []
    try:
        while True:
            seen += receiver.get_batch(n, min=1)["action"].tolist()
    except EndOfChannel:
        return seen


@pytest.mark.parametrize("senders", [1, 3])
def test_receivers_of_batches_share_the_messages(senders: int) -> None:
    with Channel(5, spec=SPEC) as channel, Crew("fork") as crew:
        receiver = channel.receiver()
        receiving = [crew.start(_get_batches, receiver, n) for n in (2, 3)]
        until(lambda: channel.stats().waiting_receivers == 2)
        sending = [crew.start(_put_all, channel.sender(), message, 60) for _ in range(senders)]
        for member in sending:
            member.result()
        receiver.close()
        channel.close()
        received = [member.result() for member in receiving]
        assert sorted(itertools.chain(*received)) == sorted(list(range(60)) * senders)
        if senders == 1:
            assert all(seen == sorted(seen) for seen in received)
