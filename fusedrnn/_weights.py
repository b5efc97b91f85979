"""The weights that a layer's call uses, as torch.nn's layers choose them."""

from __future__ import annotations

import weakref
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from fusedrnn._checks import parameters


class FlatWeights(torch.nn.RNNBase):
    """Those of a layer: its attributes, or what ``_flat_weights`` has been given, until an attribute is another."""

    _prepacked: Any = None  # what it has packed of them (_prepack.py)

    def __setattr__(self, name: str, value: Any) -> None:
        names = self.__dict__.get("_flat_weights_names", ())
        # RNNBase's own leaves a value that is refused in the list, where it would be used.
        super(torch.nn.RNNBase, self).__setattr__(name, value)
        if name in names:
            refs = list(self._flat_weight_refs)  # which a shallow copy, such as a replica, shares
            refs[names.index(name)] = None if value is None else weakref.ref(value)
            self._flat_weight_refs = refs
            self._flat_weights = self._listed()

    def _shapes(self) -> list[tuple[int, ...]]:
        """Those of the weights, by the layer's sizes."""
        rows = {"LSTM": 4, "GRU": 3}.get(self.mode, 1) * self.hidden_size
        width, directions = self.proj_size or self.hidden_size, 2 if self.bidirectional else 1
        shapes: list[tuple[int, ...]] = []
        for layer in range(self.num_layers):
            inputs = directions * width if layer else self.input_size
            each = [(rows, inputs), (rows, width), *[(rows,)] * (2 * self.bias)]
            shapes += (each + [(width, self.hidden_size)] * (self.proj_size > 0)) * directions
        return shapes

    def _listed(self) -> list[Any]:
        """The attributes of which the list was made."""
        return [None if ref is None else ref() for ref in self._flat_weight_refs]

    def _weights(self) -> list[Tensor]:
        """Per layer and direction, as ``_flat_weights_names`` has them."""
        weights = parameters(self, self._flat_weights_names)
        if any(map(is_not, weights, self._flat_weights)):
            made_of = self._listed()
            if not any(map(is_not, weights, made_of)):
                weights = list(self._flat_weights)
            elif all(isinstance(w, torch.nn.Parameter) for w in weights) and not torch.compiler.is_compiling():
                self._flat_weight_refs, self._flat_weights = [weakref.ref(w) for w in weights], list(weights)
            else:  # some have been made for this call
                self._flat_weights = made_of
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            if weight is None:
                raise TypeError(f"{self.mode}: expected {name} to be a tensor, got None")
        return weights
