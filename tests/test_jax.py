"""JAX's arrays travel as NumPy arrays, copied once; ml_dtypes' dtypes as NumPy's own."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from support.workers import finish, script

import ringshm
from ringshm import Channel, Latest, SpecMismatch

jax: Any = pytest.importorskip("jax")
ml_dtypes: Any = pytest.importorskip("ml_dtypes")
jnp = jax.numpy


@pytest.mark.parametrize("dtype", ["float32", "int32", "bool_", "bfloat16", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(), (0, 2), (3, 4)])
def test_a_jax_array_arrives_as_a_numpy_array(dtype: str, shape: tuple[int, ...]) -> None:
    array = jnp.ones(shape, getattr(jnp, dtype))
    with Channel(2, 4096) as channel:
        for message, found in ((array, lambda got: got), ({"a": (array,)}, lambda got: got["a"][0])):
            channel.put(message)
            got = found(channel.get())
            assert type(got) is np.ndarray
            assert (got.dtype, got.shape) == (array.dtype, array.shape)
            assert (got == np.asarray(array)).all()
            assert got.flags.writeable
            channel.put(message)
            with channel.borrow() as borrow:
                view = found(borrow.value)
                assert (view == np.asarray(array)).all()
                assert not view.flags.writeable
                assert (jnp.array(view) == array).all()
            del view


def test_a_jax_arrays_data_are_not_in_the_pickle() -> None:
    array = jax.device_put(jnp.arange(100_000.0), jax.devices("cpu")[0])
    with Channel(1, "1MB") as channel:
        _, parts, _ = channel._codec.encode({"t": array})
        mine = [np.frombuffer(source, np.uint8) for _, source in parts._parts if len(source) == array.nbytes]
        assert [part.ctypes.data for part in mine] == [array.unsafe_buffer_pointer()]


@pytest.mark.parametrize("codec", ["pickle", "plain"])
def test_dtypes_that_ml_dtypes_adds_are_as_numpys_own(codec: str) -> None:
    array = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)
    with Channel(2, array.nbytes, codec=codec) as channel:  # a bare array of exactly a slot's size
        channel.put(array)
        got = channel.get()
        assert got.dtype == ml_dtypes.bfloat16
        assert (got == array).all()


def test_a_field_may_have_a_dtype_of_ml_dtypes() -> None:
    spec = {"w": (ml_dtypes.bfloat16, (2, 3))}
    array = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)
    with Latest(spec=spec) as latest:
        latest.publish({"w": jnp.asarray(array)})
        assert (latest.read()[1]["w"] == array).all()
        with pytest.raises(SpecMismatch, match="field 'w'"):
            latest.publish({"w": array.astype(np.float32)})
        source = """
import sys, ringshm
with ringshm.Latest.attach(sys.argv[1]) as latest:
    print(latest.read()[1]["w"].astype("f4").tolist())
"""
        assert finish(script(source, latest.name)) == "[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]\n"


def test_a_dtype_that_is_not_imported_here_is_named() -> None:
    with Channel(2, 4096, codec="plain") as channel:
        channel.put({"w": np.ones(3, ml_dtypes.bfloat16)})
        source = """
import sys, ringshm
with ringshm.Channel.attach(sys.argv[1]) as channel:
    try:
        channel.get()
    except ringshm.UndecodableMessage as error:
        print("import ml_dtypes" in str(error.__cause__), "ml_dtypes" in sys.modules)
"""
        assert finish(script(source, channel.name)) == "True False\n"


def test_ringshm_does_not_import_jax() -> None:
    assert "jax" in sys.modules
    assert finish(script("import sys, ringshm\nprint('jax' in sys.modules)")) == "False\n"
    assert not hasattr(ringshm, "jax")
