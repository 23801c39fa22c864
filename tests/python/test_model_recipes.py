"""load_model(): how a model is made again, and what may be imported for that."""

from __future__ import annotations

import base64
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import stillframe.torch as stillframe
from stillframe._torch.program import unsafe_contents
from whole_model import ALLOW, TOKENS, Net, Plain, compute, make_net, trained


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding="same", bias=False),
        nn.BatchNorm1d(4, momentum=0.3),
        nn.GELU("tanh"),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(20, 6)),
    )


# --- Ways to make it again -----------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
def test_a_model_of_torchs_own_layers_needs_nothing_to_be_made_again(
    tmp_path: Path, mmap: bool
) -> None:
    batch = torch.randn(3, 2, 5)
    model = trained(sequential(), batch)
    stillframe.save_model(model, tmp_path / "m")
    assert all(module.training for module in model.modules())
    loaded = stillframe.load_model(tmp_path / "m", mmap=mmap)
    assert not any(module.training for module in loaded.modules())
    assert str(loaded) == str(model)
    assert torch.equal(loaded(batch), compute(model, batch))


@pytest.mark.parametrize(
    "model",
    [
        nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
        nn.GRU(3, 4, 2, dropout=0.1),
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True), 2
        ),
        nn.MultiheadAttention(8, 2, kdim=3, add_bias_kv=True),
        nn.ModuleDict({"a": nn.ModuleList([nn.PReLU(3), nn.Embedding(5, 4, padding_idx=-1)])}),
        nn.LayerNorm((3, 4), elementwise_affine=False),
    ],
    ids=lambda model: type(model).__name__,
)
def test_torchs_own_modules_are_described(tmp_path: Path, model: nn.Module) -> None:
    stillframe.save_model(model, tmp_path / "m")
    loaded = stillframe.load_model(tmp_path / "m")
    assert str(loaded) == str(model)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_module_that_stands_twice_is_made_once(tmp_path: Path) -> None:
    shared = nn.Linear(3, 3)
    stillframe.save_model(nn.Sequential(shared, nn.ReLU(), shared), tmp_path / "m")
    loaded = stillframe.load_model(tmp_path / "m")
    assert isinstance(loaded, nn.Sequential)
    assert loaded[0] is loaded[2]


def test_a_description_that_would_be_a_lie_is_refused(tmp_path: Path) -> None:
    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda *_: None)
    changed = nn.Linear(3, 3)
    changed.in_features = 7
    labelled = nn.Sequential(nn.ReLU())
    labelled.classes = ["cat", "dog"]  # type: ignore[assignment]
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    for model, said in [
        (hooked, "hooks"),
        (changed, "differs"),
        (labelled, "classes"),
        (nn.Sequential(normed), "ParametrizedLinear"),
        (Net(4), r"whole_model\.Net.*config=.*factory="),
    ]:
        with pytest.raises(stillframe.InvalidArgument, match=said):
            stillframe.save_model(model, tmp_path / "m")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mmap", [False, True])
def test_a_class_and_its_config_make_the_model_again(tmp_path: Path, mmap: bool) -> None:
    model = trained(Net(8, scale=3.0))
    stillframe.save_model(model, tmp_path / "m", config={"hidden": 8, "scale": 3.0})
    loaded = stillframe.load_model(tmp_path / "m", allow=ALLOW, mmap=mmap)
    assert isinstance(loaded, Net)
    assert torch.equal(loaded(TOKENS), compute(model))
    assert loaded.head.weight is loaded.embed.weight


def test_a_class_without_arguments_needs_no_config(tmp_path: Path) -> None:
    stillframe.save_model(Plain(), tmp_path / "m")
    assert isinstance(stillframe.load_model(tmp_path / "m", allow=("whole_model",)), Plain)


