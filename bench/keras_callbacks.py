"""What Keras's fit() loses to its checkpoints: Stillframe's callbacks beside the stock ones.

    python bench/keras_callbacks.py --directory DIR [--rounds N]

One model of 200 MiB with Adam's moments. Each arm is a process of its own that runs the same fit();
`none` saves nothing. Lost time of a save is what the 12 batches from the one that saves on take
more than the 12 behind them, of which none saves: a shared machine changes less within a second
than from one process to the next. For `none` the same difference shows what is noise. Durable is
the time from the save's beginning to the ticket's "durable"; for a stock callback to its return and
an fsync of its file, which is not counted as lost; for Keras's OrbaxCheckpoint, which writes in the
background, to its directory's final name, without any fsync. Extra memory is the most anonymous
memory that the process had, less that of `none`; our arena is shared memory and not in it. Then
loading: a whole model in a fresh process after its imports, and weights into a built model, from
files that the page cache has dropped. Prints JSON Lines; a ratio above 1 says how many times
better.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rounds import machine

WIDTH = 1448  # 8 layers of it: 64 MiB of weights, 192 MiB with both moments.
LAYERS = 8
EVERY = 24
WINDOW = 12
BATCHES = 6 * EVERY - 1
# Before it TensorFlow compiles, and the first save touches memory for the first time.
FIRST_SAVE = 2 * EVERY
SAVERS = {
    "ModelCheckpoint": ("stillframe", "lazy", "stock", "orbax"),
    "BackupAndRestore": ("stillframe", "lazy", "stock"),
}
ARMS = ("none", *(f"{kind} {name}" for name, kinds in SAVERS.items() for kind in kinds))
LOADS = ("stillframe load_model", "stock load_model", "stillframe weights", "stock weights")


def report(name: str, **figures: object) -> None:
    """Print one result line."""
    print(json.dumps({"benchmark": name, **figures}), flush=True)


def make_model() -> Any:
    """The same in every process."""
    import keras

    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(WIDTH, use_bias=False) for _ in range(LAYERS)]
    model = keras.Sequential([keras.layers.Input((WIDTH,)), *layers])
    model.compile(keras.optimizers.Adam(1e-5), "mse")
    return model


class Watch(threading.Thread):
    """Sees the most anonymous memory of this process, and when Orbax's directories appear."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self.peak_mib = 0.0
        self.seen: dict[int, float] = {}  # By step, seconds of time.perf_counter().
        self._directory = directory
        self._is_over = threading.Event()

    def run(self) -> None:
        while not self._is_over.wait(0.005):
            self._look()
        self._look()

    def end(self) -> None:
        """Look once more, and stop."""
        self._is_over.set()
        self.join()

    def _look(self) -> None:
        status = Path("/proc/self/status").read_text()
        self.peak_mib = max(self.peak_mib, int(status.split("RssAnon:")[1].split()[0]) / 1024)
        names = os.listdir(self._directory) if self._directory.is_dir() else []
        for name in names:
            if name.isdecimal():
                self.seen.setdefault(int(name), time.perf_counter())


