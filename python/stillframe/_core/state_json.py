"""What is not a tensor, as typed JSON and back (docs/FORMAT.md section 5).

`Encoder` turns a Python value into JSON's own types; `decode` turns them back into an equal value
of the same types. A value that has no form here is refused by its path, such as `extra.loader[3]`;
nothing is pickled unless the caller asked for that.
"""

from __future__ import annotations

import base64
import collections
import json
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from stillframe.errors import DataLoss, InvalidArgument

# A tree of None, bool, int, float, str, list and dict with text keys.
Json = Any

DEPTH_MAX = 100
ARRAY_BYTES_MAX = 16 * 2**20
# Python itself refuses to print integers above 4300 digits.
_INT_BITS_MAX = 14_000
# What building a value from the wrong parts raises.
UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_PLAIN = frozenset({type(None), bool})
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_ARRAY_KINDS = "biufc"
_DICTS: dict[str, Callable[[Any], Any]] = {
    "$dict": dict,
    "$ordered": collections.OrderedDict,
    "$counter": collections.Counter,
}
_DICT_KINDS: dict[type, str] = {
    collections.OrderedDict: "$ordered",
    collections.Counter: "$counter",
}


def child_path(path: str, key: object) -> str:
    """The path of a member: `.name`, `[3]` or `["any text"]`; different keys never share one."""
    if isinstance(key, str):
        if key.isidentifier():
            return f"{path}.{key}"
        quoted = json.dumps(key).replace("\x7f", "\\u007f")
        return f"{path}[{quoted}]"
    return f"{path}[{key!a}]"