def test_a_factory_is_called_with_the_config(tmp_path: Path) -> None:
    model = trained(make_net(8))
    for factory in (make_net, "whole_model:make_net"):
        stillframe.save_model(model, tmp_path / "m", factory=factory, config={"hidden": 8})
        loaded = stillframe.load_model(tmp_path / "m", allow=ALLOW)
        assert torch.equal(loaded(TOKENS), compute(model))
    with pytest.raises(stillframe.InvalidArgument, match="cannot be imported"):
        stillframe.save_model(model, tmp_path / "m", factory=lambda: make_net(8))


def test_a_factory_at_load_takes_the_saved_config_or_nothing(tmp_path: Path) -> None:
    model = trained(Net(8))
    stillframe.save_model(model, tmp_path / "m", config={"hidden": 8})
    for factory in (Net, lambda: Net(8), lambda **config: Net(**config)):
        loaded = stillframe.load_model(tmp_path / "m", factory=factory)
        assert torch.equal(loaded(TOKENS), compute(model))
    with pytest.raises(stillframe.InvalidArgument, match=r"does not take.*\['hidden'\]"):
        stillframe.load_model(tmp_path / "m", factory=lambda width: Net(width))


_SCRIPT = """
import sys, torch
from torch import nn
import stillframe.torch as stillframe
class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)
    def forward(self, batch):
        return self.layer(batch)
if sys.argv[1] == "save":
    torch.manual_seed(1)
    stillframe.save_model(Net(4), sys.argv[2], config={"width": 4})
else:
    try:
        stillframe.load_model(sys.argv[2])
    except stillframe.InvalidArgument as error:
        print(error)
    print(stillframe.load_model(sys.argv[2], factory=Net)(torch.ones(4)).tolist())
"""


def test_a_class_of_main_loads_with_factory(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    subprocess.run([sys.executable, script, "save", tmp_path / "m"], check=True)
    done = subprocess.run(
        [sys.executable, script, "load", tmp_path / "m"], check=True, capture_output=True, text=True
    )
    assert "pass factory=Net" in done.stdout
    torch.manual_seed(1)
    assert str(nn.Linear(4, 4)(torch.ones(4)).tolist()) in done.stdout


# --- What may be imported ------------------------------------------------------------------------


def test_only_what_allow_names_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_model.py").write_text(
        "import pathlib, torch\n"
        f"pathlib.Path({str(tmp_path / 'was_here')!r}).touch()\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self): super().__init__(2, 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    evil = importlib.import_module("evil_model")
    stillframe.save_model(evil.Net(), tmp_path / "m")
    del sys.modules["evil_model"]
    (tmp_path / "was_here").unlink()
    with pytest.raises(stillframe.InvalidArgument, match=r"allow=\('torch.nn', 'evil_model'\)"):
        stillframe.load_model(tmp_path / "m")
    assert not (tmp_path / "was_here").exists()
    stillframe.load_model(tmp_path / "m", allow=("evil_model",))
    assert (tmp_path / "was_here").exists()
    monkeypatch.delitem(sys.modules, "evil_model")
    (tmp_path / "evil_model.py").write_text("")
    with pytest.raises(stillframe.InvalidArgument, match="not here any more.*Net"):
        stillframe.load_model(tmp_path / "m", allow=("evil_model",))
    monkeypatch.delitem(sys.modules, "evil_model", raising=False)
    (tmp_path / "evil_model.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(stillframe.InvalidArgument, match="not here any more.*evil_model"):
        stillframe.load_model(tmp_path / "m", allow=("evil_model",))


def rewrite_recipe(path: Path, change: Any) -> None:
    """Change a saved model's recipe as somebody who forges it could: hashes made right again."""
    weights = load_file(path / "model.safetensors")
    state = json.loads((path / "state.json").read_text())
    change(state["recipe"])
    from stillframe._torch.write import Part, write_model

    part = Part("model", weights, [("format", "pt")])
    write_model(str(path), [part], json.dumps(state).encode(), has_pickle=False)


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn:functional.torch.os.system",
        "torch.nn:init.uniform_",
        "torch.nn.modules.module:torch.hub.load",
        "torch.nn:parallel.replicate.replicate",
        "os:system",
        "builtins:exec",
        "torch.nn",
        ":x",
        "torch.nn:__import__('os')",
    ],
)
@pytest.mark.parametrize("kind", ["class", "factory"])
def test_a_forged_recipe_reaches_nothing_but_models(tmp_path: Path, name: str, kind: str) -> None:
    stillframe.save_model(nn.Linear(2, 2), tmp_path / "m")

    def forge(recipe: dict[str, Any]) -> None:
        del recipe["structure"]
        recipe[kind] = name
        recipe["config"] = {}

    rewrite_recipe(tmp_path / "m", forge)
    with pytest.raises(stillframe.InvalidArgument):
        stillframe.load_model(tmp_path / "m")


