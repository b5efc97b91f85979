"""prepack among what else is done with modules: copies, conversion, graphs, threads, explain."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
from test_prepack import assert_same, flat, infer, unseen_change
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence

import fusedrnn

extension = pytest.importorskip("fusedrnn._C", exc_type=ImportError)


def test_copies_pack_for_themselves(layer, x):
    fusedrnn.prepack(layer)
    before = infer(lambda: layer(x))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert_same(infer(lambda other=other: other(x)), before)
        unseen_change(other)
        assert_same(infer(lambda other=other: other(x)), before)  # which it had packed
    assert "_prepacked" not in layer.state_dict()


def test_undone(layer, x):
    fusedrnn.prepack(layer)
    before = infer(lambda: layer(x))
    unseen_change(layer)
    assert fusedrnn.prepack(layer, enabled=False) is layer
    assert not torch.equal(infer(lambda: layer(x))[0], before[0])
    fusedrnn.prepack(layer)
    with pytest.warns(fusedrnn.FallbackWarning, match="script"):
        assert "_prepacked" not in vars(layer.__prepare_scriptable__())
    assert type(fusedrnn.revert(layer)) is torch.nn.LSTM
    assert "_prepacked" not in vars(layer)
    infer(lambda: layer(x))


def test_a_model_without_layers():
    model = torch.nn.Sequential(torch.nn.GRU(3, 4), fusedrnn.GRUCell(3, 4))
    with pytest.warns(UserWarning, match="found no layer .*convert"):
        assert fusedrnn.prepack(model) is model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedrnn.prepack(fusedrnn.convert(model))
    assert model[0]._prepacked is not None


def test_a_users_subclass():
    class Reversed(torch.nn.GRU):
        def forward(self, x, hx=None):
            return super().forward(x.flip(0), hx)

    layer, x = fusedrnn.convert(Reversed(3, 9)), torch.randn(5, 2, 3)
    expected = infer(lambda: layer(x))
    fusedrnn.prepack(layer)
    torch.testing.assert_close(infer(lambda: layer(x)), expected)
    unseen_change(layer)
    torch.testing.assert_close(infer(lambda: layer(x)), expected)


def test_weights_of_inference_mode_are_packed_at_every_call(x):
    """torch does not count their changes."""
    with torch.inference_mode():
        layer = fusedrnn.prepack(fusedrnn.GRU(5, 9))
        before = flat(layer(x))
        layer.weight_hh_l0.mul_(2)
        assert not torch.equal(flat(layer(x))[0], before[0])


@pytest.mark.filterwarnings("ignore")  # torch says much about tracing
@pytest.mark.parametrize("how", ["compile", "export", "trace", "vmap", "functional_call"])
def test_whoever_sees_through_sees_the_weights(how, layer, x):
    expected = infer(lambda: layer(x))
    fusedrnn.prepack(layer)
    infer(lambda: layer(x))
    weights = {name: w.detach() for name, w in layer.named_parameters()}
    with torch.no_grad():
        if how == "compile":
            call = torch.compile(layer, fullgraph=True, backend="eager")
        elif how == "export":
            call = torch.export.export(layer, (x,)).module()
        elif how == "trace":
            call = torch.jit.trace(layer, x)
        elif how == "vmap":
            call = lambda x: [t[0] for t in flat(torch.func.vmap(layer)(x[None]))]  # noqa: E731
        else:
            call = lambda x: torch.func.functional_call(layer, weights, (x,))  # noqa: E731
        torch.testing.assert_close(flat(call(x)), expected)
        if how == "functional_call":
            weights = {name: 2 * w for name, w in weights.items()}
            layer.load_state_dict(weights)
            torch.testing.assert_close(flat(call(x)), flat(layer(x)))


def test_explain_names_it(layer, x):
    assert "once" not in fusedrnn.explain(layer, x).reason
    fusedrnn.prepack(layer)
    assert "once" not in fusedrnn.explain(layer, x).reason  # as things are, a training step
    with torch.no_grad():
        assert "weights packed once, " in fusedrnn.explain(layer, x).reason
        packed = PackedSequence(torch.randn(5, 5), torch.tensor([3, 2, 0]))
        assert "weights packed once, " in fusedrnn.explain(layer, packed).reason
        dropping = fusedrnn.prepack(fusedrnn.LSTM(5, 9, 2, dropout=0.5))
        assert "once" not in fusedrnn.explain(dropping, x).reason
        assert "once" in fusedrnn.explain(dropping.eval(), x).reason
        pruned = fusedrnn.prepack(fusedrnn.LSTM(5, 9))
        prune.random_unstructured(pruned, "weight_hh_l0", amount=0.5)
        assert "once" not in fusedrnn.explain(pruned, x).reason
        assert "once" not in fusedrnn.explain(layer, x[:1]).reason
        assert "once" not in fusedrnn.explain(fusedrnn.LSTMCell(5, 9), x[0]).reason


def test_explain_names_it_where_no_weight_wants_a_gradient(layer, x):
    assert "once" in fusedrnn.explain(fusedrnn.prepack(layer.requires_grad_(False)), x).reason


def test_many_threads_and_a_change_meanwhile():
    """Every result is of the weights before or after a change."""
    layer = fusedrnn.prepack(fusedrnn.GRU(5, 40))
    inputs = [torch.randn(9, rows, 5) for rows in (1, 2, 3, 8)]
    states = [{name: w * factor for name, w in layer.state_dict().items()} for factor in (1.0, 0.5)]
    expected = []
    for state in states:
        layer.load_state_dict(state)
        expected.append([infer(lambda x=x: layer(x))[0] for x in inputs])
    wrong: list[str] = []
    lock = threading.Lock()  # for torch's copy is no single moment

    def work(turn: int) -> None:
        for i in range(200):
            which = (i + turn) % len(inputs)
            with lock:
                now = (i + turn) // 7 % 2
                layer.load_state_dict(states[now])
                found = infer(lambda which=which: layer(inputs[which]))[0] if i % 2 else None
            if found is None:
                found = infer(lambda which=which: layer(inputs[which]))[0]
                if found.shape != expected[0][which].shape or not torch.isfinite(found).all():
                    wrong.append(f"{turn} {i}")
            elif not torch.equal(found, expected[now][which]):
                wrong.append(f"{turn} {i} alone")

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