class Encoder:
    """Encodes values; one object per document.

    Args:
        lift: called with a tensor's path and the tensor; puts it into a part and returns the name
            that it has there.
        allow_pickle: pickle what has no other form.
        observe: called with every list and dict that was visited, and with None for a value that
            can change without becoming another object. For callers that keep the result.
        lifts_arrays: give NumPy arrays to `lift` too, instead of writing them as text.
    """

    def __init__(
        self,
        lift: Callable[[str, Any], str],
        *,
        allow_pickle: bool = False,
        observe: Callable[[Any], None] | None = None,
        lifts_arrays: bool = False,
    ) -> None:
        self._lift = lift
        self._lifts_arrays = lifts_arrays
        self._allow_pickle = allow_pickle
        self._observe = observe
        self.has_pickle = False

    def encode(self, value: Any, path: str, depth: int = 0) -> Json:
        """Return `value` as JSON.

        Raises:
            InvalidArgument: a value at or below `path` has no form; the message has its path.
        """
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is int:
            return self._int(value, path)
        if kind is float:
            return _float(value)
        if kind is str:
            return _text(value, path)
        if depth > DEPTH_MAX:
            raise InvalidArgument(f"{path[:200]}...: nested deeper than {DEPTH_MAX}")
        if kind is list:
            self._saw(value)
            return self._items(value, path, depth)
        if kind is dict:
            self._saw(value)
            return self._dict(value, path, depth)
        if kind is tuple:
            return {"$tuple": self._items(value, path, depth)}
        if kind is bytes:
            return {"$bytes": _base64(value)}
        return self._rare(value, path, depth)

    def _saw(self, value: Any) -> None:
        if self._observe is not None:
            self._observe(value)

    def _int(self, value: int, path: str) -> int:
        if value.bit_length() > _INT_BITS_MAX:
            raise InvalidArgument(f"{path}: an integer of {value.bit_length()} bits is too large")
        return value

    def _items(self, values: Any, path: str, depth: int) -> list[Json]:
        # Data orders are long lists of small integers: do not visit each one.
        if set(map(type, values)) == {int} and max(map(abs, values)).bit_length() <= _INT_BITS_MAX:
            return list(values)
        return [self.encode(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(values)]

    def _dict(self, value: dict[Any, Any], path: str, depth: int) -> Json:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {
                _text(key, path): self.encode(item, child_path(path, key), depth + 1)
                for key, item in value.items()
            }
        return {"$dict": self._pairs(value, path, depth)}

    def _pairs(self, value: dict[Any, Any], path: str, depth: int) -> list[Json]:
        return [
            [
                self.encode(key, f"{path} key", depth + 1),
                self.encode(item, child_path(path, key), depth + 1),
            ]
            for key, item in value.items()
        ]

    def _rare(self, value: Any, path: str, depth: int) -> Json:
        torch = sys.modules.get("torch")
        if torch is not None:
            if isinstance(value, torch.Tensor):
                return {"$tensor": self._lift(path, value)}
            if type(value) is torch.Size:
                return {"$size": list(value)}
            if type(value) is torch.dtype:
                return {"$dtype": str(value).removeprefix("torch.")}
            if type(value) is torch.device:
                return {"$device": str(value)}
        special = _DICT_KINDS.get(type(value))
        if special is not None:
            self._saw(value)
            return {special: self._pairs(value, path, depth)}
        if isinstance(value, np.generic) and value.dtype.kind in "biuf" and value.nbytes <= 8:
            return {"$scalar": [value.dtype.name, _number(value.item())]}
        if self._observe is not None:
            self._observe(None)
        if type(value) is set:
            return {"$set": self._items(list(value), path, depth)}
        if type(value) is np.ndarray and _is_portable(value.dtype):
            if self._lifts_arrays:
                return {"$tensor": self._lift(path, value)}
            return self._array(value, path)
        if self._allow_pickle:
            return self._pickled(value, path)
        raise InvalidArgument(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which has no "
            "form in state.json; save its state_dict() or plain values, or have it pickled by "
            "allow_pickle=True"
        )

    def _array(self, value: np.ndarray[Any, Any], path: str) -> Json:
        if value.nbytes > ARRAY_BYTES_MAX:
            raise InvalidArgument(
                f"{path}: a numpy array of {value.nbytes} bytes is too large for state.json "
                f"({ARRAY_BYTES_MAX}); pass torch.from_numpy(array), which goes into a part"
            )
        ordered = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        return {
            "$array": {
                "dtype": value.dtype.name,
                "shape": list(value.shape),
                "data": _base64(ordered.tobytes()),
            }
        }

    def _pickled(self, value: Any, path: str) -> Json:
        try:
            text = _base64(pickle.dumps(value))
        except Exception as error:
            raise InvalidArgument(f"{path} cannot be pickled: {error}") from error
        self.has_pickle = True
        return {"$pickle": text}


def dumps(value: Json) -> str:
    """The JSON text of an encoded value."""
    return _JSON.encode(value)


def _text(value: str, path: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidArgument(f"{path}: {value!a} is not text in UTF-8") from None
    return value


def _number(value: bool | int | float) -> Json:
    return _float(value) if isinstance(value, float) else value


def _float(value: float) -> Json:
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return {"$float": "NaN"}
    return {"$float": "Infinity" if value > 0 else "-Infinity"}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _is_portable(dtype: np.dtype[Any]) -> bool:
    """Whether the dtype's bytes mean the same everywhere: no long double, no objects."""
    item_bytes_max = 16 if dtype.kind == "c" else 8
    return dtype.kind in _ARRAY_KINDS and dtype.itemsize <= item_bytes_max


def decode(
    value: Json,
    path: str,
    *,
    tensor: Callable[[str], Any],
    allow_pickle: bool = False,
) -> Any:
    """Return what `Encoder.encode` was given.

    Args:
        value: as json.loads() gives it.
        path: for messages.
        tensor: called with the name in a `$tensor`; returns the tensor.
        allow_pickle: load pickles. They can run any code: only for files that you trust.

    Raises:
        DataLoss: the value is not typed JSON of this version.
        InvalidArgument: it holds a pickle, and `allow_pickle` is not set.
    """
    try:
        return _decode(value, path, tensor, allow_pickle)
    except RecursionError as error:
        raise DataLoss(f"state.json: {path} is nested too deep") from error


def _decode(value: Json, path: str, tensor: Callable[[str], Any], allow_pickle: bool) -> Any:
    if isinstance(value, list):
        return [_decode(v, f"{path}[{i}]", tensor, allow_pickle) for i, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    special = next((key for key in value if key.startswith("$")), None)
    if special is None:
        return {
            key: _decode(item, child_path(path, key), tensor, allow_pickle)
            for key, item in value.items()
        }
    if special == "$pickle" and not allow_pickle:
        raise InvalidArgument(
            f"{path} is a pickle (allow_pickle=True at save); a pickle can run any code, so pass "
            "allow_pickle=True only if you trust these files"
        )
    content = value[special]
    try:
        if len(value) != 1:
            raise ValueError("more than one member")
        if special == "$tensor":
            return tensor(_expect(content, str))
        if special == "$tuple":
            return tuple(_decode(_expect(content, list), path, tensor, allow_pickle))
        if special == "$set":
            return set(_decode(_expect(content, list), path, tensor, allow_pickle))
        if special in _DICTS:
            return _DICTS[special](
                {
                    _decode(key, f"{path} key", tensor, allow_pickle): _decode(
                        item, path, tensor, allow_pickle
                    )
                    for key, item in _expect(content, list)
                }
            )
        return _decode_leaf(special, content)
    except (InvalidArgument, DataLoss):
        raise
    except UNFIT as error:
        raise DataLoss(f"state.json: {path} is not a {special} of this version: {error}") from error


def _decode_leaf(special: str, content: Json) -> Any:
    if special == "$bytes":
        return base64.b64decode(_expect(content, str), validate=True)
    if special == "$float":
        return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}[content]
    if special == "$scalar":
        name, number = content
        number = _decode_leaf("$float", number["$float"]) if isinstance(number, dict) else number
        return _numpy_dtype(name).type(number)
    if special == "$array":
        dtype = _numpy_dtype(content["dtype"])
        data = base64.b64decode(content["data"], validate=True)
        # frombuffer() is read-only.
        ordered = np.frombuffer(data, dtype=dtype.newbyteorder("<")).reshape(content["shape"])
        return ordered.astype(dtype)
    if special == "$pickle":
        return pickle.loads(base64.b64decode(_expect(content, str), validate=True))
    if special not in ("$size", "$dtype", "$device"):
        raise ValueError("unknown kind")
    import torch

    if special == "$size":
        return torch.Size(content)
    if special == "$device":
        return torch.device(_expect(content, str))
    dtype = getattr(torch, _expect(content, str))
    return _expect(dtype, torch.dtype)


def _numpy_dtype(name: str) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(_expect(name, str))
    if not _is_portable(dtype):
        raise ValueError(f"dtype {name}")
    return dtype


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} instead of {kind.__name__}")
    return value