@pytest.mark.parametrize(
    "node",
    [
        {"class": "functional", "arguments": {}},
        {"class": "Linear", "arguments": {"in_features": -1, "out_features": 2}},
        {"class": "Linear"},
        {"same": "x"},
        [],
        None,
        {"class": "DataParallel", "arguments": {"module": 3}},
    ],
)
def test_a_damaged_description_is_data_loss(tmp_path: Path, node: Any) -> None:
    stillframe.save_model(nn.Linear(2, 2), tmp_path / "m")
    rewrite_recipe(tmp_path / "m", lambda recipe: recipe.update(structure=node))
    with pytest.raises(stillframe.DataLoss):
        stillframe.load_model(tmp_path / "m")


# --- Changes since -------------------------------------------------------------------------------


def test_changed_source_and_another_torch_are_warned_of_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "shifting_model.py"
    text = (
        "from torch import nn\n"
        "class Block(nn.Module):\n"
        "    def forward(self, x): return x + 1\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.block = Block()\n"
        "        self.layer = nn.Linear(2, 2)\n"
    )
    source.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    module = importlib.import_module("shifting_model")
    stillframe.save_model(module.Net(), tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stillframe.load_model(tmp_path / "m", allow=("shifting_model",))
    source.write_text(text.replace("x + 1", "x + 2"))
    importlib.reload(module)
    import linecache

    linecache.checkcache()
    with pytest.warns(stillframe.StillframeWarning, match="shifting_model:Block has changed"):
        stillframe.load_model(tmp_path / "m", allow=("shifting_model",))
    source.write_text(text)
    importlib.reload(module)
    linecache.checkcache()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.warns(stillframe.StillframeWarning, match="this is torch 9.9.9"):
        stillframe.load_model(tmp_path / "m", allow=("shifting_model",))
    monkeypatch.delitem(sys.modules, "shifting_model")


# --- torch.export --------------------------------------------------------------------------------


def test_a_program_infers_without_the_source_and_stores_no_weight_twice(tmp_path: Path) -> None:
    model = trained(Net(64))
    model.register_buffer("large", torch.randn(100_000))
    model.forward = lambda tokens: Net.forward(model, tokens) + model.large[0]  # type: ignore
    del model.forward
    stillframe.save_model(
        model,
        tmp_path / "m",
        config={"hidden": 64},
        example_inputs=TOKENS,
        dynamic_shapes={"tokens": {0: torch.export.Dim.DYNAMIC}},
    )
    assert model.training
    assert os.path.getsize(tmp_path / "m" / "program.safetensors") < 100_000
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, torch; import stillframe.torch as sf\n"
            "model = sf.load_model(sys.argv[1])\n"
            "assert not model.training and 'whole_model' not in sys.modules\n"
            "batches = torch.tensor([1, 5, 9, 5]), torch.tensor([3, 2])\n"
            "sf.save([model(batch) for batch in batches], sys.argv[2])",
            tmp_path / "m",
            tmp_path / "out",
        ],
        env={**os.environ, "PYTHONPATH": str(Path(stillframe.__file__).parents[1])},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    four, two = stillframe.load(tmp_path / "out")
    torch.testing.assert_close(four, compute(model))
    torch.testing.assert_close(two, compute(model, torch.tensor([3, 2])))


