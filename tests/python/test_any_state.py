"""A state.json with right checksums and wrong contents: refused by name, nothing half-restored."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import os
import pickle
import random
import time
from pathlib import Path
from typing import Any

import pytest

import stillframe.torch as stillframe
import training
from stillframe._core.session import SaveRequest, Session

SECONDS = 8.0
REPLACEMENTS: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    "",
    "x" * 5000,
    [],
    {},
    [[[]]],
    {"$tuple": [1]},
    {"$tuple": 3},
    {"$tensor": "no.such.tensor"},
    {"$tensor": "0.weight"},
    {"$array": {"dtype": "int64", "shape": [1 << 40], "data": ""}},
    {"$array": {"dtype": "object", "shape": [1], "data": "AAAAAAAAAAA="}},
    {"$dtype": "load"},
    {"$device": "cuda:99999"},
    {"$size": [-1]},
    {"$float": "NaN"},
    {"$set": [[]]},
    {"$unknown": 1},
    {"$tuple": [], "$set": []},
]


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container below `value` with each of its keys or indices."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])
    return found


def mutated(state: Any, choose: random.Random, trap: Path) -> Any:
    """`state` with one to three members replaced, removed, renamed or exchanged."""
    changed = copy.deepcopy(state)
    pickled = {"$pickle": base64.b64encode(pickle.dumps(Trap(trap))).decode()}
    for _ in range(choose.randint(1, 3)):
        all_places = places(changed)
        if not all_places:
            break
        container, key = choose.choice(all_places)
        kind = choose.randrange(5)
        if kind == 0:
            container[key] = copy.deepcopy(choose.choice([*REPLACEMENTS, pickled]))
        elif kind == 1:
            del container[key]
        elif kind == 2 and isinstance(container, dict):
            container[f"{key}x"] = container.pop(key)
        else:
            other, other_key = choose.choice(all_places)
            if other_key in other if isinstance(other, dict) else other_key < len(other):
                container[key] = copy.deepcopy(other[other_key])
    return changed


def test_a_state_with_wrong_contents_is_refused_and_nothing_is_half_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = int(os.environ.get("STILLFRAME_SEED", random.SystemRandom().randrange(2**32)))
    print(f"STILLFRAME_SEED={seed}")
    choose = random.Random(seed)
    trap = tmp_path / "trap"
    real_begin_save = Session.begin_save
    states: list[Any] = []

    def begin_save(self: Session, request: SaveRequest, sources: Any) -> Any:
        state = json.loads(request.state_json)
        states.append(state)
        if len(states) > 1:
            text = json.dumps(mutated(states[0], choose, trap))
            request = dataclasses.replace(request, state_json=text.encode())
        return real_begin_save(self, request, sources)

    monkeypatch.setattr(Session, "begin_save", begin_save)
    refused_count = 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or refused_count < 20:
        made = training.make()
        made.step()
        with made.checkpointer(tmp_path / "run", keep_last=2) as checkpointer:
            # Until one is taken: whoever knows the checksums may write any values.
            while True:
                checkpointer.save(len(states)).wait()
                made.step()
                before = made.digest()
                refusal = None
                try:
                    checkpointer.resume(on_damage="raise")
                except stillframe.StillframeError as error:
                    refusal = str(error)
                assert not trap.exists(), "a pickle was loaded that nobody allowed"
                if refusal is None:
                    break
                refused_count += 1
                assert made.digest() == before, refusal
                assert len(refusal) > 10
    print(f"{len(states) - 1} states, {refused_count} refused")
