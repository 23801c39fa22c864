"""The random number generators of Python, NumPy and torch, CPU and CUDA: state.json's `rng`."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import numpy as np
import torch

from stillframe._core.state_json import UNFIT, decode
from stillframe._core.warn import warn
from stillframe._torch.generators import python_state, python_state_back
from stillframe.errors import DataLoss


def encode_rng() -> str:
    """The generators' states as JSON text, in the typed form of docs/FORMAT.md section 5."""
    python = python_state(random.getstate())
    members = [
        f'"python": {{"version": {python["version"]}, "words": {_bytes(python["words"])}, '
        f'"gauss": {json.dumps(python["gauss"])}}}',
        f'"torch": {_bytes(torch.get_rng_state().numpy().tobytes())}',
    ]
    if isinstance(np.random.get_bit_generator(), np.random.MT19937):  # type: ignore[attr-defined]
        # The tuple: making the dict takes twice as long.
        _, key, position, has_gauss, gauss = np.random.get_state()
        words = np.asarray(key).astype("<u4", copy=False).tobytes()
        members.append(
            f'"numpy": {{"words": {_bytes(words)}, "position": {int(position)}, '
            f'"has_gauss": {int(has_gauss)}, "gauss": {json.dumps(float(gauss))}}}'
        )
    # Asking makes a context on each GPU; without one nothing was drawn there.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states = torch.cuda.get_rng_state_all()
        members.append(f'"cuda": [{", ".join(_bytes(one.numpy().tobytes()) for one in states)}]')
    return f"{{{', '.join(members)}}}"


def rng_state() -> dict[str, Any]:
    """What restore_rng() takes, of now."""

    def no_tensor(name: str) -> Any:
        raise LookupError(name)

    state: dict[str, Any] = decode(json.loads(encode_rng()), "rng", tensor=no_tensor)
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Set the generators to a decoded `rng`.

    Raises:
        DataLoss: it is not what encode_rng() writes.
    """
    try:
        random.setstate(python_state_back(state["python"]))
        numpy = state.get("numpy")
        if numpy is not None:
            key = np.frombuffer(numpy["words"], dtype="<u4").astype(np.uint32)
            np.random.set_state(
                ("MT19937", key, numpy["position"], numpy["has_gauss"], numpy["gauss"])
            )
        torch.set_rng_state(_tensor(state["torch"]))
        _restore_cuda([_tensor(one) for one in state.get("cuda", [])])
    except UNFIT as error:
        raise DataLoss(f"state.json: rng cannot be restored: {error}") from error


def _restore_cuda(states: list[torch.Tensor]) -> None:
    count = torch.cuda.device_count() if states else 0
    for device, state in enumerate(states[:count]):
        torch.cuda.set_rng_state(state, device)
    if count not in (0, len(states)):
        warn(
            f"the checkpoint has the random number generators of {len(states)} CUDA devices, here "
            f"are {count}: the first {min(count, len(states))} were restored"
        )


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(data: bytes) -> str:
    # As text: a JSON encoder would look at each of some 14 000 characters for one to escape.
    return f'{{"$bytes": "{base64.b64encode(data).decode("ascii")}"}}'
