"""The demo learns its passage, reports honestly, and answers mistakes with one sentence."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json

import pytest
import torch

import fusedrnn
from fusedrnn import _demo, _plot

CELLS = list(_demo.CELLS)
RESULT_KEYS = {
    "implementation",
    "iterations",
    "loss",
    "accuracy",
    "recall",
    "seconds",
    "torch_seconds",
    "torch_iterations",
    "speedup",
}


def parse(*options: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo")
    _demo.add_arguments(parser)
    return parser.parse_args([str(option) for option in options])


@pytest.fixture
def brief_torch(monkeypatch):
    """Times torch.nn for one iteration only."""
    monkeypatch.setattr(_demo, "TORCH_SECONDS", 0.0)


@pytest.fixture
def short_text(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("to be, or not to be\n", encoding="utf-8")
    return path


def test_encode_frames_the_text_with_tokens_and_decode_leaves_them_out():
    ids = _demo.encode("cab", "abc")
    assert ids.tolist() == [3, 2, 0, 1, 4]
    assert _demo.decode(ids, "abc") == "cab"
    with pytest.raises(ValueError, match="not found"):
        _demo.encode("d", "abc")


def test_default_passage_keeps_to_the_alphabet():
    text = parse().text
    assert 500 <= len(text) <= 700
    assert set(text) <= set(_demo.ALPHABET)


@pytest.mark.parametrize("cell", CELLS)
def test_recite_equals_one_pass_over_what_it_said(cell):
    model = _demo.CharacterModel(getattr(fusedrnn, _demo.CELLS[cell]), 4, 16, layers=2)
    for _ in _demo.train(model, _demo.encode("aabab", "ab"), 60, "cross-entropy"):
        pass
    said = _demo.recite(model, 9)
    heard = torch.cat([torch.tensor([2]), said[:-1]])
    assert torch.equal(model(heard)[0].argmax(1), said)
    assert said.tolist() == [0, 0, 1, 0, 1, 3]  # "aabab" needs the state: a follows a once, then b does.


def test_recite_stops_at_the_end_token():
    model = _demo.CharacterModel(fusedrnn.GRU, 5, 3)
    torch.nn.init.zeros_(model.readout.weight)
    with torch.no_grad():
        model.readout.bias.copy_(torch.arange(5.0))
    assert _demo.recite(model, 9).tolist() == [4]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_training_equals_torch(cell, loss):
    ids = _demo.encode("abba, abba", _demo.ALPHABET)
    models = []
    for package in (fusedrnn, torch.nn):
        torch.manual_seed(3)
        models.append(_demo.CharacterModel(getattr(package, _demo.CELLS[cell]), len(_demo.ALPHABET) + 2, 16))
    ours, torchs = (list(_demo.train(model, ids, 5, loss)) for model in models)
    assert [step.iteration for step in ours] == [1, 2, 3, 4, 5]
    assert [step.loss for step in ours] == pytest.approx([step.loss for step in torchs], rel=1e-3)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.usefixtures("brief_torch")
def test_says_the_default_passage_whole(cell, tmp_path, capsys):
    assert _demo.run(parse("--cell", cell, "--json", tmp_path / "o.json")) == 0
    result = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))["cells"][cell]
    assert result["recall"] == 1.0
    assert result["accuracy"] == 1.0
    assert result["iterations"] < 250
    assert parse().text[-20:] in capsys.readouterr().out


def test_json_of_a_short_run(short_text, tmp_path, capsys):
    options = ("--text", short_text, "--hidden", 16, "--iterations", 3, "--json", tmp_path / "o.json")
    assert _demo.run(parse(*options)) == 0
    report = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
    assert list(report["cells"]) == CELLS
    assert report["versions"]["torch"] == torch.__version__
    assert report["settings"] == {
        "hidden": 16,
        "layers": 1,
        "iterations": 3,
        "loss": "cross-entropy",
        "device": "cpu",
        "seed": 0,
        "characters": 19,
    }
    for result in report["cells"].values():
        assert set(result) == RESULT_KEYS
        assert result["recall"] < 1.0
        assert result["torch_iterations"] == result["iterations"] == 3
        assert result["speedup"] == result["torch_seconds"] / result["seconds"]
    assert "scaled" not in capsys.readouterr().out


@pytest.mark.usefixtures("brief_torch")
def test_a_scaled_time_is_called_scaled(short_text, tmp_path, monkeypatch, capsys):
    clock = itertools.count()
    monkeypatch.setattr(_demo.time, "perf_counter", lambda: float(next(clock)))  # Every iteration takes 1 s.
    options = ("--text", short_text, "--cell", "rnn", "--iterations", 4, "--json", tmp_path / "o.json")
    assert _demo.run(parse(*options)) == 0
    result = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))["cells"]["rnn"]
    assert (result["seconds"], result["torch_seconds"], result["torch_iterations"]) == (4.0, 4.0, 1)
    assert "RNN: torch.nn's time is scaled from 1 timed iteration" in capsys.readouterr().out


@pytest.mark.usefixtures("brief_torch")
def test_letters_outside_the_alphabet_extend_it(tmp_path, capsys):
    path = tmp_path / "korean.txt"
    path.write_text("순환 신경망\nÉ", encoding="utf-8")
    assert _demo.run(parse("--text", path, "--cell", "lstm", "--hidden", 32)) == 0
    assert "recall 1.000" in (out := capsys.readouterr().out)
    assert "순환 신경망\n" in out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "cannot read"), (b" \n", "holds no text"), (b"\xff\xfe", "is not UTF-8 text")],
)
def test_a_bad_text_is_named(content, sentence, tmp_path, capsys):
    path = tmp_path / "passage"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        parse("--text", path)
    assert sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "options",
    [
        ("--hidden", "0"),
        ("--layers", "0"),
        ("--iterations", "-1"),
        ("--iterations", "many"),
        ("--seed", "-1"),
        ("--seed", str(2**63)),
        ("--cell", "qrnn"),
        ("--loss", "hinge"),
        ("--device", "abacus"),
        ("--device", "meta"),
        ("--json", "no/such/folder/o.json"),
        ("--json", "."),
        ("--plot", "picture.txt"),
    ],
    ids="=".join,
)
def test_a_bad_value_is_one_line(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(*options)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"demo: error: argument {options[0]}: ")


def test_plot_without_matplotlib_is_refused_before_training(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="2"):
        parse("--plot", "picture.png")
    assert "argument --plot: needs matplotlib" in capsys.readouterr().err


def test_interrupt_keeps_what_was_reached(monkeypatch, short_text, tmp_path, capsys):
    def interrupted_train(model, ids, iterations, loss):
        for step in train(model, ids, iterations, loss):
            yield step
            if isinstance(model.layer, fusedrnn.LSTM) and step.iteration == 2:
                raise KeyboardInterrupt

    train = _demo.train
    monkeypatch.setattr(_demo, "train", interrupted_train)
    options = ("--text", short_text, "--iterations", 3, "--json", tmp_path / "o.json")
    assert _demo.run(parse(*options)) == 130
    report = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
    assert report["interrupted"]
    assert list(report["cells"]) == ["rnn", "lstm"]
    assert report["cells"]["rnn"]["speedup"] > 0
    assert report["cells"]["lstm"]["iterations"] == 2
    assert report["cells"]["lstm"]["recall"] is None
    assert "Interrupted" in (out := capsys.readouterr().out)
    assert "LSTM" in out.splitlines()[-1]


@pytest.mark.parametrize("cell", CELLS)
def test_memory_is_the_norm_of_the_jacobian(cell):
    layer = getattr(fusedrnn, _demo.CELLS[cell])(3, 4, num_layers=2).double()
    x = torch.randn(6, 1, 3, dtype=torch.float64)
    norms = _plot.memory(layer, x)
    assert len(norms) == 5
    for lag, norm in enumerate(norms, start=1):
        _, state = layer(x[:-lag])

        def last_state(h, lag=lag, state=state):
            after = layer(x[-lag:], (h, state[1]) if isinstance(state, tuple) else h)[1]
            return (after[0] if isinstance(after, tuple) else after)[-1, 0]

        h = state[0] if isinstance(state, tuple) else state
        jacobian = torch.autograd.functional.jacobian(last_state, h.detach()).flatten(1)
        assert norm == pytest.approx(torch.linalg.matrix_norm(jacobian, ord=2).item(), rel=1e-9)


@pytest.mark.usefixtures("brief_torch")
def test_plot_is_written(short_text, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    assert _demo.run(parse("--text", short_text, "--hidden", 8, "--iterations", 5, "--plot", path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
