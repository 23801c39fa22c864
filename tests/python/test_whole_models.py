"""save_model() and load_model(): a model again, without pickle."""

from __future__ import annotations

import base64
import copy
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
from command import run
from stillframe._program import unsafe_contents
from stillframe._recipe import checkpoint_recipe
from whole_model import Net, Plain, make_net, quantised

TOKENS = torch.tensor([1, 5, 9, 5])
ALLOW = ("torch.nn", "whole_model")


def trained(model: nn.Module, batch: Tensor = TOKENS) -> nn.Module:
    """The model with values that no constructor makes, in training mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model(batch)
    return model


def compute(model: nn.Module, batch: Tensor = TOKENS) -> Tensor:
    """What a copy of the model computes in eval mode."""
    return copy.deepcopy(model).eval()(batch)


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
    from stillframe._write import Part, write_model

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
    from stillframe._write import Part, write_model

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


# --- Tensors -------------------------------------------------------------------------------------


def test_dtypes_ties_frozen_weights_and_buffers_come_back(tmp_path: Path) -> None:
    model = trained(Net(8)).bfloat16()
    model.embed.weight.requires_grad_(False)
    model.register_buffer("phases", torch.randn(3, dtype=torch.complex128))
    stillframe.save_model(model, tmp_path / "m", config={"hidden": 8})

    def factory(hidden: int) -> Net:
        made = Net(hidden)
        made.register_buffer("phases", torch.zeros(3, dtype=torch.complex128))
        made.head.weight = nn.Parameter(torch.zeros(16, hidden))  # No longer tied.
        return made

    for mmap in (False, True):
        loaded = stillframe.load_model(tmp_path / "m", factory=factory, mmap=mmap)
        for name, tensor in model.state_dict().items():
            assert loaded.state_dict()[name].dtype == tensor.dtype
            assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.head.weight is loaded.embed.weight
        assert not loaded.embed.weight.requires_grad
        assert loaded.table.dtype is torch.bfloat16
        assert loaded.offsets.dtype is torch.float32


def test_dtype_converts_floating_point_tensors_alone(tmp_path: Path) -> None:
    model = trained(Net(8))
    stillframe.save_model(model, tmp_path / "m", config={"hidden": 8})
    loaded = stillframe.load_model(tmp_path / "m", allow=ALLOW, dtype=torch.float64, device="cpu")
    assert loaded.embed.weight.dtype is torch.float64
    assert loaded.norm.num_batches_tracked.dtype is torch.int64
    assert loaded.head.weight is loaded.embed.weight
    with pytest.raises(stillframe.InvalidArgument, match="no floating-point dtype"):
        stillframe.load_model(tmp_path / "m", allow=ALLOW, dtype=torch.int8)


def test_loading_computes_no_first_values_but_makes_what_is_no_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stillframe.save_model(trained(Net(8)), tmp_path / "m", config={"hidden": 8})
    before = torch.get_rng_state()
    loaded = stillframe.load_model(tmp_path / "m", allow=ALLOW)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded.table, Net(8).table)


def test_strides_of_the_model_stay(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    stillframe.save_model(model, tmp_path / "m")

    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last).half()

    loaded = stillframe.load_model(tmp_path / "m", factory=factory)
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_a_model_made_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    model = trained(Net(8))
    stillframe.save_model(model, tmp_path / "m", config={"hidden": 8})

    def factory(hidden: int) -> nn.Module:
        made = Net(hidden)
        made.embed = nn.Embedding(16, hidden, device="meta")
        made.head = nn.Linear(hidden, 16, bias=False, device="meta")
        return made

    loaded = stillframe.load_model(tmp_path / "m", factory=factory)
    assert torch.equal(loaded(TOKENS), compute(model))
    assert loaded.head.weight is loaded.embed.weight


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: m.to("meta"), "layer.weight is on the meta device"),
        (
            lambda m: m.register_buffer("q", quantised()),
            "q is quantised",
        ),
        (lambda m: m.register_buffer("s", torch.eye(3).to_sparse()), "s is a sparse"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path, spoil: Any, said: str) -> None:
    stillframe.save_model(Plain(), tmp_path / "m")
    kept = (tmp_path / "m" / "manifest.json").read_bytes()
    model = Plain()
    spoil(model)
    with pytest.raises(stillframe.InvalidArgument, match=said):
        stillframe.save_model(model, tmp_path / "m")
    assert (tmp_path / "m" / "manifest.json").read_bytes() == kept


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    stillframe.save_model(Net(8), tmp_path / "m", config={"hidden": 8})

    def factory() -> nn.Module:
        made = Net(9)
        made.more = nn.Linear(1, 1)
        del made.norm.bias
        return made

    with pytest.raises(stillframe.InvalidArgument) as raised:
        stillframe.load_model(tmp_path / "m", factory=factory)
    text = str(raised.value)
    assert "missing in the checkpoint: more.bias, more.weight" in text
    assert "only in the checkpoint: norm.bias" in text
    assert "other shape: embed.weight is [16, 9], in the checkpoint [16, 8]" in text
    assert "nothing was loaded" in text


def test_extra_states_come_back(tmp_path: Path) -> None:
    class Counting(Plain):
        count = 0

        def get_extra_state(self) -> Any:
            return {"count": self.count}

        def set_extra_state(self, state: Any) -> None:
            self.count = state["count"]

    model = Counting()
    model.count = 7
    stillframe.save_model(model, tmp_path / "m", config={})
    loaded = stillframe.load_model(tmp_path / "m", factory=Counting)
    assert loaded.count == 7


def test_a_compiled_model_is_saved_as_what_is_inside(tmp_path: Path) -> None:
    model = trained(Net(8))
    stillframe.save_model(torch.compile(model), tmp_path / "m", config={"hidden": 8})
    loaded = stillframe.load_model(tmp_path / "m", allow=ALLOW)
    assert type(loaded) is Net
    assert torch.equal(loaded(TOKENS), compute(model))


# --- The directory -------------------------------------------------------------------------------


def test_a_saved_model_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "m"
    stillframe.save_model(nn.Linear(2, 2), path)
    stillframe.save_model(nn.Linear(3, 3), path)
    assert stillframe.load_model(path).in_features == 3
    assert os.listdir(path.parent) == ["m"]
    other = tmp_path / "other"
    other.mkdir()
    stillframe.save_model(nn.Linear(2, 2), other)
    for name, said in [("file", "no whole model"), ("full", "other files")]:
        target = tmp_path / name
        if name == "file":
            target.write_text("x")
        else:
            target.mkdir()
            (target / "x").write_text("x")
        with pytest.raises(stillframe.InvalidArgument, match=said):
            stillframe.save_model(nn.Linear(2, 2), target)
    with pytest.raises(stillframe.InvalidArgument, match="checkpoint"):
        stillframe.save_model(nn.Linear(2, 2), tmp_path / "00000012-step-1200")


@pytest.mark.parametrize(
    "file", ["model.safetensors", "state.json", "manifest.sums", "manifest.json"]
)
def test_damage_is_found_in_every_file(tmp_path: Path, file: str) -> None:
    stillframe.save_model(nn.Linear(400, 700), tmp_path / "m")
    target = tmp_path / "m" / file
    whole = target.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        target.write_bytes(damaged)
        with pytest.raises(stillframe.DataLoss):
            stillframe.load_model(tmp_path / "m")
        target.write_bytes(whole[:place])
        with pytest.raises(stillframe.DataLoss):
            stillframe.load_model(tmp_path / "m")
    target.write_bytes(whole)
    stillframe.load_model(tmp_path / "m")


def test_mapped_weights_are_left_to_verify(tmp_path: Path) -> None:
    stillframe.save_model(nn.Linear(1000, 700), tmp_path / "m")
    with (tmp_path / "m" / "model.safetensors").open("r+b") as file:
        file.seek(1_500_000)
        file.write(b"\x01\x02\x03")
    stillframe.load_model(tmp_path / "m", mmap=True)
    with pytest.raises(stillframe.DataLoss, match=r"model\.safetensors extent 1"):
        stillframe.verify(tmp_path / "m")


def test_training_a_mapped_model_leaves_the_file_alone(tmp_path: Path) -> None:
    stillframe.save_model(nn.Linear(100, 100), tmp_path / "m")
    model = stillframe.load_model(tmp_path / "m", mmap=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(100)).sum().backward()
    optimizer.step()
    stillframe.verify(tmp_path / "m")


def test_the_command_line_shows_and_verifies_a_saved_model(tmp_path: Path) -> None:
    for name in ("m", "best", "net@2"):
        stillframe.save_model(nn.Linear(2, 2), tmp_path / name)
        for command in ("verify", "show"):
            done = run(command, tmp_path / name)
            assert done.code == 0, done.err
        stillframe.load_model(tmp_path / name)
    (tmp_path / "m" / "model.safetensors").write_bytes(b"x")
    assert run("verify", tmp_path / "m").code == 4


def test_a_saved_model_is_no_run_to_train_in(tmp_path: Path) -> None:
    stillframe.save_model(nn.Linear(2, 2), tmp_path / "m")
    with (
        pytest.raises(stillframe.InvalidArgument, match="neither empty nor a run"),
        stillframe.Checkpointer(tmp_path / "m", model=nn.Linear(2, 2)) as checkpointer,
    ):
        checkpointer.save(0)


# --- Checkpoints of a run ------------------------------------------------------------------------


def test_checkpoints_of_a_run_load_by_every_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = Plain()
    losses = {1: 0.5, 2: 0.1, 3: 0.9}
    with stillframe.Checkpointer(
        run, model=model, best=("loss", "min", 1), keep_last=None
    ) as checkpointer:
        for step, loss in losses.items():
            with torch.no_grad():
                model.layer.weight.fill_(step)
            checkpointer.save(step, {"loss": loss}).wait("durable", timeout=60)
    directories = sorted(path for path in run.iterdir() if "-step-" in path.name)
    for name, step in [
        (run, 3),
        (f"{run}@latest", 3),
        (f"{run}@best", 2),
        (f"{run}/best", 2),
        (f"{run}@step-1", 1),
        (directories[0], 1),
        (f"{directories[1]}/", 2),
    ]:
        for mmap in (False, True):
            loaded = stillframe.load_model(name, factory=Plain, mmap=mmap)
            assert loaded.layer.weight[0, 0] == step, name
    with pytest.raises(stillframe.InvalidArgument, match="pass factory="):
        stillframe.load_model(run)
    for missing in (f"{run}@17", tmp_path / "none", f"{tmp_path}/none@best"):
        with pytest.raises(stillframe.NotFound):
            stillframe.load_model(missing, factory=Plain)


def test_a_checkpoint_gets_a_recipe_only_where_the_model_says_how_it_is_made() -> None:
    assert checkpoint_recipe(Net(3)) is None
    with_config = checkpoint_recipe(torch.compile(Net(3)), config={"hidden": 3})
    assert with_config is not None
    assert with_config["class"] == "whole_model:Net"
    described = checkpoint_recipe(nn.Sequential(nn.Linear(2, 2).requires_grad_(False)))
    assert described is not None
    assert "structure" in described
    assert described["frozen"] == ["0.weight", "0.bias"]