def run_arm(arm: str, directory: Path) -> dict[str, Any]:
    """One fit(); its figures."""
    import keras
    import numpy as np

    import stillframe.keras

    times: list[float] = []
    durable: list[float] = []
    begun: dict[int, float] = {}
    kind, _, name = arm.partition(" ")
    watch = Watch(directory / "orbax")
    file = directory / ("latest.weights.h5" if name == "BackupAndRestore" else "m.keras")

    class Before(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.begin = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.ended = time.perf_counter()

    class After(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            times.append(time.perf_counter() - before.begin)
            begun[batch + 1] = before.ended
            if kind == "stock" and (batch + 1) % EVERY == 0:
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
                durable.append(time.perf_counter() - before.ended)

    before = Before()
    capture = "lazy" if kind == "lazy" else "eager"
    savers: list[Any] = []
    if kind == "stock" and name == "ModelCheckpoint":
        savers = [keras.callbacks.ModelCheckpoint(file, save_freq=EVERY, monitor="loss")]
    elif kind == "stock":
        savers = [keras.callbacks.BackupAndRestore(directory, save_freq=EVERY)]
    elif kind == "orbax":
        savers = [
            keras.callbacks.OrbaxCheckpoint(directory / "orbax", save_freq=EVERY, monitor="loss")
        ]
    elif name == "ModelCheckpoint":
        savers = [
            stillframe.keras.ModelCheckpoint(
                directory / "run" / "m.keras", save_freq=EVERY, monitor="loss", capture=capture
            )
        ]
    elif name:
        savers = [
            stillframe.keras.BackupAndRestore(directory / "run", save_freq=EVERY, capture=capture)
        ]
    model = make_model()
    data = np.ones((BATCHES * 8, WIDTH), "float32")
    watch.start()
    model.fit(data, data, batch_size=8, verbose=0, callbacks=[before, *savers, After()])
    watch.end()
    if kind in ("stillframe", "lazy"):
        durable = durable_seconds(directory / "run")
    elif kind == "orbax":
        durable = [when - begun[step] for step, when in watch.seen.items()]
    return {
        "lost": lost_seconds(times),
        "durable": durable,
        "peak_mib": watch.peak_mib,
        "bytes": bytes_of(model),
    }


def lost_seconds(times: list[float]) -> list[float]:
    """Of each counted save, from the seconds of all batches."""
    lost = []
    for save in range(FIRST_SAVE, BATCHES + 2 - EVERY, EVERY):
        # In its last batch, or before the next one, which counts as that one's.
        begin = save - 1
        beside = sum(times[begin : begin + WINDOW])
        lost.append(beside - sum(times[begin + WINDOW : begin + 2 * WINDOW]))
    return lost


def durable_seconds(run: Path) -> list[float]:
    """From the daemon's log: one line a save."""
    log = next(Path(os.environ["XDG_RUNTIME_DIR"]).rglob("*.log"))
    found = []
    for line in log.read_text().splitlines():
        if f"run={run.resolve()} " in line and " durable=" in line:
            found.append(float(line.split(" durable=")[1].split("ms")[0]) / 1e3)
    return found


def bytes_of(model: Any) -> int:
    """Of weights and moments."""
    return int(sum(4 * one.shape.num_elements() for one in variables_of(model)))


def variables_of(model: Any) -> list[Any]:
    """TensorFlow's own."""
    return [one.value for one in (*model.variables, *model.optimizer.variables)]


def run_load(load: str, directory: Path) -> dict[str, Any]:
    """One load in this process, after all imports."""
    import keras
    import tensorflow as tf

    import stillframe.keras

    tf.constant(1.0)
    kind, _, what = load.partition(" ")
    model = make_model() if what == "weights" else None
    if model is not None:
        model.build()
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    begin = time.perf_counter()
    if load == "stillframe load_model":
        model = stillframe.keras.load_model(directory / "ours")
    elif load == "stock load_model":
        model = keras.saving.load_model(directory / "stock.keras")
    elif kind == "stillframe":
        stillframe.keras.load_weights(model, directory / "ours")
    else:
        model.load_weights(directory / "stock.weights.h5")
    total = sum(float(tf.reduce_sum(one.value)) for one in model.variables)
    return {"seconds": time.perf_counter() - begin, "sum": total}


def prepare(directory: Path) -> None:
    """The files that run_load() reads."""
    import numpy as np

    import stillframe.keras

    model = make_model()
    model.fit(np.ones((8, WIDTH)), np.ones((8, WIDTH)), verbose=0)
    stillframe.keras.save_model(model, directory / "ours")
    model.save(directory / "stock.keras")
    model.save_weights(directory / "stock.weights.h5")
    os.sync()


def start(what: str, name: str, directory: Path) -> dict[str, Any]:
    """Run a part of this in a process of its own."""
    directory.mkdir(exist_ok=True)
    home = directory / "runtime"
    home.mkdir(mode=0o700, exist_ok=True)
    done = subprocess.run(
        [sys.executable, __file__, "--directory", str(directory), what, name],
        env={**os.environ, "XDG_RUNTIME_DIR": str(home)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(rounds: list[dict[str, dict[str, Any]]]) -> None:
    """Lost and durable time and memory of each saver, and how many times less ours loses."""
    nothing = [1e3 * s for one in rounds for s in one["none"]["lost"]]
    report("keras_none", **quartiles(nothing), saves=len(nothing))
    for name, kinds in SAVERS.items():
        lost = {
            kind: [1e3 * s for one in rounds for s in one[f"{kind} {name}"]["lost"]]
            for kind in kinds
        }
        ours = statistics.median(lost["stillframe"])
        for kind in kinds:
            arms = [(one[f"{kind} {name}"], one["none"]) for one in rounds]
            theirs = statistics.median(lost[kind])
            report(
                f"keras_{name}",
                arm=kind,
                mib=round(rounds[0]["none"]["bytes"] / 2**20),
                **quartiles(lost[kind]),
                # A loss below the noise is no number to divide by.
                of_ours=round(theirs / ours, 1) if ours > 0 else None,
                durable_ms=round(
                    statistics.median(1e3 * s for arm, _ in arms for s in arm["durable"]), 1
                ),
                extra_mib=round(
                    statistics.median(arm["peak_mib"] - none["peak_mib"] for arm, none in arms), 1
                ),
            )


def quartiles(lost: list[float]) -> dict[str, Any]:
    """The median of milliseconds a save, and between which half of them lies."""
    low, middle, high = statistics.quantiles(lost, n=4)
    return {"lost_ms_per_save": round(middle, 1), "lost_ms_half": [round(low, 1), round(high, 1)]}


def compare_loads(rounds: list[dict[str, dict[str, Any]]]) -> None:
    """Seconds of each load, ours beside the stock one."""
    for what, target in (("load_model", 1.3), ("weights", 2.0)):
        ratios = [
            one[f"stock {what}"]["seconds"] / one[f"stillframe {what}"]["seconds"] for one in rounds
        ]
        report(
            f"keras_{what}",
            seconds=round(statistics.median(o[f"stillframe {what}"]["seconds"] for o in rounds), 3),
            stock_seconds=round(
                statistics.median(o[f"stock {what}"]["seconds"] for o in rounds), 3
            ),
            times_faster=round(statistics.median(ratios), 2),
            range=[round(min(ratios), 2), round(max(ratios), 2)],
            target=target,
        )


def run_saves(scratch: Path, count: int) -> list[dict[str, dict[str, Any]]]:
    """Rounds of every arm, each time another one first."""
    rounds = []
    for turn in range(count):
        order = (*ARMS[turn % len(ARMS) :], *ARMS[: turn % len(ARMS)])
        one = {arm: start("arm", arm, scratch / f"{turn}-{ARMS.index(arm)}") for arm in order}
        report("keras_round", **one)
        rounds.append(one)
        shutil.rmtree(scratch)
        scratch.mkdir()
    return rounds


def run_loads(files: Path, count: int) -> list[dict[str, dict[str, Any]]]:
    """Rounds of every load, each time another one first."""
    start("prepare", "files", files)
    rounds = []
    for turn in range(count):
        order = (*LOADS[turn % len(LOADS) :], *LOADS[: turn % len(LOADS)])
        one = {load: start("load", load, files) for load in order}
        if len({load["sum"] for load in one.values()}) != 1:
            sys.exit(f"the loads differ: {one}")
        rounds.append(one)
    return rounds


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("saves", "loads"), help="the half of it")
    parser.add_argument("part", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.directory = arguments.directory.resolve()
    if arguments.part:
        what, name = arguments.part
        if what == "arm":
            print(json.dumps(run_arm(name, arguments.directory)))
        elif what == "load":
            print(json.dumps(run_load(name, arguments.directory)))
        else:
            prepare(arguments.directory)
            print("{}")
        return
    report("machine", **machine(), rounds=arguments.rounds, every=EVERY, batches=BATCHES)
    scratch = arguments.directory / "keras-callbacks"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        if arguments.only != "loads":
            compare(run_saves(scratch, arguments.rounds))
        if arguments.only != "saves":
            compare_loads(run_loads(scratch / "files", arguments.rounds))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