def hostile(archive: bytes, change: Any) -> bytes:
    """The archive with its members changed by name: change(name, bytes) -> bytes or None."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = change(entry.filename, old.read(entry))
            if content is not None:
                new.writestr(entry.filename, content)
    return out.getvalue()


class _Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/stillframe-bomb-went-off",)


def test_an_archive_that_would_unpickle_or_evaluate_is_refused(tmp_path: Path) -> None:
    program = torch.export.export(Plain(), (torch.ones(2, 3),))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    stock = buffer.getvalue()
    assert any("sample_inputs" in reason for reason in unsafe_contents(stock))
    program.example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    clean = buffer.getvalue()
    assert list(unsafe_contents(clean)) == []

    def pickled_weight(name: str, content: bytes) -> bytes:
        return content.replace(b'"use_pickle": false', b'"use_pickle": true')

    def expression(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        graph = json.loads(content)
        graph["range_constraints"]["s0"] = {"expr_str": "().__class__.__base__"}
        return json.dumps(graph).encode()

    def operator(name: str, content: bytes) -> bytes:
        return content.replace(b"torch.ops.aten.linear.default", b"torch.os.system")

    def sample(name: str, content: bytes) -> bytes:
        return pickle.dumps(_Bomb()) if "sample_inputs" in name else content

    for change in (pickled_weight, expression, operator, sample):
        archive = hostile(clean, change)
        assert archive != clean
        assert list(unsafe_contents(archive)), change.__name__

    stillframe.save_model(Plain(), tmp_path / "m", example_inputs=torch.ones(2, 3))
    from stillframe._torch.write import Part, write_model

    tensor = torch.frombuffer(bytearray(hostile(clean, sample)), dtype=torch.uint8)
    write_model(
        str(tmp_path / "m"),
        [
            Part("model", load_file(tmp_path / "m" / "model.safetensors")),
            Part("program", {"program.pt2": tensor}),
        ],
        (tmp_path / "m" / "state.json").read_bytes(),
        has_pickle=False,
    )
    with pytest.raises(stillframe.InvalidArgument, match="allow_pickle"):
        stillframe.load_model(tmp_path / "m")
    assert not os.path.exists("/tmp/stillframe-bomb-went-off")


def test_a_model_that_cannot_be_exported_says_so_and_stays_as_it_was(tmp_path: Path) -> None:
    class Branching(Plain):
        def forward(self, batch: Tensor) -> Tensor:
            return batch if batch.sum() > 0 else self.layer(batch)

    model = Branching().train()
    model.layer.eval()
    with pytest.raises(stillframe.InvalidArgument, match=r"torch\.export cannot export"):
        stillframe.save_model(model, tmp_path / "m", example_inputs=torch.ones(2, 3))
    assert model.training
    assert not model.layer.training
    assert os.listdir(tmp_path) == []


# --- Pickle --------------------------------------------------------------------------------------


def test_pickle_needs_both_sides_and_holds_no_weights(tmp_path: Path) -> None:
    model = trained(Net(64))
    stillframe.save_model(model, tmp_path / "m", allow_pickle=True)
    state = json.loads((tmp_path / "m" / "state.json").read_text())
    assert len(base64.b64decode(state["recipe"]["pickle"])) < 8000
    assert json.loads((tmp_path / "m" / "manifest.json").read_text())["has_pickle"] is True
    with pytest.raises(stillframe.InvalidArgument, match="allow_pickle=True only if you trust"):
        stillframe.load_model(tmp_path / "m", allow=ALLOW)
    loaded = stillframe.load_model(tmp_path / "m", allow_pickle=True)
    assert isinstance(loaded, Net)
    assert torch.equal(loaded(TOKENS), compute(model))
    assert loaded.head.weight is loaded.embed.weight
