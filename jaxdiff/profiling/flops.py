"""Model FLOPs: those of the matrix products and convolutions of a traced function.

They are counted in the function as written, not in the compiled program: attention by its equation
whichever kernel computes it, without rematerialisation and padding. A multiply-add counts as two.

A product c = a b costs as much again for the gradient of a, and again for that of b (da = dc b^T,
db = a^T dc). So with gradients it counts 1 + [a depends on parameters] + [b depends on parameters].
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxdiff.core.types import PyTree
from jaxdiff.nn.attention import ATTENTION_JIT_NAME as ATTENTION


def forward_flops(function: Callable[..., Any], *arguments: PyTree) -> float:
    """The FLOPs of `function` on arguments of these shapes."""
    return _flops(function, arguments, trained=False)


def gradient_flops(function: Callable[..., Any], *arguments: PyTree) -> float:
    """The FLOPs of `function` and of its gradient for the first of the arguments."""
    return _flops(function, arguments, trained=True)


def _flops(function: Callable[..., Any], arguments: Sequence[PyTree], *, trained: bool) -> float:
    program = jax.make_jaxpr(function)(*arguments)
    first = len(jax.tree.leaves(arguments[0]))
    depends_on_params = [trained and i < first for i in range(len(program.jaxpr.invars))]
    return _walk(program.jaxpr, depends_on_params)[0]


def _walk(program: core.Jaxpr, depends_on_params: Sequence[bool]) -> tuple[float, list[bool]]:
    """FLOPs of a jaxpr, and which outputs depend on parameters, given which inputs do."""
    depends = dict(zip(program.invars, depends_on_params, strict=True))

    def depends_of(atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and depends.get(atom, False)

    total = 0.0
    for equation in program.eqns:
        inputs = [depends_of(atom) for atom in equation.invars]
        flops, outputs = _equation(equation, inputs)
        total += flops
        depends |= dict(zip(equation.outvars, outputs, strict=True))
    return total, [depends_of(atom) for atom in program.outvars]


def _equation(equation: core.JaxprEqn, depends_on_params: list[bool]) -> tuple[float, list[bool]]:
    name, parameters = equation.primitive.name, equation.params
    any_depends = [any(depends_on_params)] * len(equation.outvars)
    if name == "stop_gradient":
        return 0.0, [False] * len(equation.outvars)
    if parameters.get("name") == ATTENTION:
        return _attention(equation, depends_on_params), any_depends
    if name == "dot_general":
        return _dot(equation) * (1 + sum(depends_on_params)), any_depends
    if name == "conv_general_dilated":
        return _convolution(equation) * (1 + sum(depends_on_params)), any_depends
    if name == "while":
        raise NotImplementedError("a loop whose length is not known from shapes")
    # Of kernels, attention's are above, and those of norms replace no products of the model.
    inner = [] if name == "pallas_call" else [_jaxpr(value) for value in _programs(parameters)]
    if not inner:
        return 0.0, any_depends
    if name == "cond":
        # What one platform computes more than another is not the model's.
        by_platform = parameters.get("branches_platforms") is not None
        found = [_walk(branch, depends_on_params[1:])[0] for branch in inner]
        return min(found) if by_platform else max(found), any_depends
    if name == "scan":
        # An iteration's dependencies may reach the next through the carry.
        depends_on_params = [any(depends_on_params)] * len(depends_on_params)
        return parameters["length"] * _walk(inner[0], depends_on_params)[0], any_depends
    flops, outputs = _walk(inner[0], depends_on_params[-len(inner[0].invars) :])
    return flops, outputs if len(outputs) == len(any_depends) else any_depends


def _programs(parameters: dict[str, Any]) -> list[Any]:
    """The functions that an equation calls."""
    if "branches" in parameters:
        return list(parameters["branches"])
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in parameters:
            return [parameters[name]]
    return []


def _jaxpr(program: Any) -> core.Jaxpr:
    return program.jaxpr if isinstance(program, core.ClosedJaxpr) else program


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _dot(equation: core.JaxprEqn) -> float:
    """2 x every output x the length of the sum."""
    a = _shape(equation.invars[0])
    (contracted, _), _ = equation.params["dimension_numbers"]
    length = math.prod(a[axis] for axis in contracted)
    return 2.0 * math.prod(_shape(equation.outvars[0])) * length


def _convolution(equation: core.JaxprEqn) -> float:
    """2 x every output x the inputs and the window that it sees, padding included."""
    kernel = _shape(equation.invars[1])
    out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) / out_channels


def _attention(equation: core.JaxprEqn, depends_on_params: list[bool]) -> float:
    """q k^T and its softmax times v, each 2 b h n m d."""
    (b, n, heads, width), (_, m, _, _) = (_shape(atom) for atom in equation.invars[:2])
    q, k, v = depends_on_params[:3]
    return 2.0 * b * heads * n * m * width * ((1 + q + k) + (1 + (q or k) + v))
