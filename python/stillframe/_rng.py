"""The random number generators of Python, NumPy and torch: state.json's `rng`."""

from __future__ import annotations

import array
import base64
import json
import random
import sys
from typing import Any

import numpy as np
import torch

from stillframe.errors import DataLoss


def encode_rng() -> str:
    """The generators' states as JSON text, in the typed form of docs/FORMAT.md section 5."""
    version, words, gauss = random.getstate()
    members = [
        f'"python": {{"version": {version}, "words": {_bytes(_little_endian(words))}, '
        f'"gauss": {json.dumps(gauss)}}}',
        f'"torch": {_bytes(torch.get_rng_state().numpy().tobytes())}',
    ]
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    if legacy["bit_generator"] == "MT19937":
        key = legacy["state"]["key"].astype("<u4").tobytes()
        spare = json.dumps(float(legacy["gauss"]))
        members.append(
            f'"numpy": {{"words": {_bytes(key)}, "position": {int(legacy["state"]["pos"])}, '
            f'"has_gauss": {int(legacy["has_gauss"])}, "gauss": {spare}}}'
        )
    return f"{{{', '.join(members)}}}"


def restore_rng(state: dict[str, Any]) -> None:
    """Set the generators to a decoded `rng`.

    Raises:
        DataLoss: it is not what encode_rng() writes.
    """
    try:
        python = state["python"]
        random.setstate((python["version"], _words(python["words"]), python["gauss"]))
        numpy = state.get("numpy")
        if numpy is not None:
            key = np.array(_words(numpy["words"]), dtype=np.uint32)
            np.random.set_state(
                ("MT19937", key, numpy["position"], numpy["has_gauss"], numpy["gauss"])
            )
        torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataLoss(f"state.json: rng cannot be restored: {error}") from error


def _little_endian(words: Any) -> bytes:
    packed = array.array("I", words)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _words(data: bytes) -> tuple[int, ...]:
    packed = array.array("I", data)
    if sys.byteorder == "big":
        packed.byteswap()
    return tuple(packed)


def _bytes(data: bytes) -> str:
    # As text: a JSON encoder would look at each of some 14 000 characters for one to escape.
    return f'{{"$bytes": "{base64.b64encode(data).decode("ascii")}"}}'
