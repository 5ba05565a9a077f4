"""A list of tensor operations as one Python function, made without the detours of ``fx.GraphModule``.

That looks operations and constants up by name, module by module, in every call; and the text of its function takes
longer to make than a small model to be recorded. Here both are variables of the function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Operations"]

_aten: Any = torch.ops.aten

# What torch has under its own name, too, where a call takes half as long.
_UNARY = ["abs", "cos", "digamma", "erf", "exp", "expm1", "lgamma", "log", "log1p", "neg", "reciprocal", "rsqrt"]
_UNARY += ["sigmoid", "sin", "sqrt", "tanh", "mean", "reshape", "select", "squeeze", "sum", "unsqueeze"]
_QUICKER: dict[Any, Callable[..., Any]] = {
    getattr(getattr(_aten, name), overload): getattr(torch, name)
    for name in _UNARY
    for overload in getattr(_aten, name).overloads()
    if overload in ("default", "dim_IntList", "int")
} | {
    _aten.add.Tensor: torch.add,
    _aten.sub.Tensor: torch.sub,
    _aten.rsub.Scalar: torch.rsub,
    _aten.mul.Tensor: torch.mul,
    _aten.div.Tensor: torch.div,
    _aten.pow.Tensor_Scalar: torch.pow,
    _aten.xlogy.Tensor: torch.xlogy,
    _aten.expand.default: Tensor.expand,
}


class Operations:
    """What is recorded of a function of two tensors, to be called like it.

    :param constants: by the names that the graph reads them by; parameters among them.
    :param fx.Graph graph: operations, each a call of a function.
    """

    def __init__(self, constants: Mapping[str, Tensor], graph: fx.Graph) -> None:
        self.constants, self.graph = constants, graph

    def __call__(self, *arguments: Tensor) -> Any:
        """Carry them out."""
        return self.function(*arguments)

    def __len__(self) -> int:
        """The number of operations."""
        return sum(node.op == "call_function" for node in self.graph.nodes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Store them as a module, which is what fx knows to store."""
        return _stored, (self.module(),)

    def module(self) -> fx.GraphModule:
        """Return the same as a module of fx, such as its interpreters take."""
        return fx.GraphModule(dict(self.constants), self.graph)

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The function itself."""
        return _Writer(self.graph, self.constants).written()


def _stored(module: fx.GraphModule) -> Operations:
    read = [node.target for node in module.graph.nodes if node.op == "get_attr"]
    return Operations({name: getattr(module, name) for name in read}, module.graph)


class _Writer:
    """Writes the text of a function, in which every tensor is let go of where it is not needed any longer."""

    def __init__(self, graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
        self.graph, self.constants = graph, constants
        self.names: dict[fx.Node, str] = {}
        self.scope: dict[str, Any] = {}

    def written(self) -> Callable[..., Any]:
        """Return the function."""
        arguments = [self._name(node) for node in self.graph.nodes if node.op == "placeholder"]
        last = {used: node for node in self.graph.nodes for used in node.all_input_nodes}
        lines = [f"def function({', '.join(arguments)}):"]
        for node in self.graph.nodes:
            if node.op == "call_function":
                call = f"{self._given(_QUICKER.get(node.target, node.target))}({self._arguments(node)})"
                lines.append(f"    {self._name(node)} = {call}")
                done = [
                    self.names[used] for used in node.all_input_nodes if last[used] is node and used.op != "get_attr"
                ]
                lines += [f"    del {', '.join(done)}"] if done else []
            elif node.op == "get_attr":
                self.names[node] = self._given(self.constants[node.target])
            elif node.op == "output":
                lines.append(f"    return {self._text(node.args[0])}")
        exec("\n".join(lines), self.scope)  # of nothing but names that are made here
        function: Callable[..., Any] = self.scope["function"]
        return function

    def _name(self, node: fx.Node) -> str:
        return self.names.setdefault(node, f"t{len(self.names)}")

    def _given(self, value: Any) -> str:
        """A name for something that is there already."""
        name = f"given{len(self.scope)}"
        self.scope[name] = value
        return name

    def _arguments(self, node: fx.Node) -> str:
        named = [f"{name}={self._text(value)}" for name, value in node.kwargs.items()]
        return ", ".join([*map(self._text, node.args), *named])

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, list):
            return f"[{', '.join(map(self._text, value))}]"
        if isinstance(value, tuple):
            return f"({''.join(f'{self._text(part)}, ' for part in value)})"
        return repr(value) if type(value) in (int, bool, type(None)) else self._given(value)
