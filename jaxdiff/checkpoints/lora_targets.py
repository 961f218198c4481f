"""The parameters of a model that names in LoRA files stand for.

Names are looked up among the paths that the model has: underscores in them are ambiguous. Those of
the original code may name a tensor of which diffusers has made several, one after the other by
rows, such as queries, keys and values; or one whose halves diffusers has swapped.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from jaxdiff.checkpoints import ldm_writer
from jaxdiff.checkpoints.key_mapping import path_to_torch_key, torch_shape
from jaxdiff.checkpoints.key_tables import KeyTable, Parts, Rule, rows
from jaxdiff.checkpoints.layout_flux import CHROMA_TABLE, FLUX_TABLE
from jaxdiff.checkpoints.layout_sd3 import TABLE as SD3_TABLE
from jaxdiff.checkpoints.lora_change import Shape
from jaxdiff.checkpoints.lora_names import T5, TRANSFORMER, UNET, in_original_names, parse
from jaxdiff.checkpoints.safetensors import TensorInfo

# The PyTorch key of a parameter, or those of several whose rows follow each other in one.
Target = str | tuple[str, ...]
Roles = Mapping[str, TensorInfo]  # the tensors of one module

# Names of modules in diffusers that no other transformer has, and widths of published networks.
_OF_SD3 = re.compile(r"pos_embed\.|transformer_blocks\.\d+\.attn2\.")
SD3_WIDTHS = {1536, 2432}
# Queries, keys and values of a single block, which XLabs changes without the rows that follow.
_XLABS = rows(
    "single_blocks.*.qkv.",
    *(f"single_transformer_blocks.*.attn.to_{x}." for x in "qkv"),
)
XLABS_TABLE = KeyTable(
    (_XLABS,), original_blocks="single_blocks.", blocks="single_transformer_blocks."
)


class Targets:
    """The parameters of a model's components, by the names that LoRA files have for them.

    Parameters that are one in the original code, or have swapped halves there, go by the original
    names too.
    """

    def __init__(self, shapes: Mapping[str, Mapping[str, Shape]]) -> None:
        """`shapes` are those of the weights of each component, by path and in its own layout."""
        self._places: dict[str, dict[str, Parts]] = {}  # by component and name
        self._shapes: dict[str, dict[str, Shape]] = {}
        self._modules: dict[str, dict[str, str]] = {}  # by name; the name of the module's places
        self._flat: dict[str, dict[str, str]] = {}
        for component, table in shapes.items():
            keys = _torch_shapes(table)
            places = {key: Parts((key,), swapped=False) for key in keys}
            named = {_module(key): _module(key) for key in keys}
            for original, parts in _originals(component, keys).items():
                if len(parts.names) == 1 and not parts.swapped:
                    named.setdefault(_module(original), _module(parts.names[0]))
                else:
                    places[original] = parts
                    named[_module(original)] = _module(original)
            self._places[component] = places
            self._shapes[component] = {
                name: _together([keys[key] for key in parts.names])
                for name, parts in places.items()
            }
            self._modules[component] = named
            self._flat[component] = {name.replace(".", "_"): own for name, own in named.items()}

    def find(self, name: str) -> tuple[str, str, str] | None:
        """The component, module and role of a tensor; None for one that fits nothing."""
        found = parse(name)
        if found is None:
            return None
        component = self._component(found.component)
        modules = (self._flat if found.flat else self._modules).get(component, {})
        for module in (found.module, f"text_model.{found.module}"):
            spelled = module.replace(".", "_") if found.flat else module
            if spelled in modules:
                return component, modules[spelled], found.role
        return None

    def _component(self, component: str) -> str:
        if component != T5:
            return component
        own = (name for name, modules in self._modules.items() if any(map(_is_t5, modules)))
        return next(own, component)

    def shapes(self, component: str) -> Mapping[str, Shape]:
        """The shapes of what can be changed in a component, by name, in PyTorch's layout."""
        return self._shapes[component]

    def parts(self, component: str, name: str) -> Parts:
        """The parameters that go by `name`."""
        return self._places[component][name]


def table_of(names: Iterable[str]) -> KeyTable | None:
    """The table of the transformer that has these names in diffusers; None for others."""
    modules = {name.partition(".")[0] for name in names}
    if "distilled_guidance_layer" in modules:
        return CHROMA_TABLE
    if "single_transformer_blocks" in modules:
        return FLUX_TABLE
    return SD3_TABLE if {"pos_embed", "context_embedder"} <= modules else None


def from_original(modules: Mapping[str, Roles]) -> Iterator[tuple[str, Roles]]:
    """The factors of a transformer's modules under the names of diffusers, of LoRAs alone.

    What diffusers has made of one module has the same `down`, and its own rows of `up`. Names of no
    published network stay as they are.
    """
    for module, roles in modules.items():
        parts = {f"{module}.weight": roles["up"]}
        if in_original_names(module):
            table, depth = _original_table(module, modules, roles)
            parts = table.from_original(parts, depth)
        for key, entry in parts.items():
            yield _module(key), {**roles, "up": entry}


def to_original(
    shapes: Mapping[str, tuple[Shape, Shape]],
) -> dict[str, tuple[Rule, dict[int, str]]]:
    """The modules of the original code with parts among a transformer's modules in diffusers.

    `shapes` are those of their factors `down` and `up`, by module. Each has its rule, and its
    parts by number.
    """
    names = {f"{module}.weight": pair for module, pair in shapes.items()}
    numbers = [int(m[1]) for name in names if (m := re.match(r"transformer_blocks\.(\d+)\.", name))]
    depth = max(numbers, default=-1) + 2  # as if the last block were not among them
    ends = names.get(f"transformer_blocks.{depth - 2}.norm1_context.linear.weight")
    if ends is not None and ends[1][0] == 2 * ends[0][1]:
        depth -= 1
    found = _diffusers_table(shapes).parts(names, depth)
    return {
        _module(original): (rule, {i: _module(name) for i, name in parts.items()})
        for original, (rule, parts) in found.items()
    }


def _diffusers_table(shapes: Mapping[str, tuple[Shape, Shape]]) -> KeyTable:
    """The table of a LoRA's modules in diffusers, which need not be all of the network's."""
    if any(name.startswith("distilled_guidance_layer.") for name in shapes):
        return CHROMA_TABLE
    own = any(map(_OF_SD3.match, shapes))
    widths = {down[1] for name, (down, _) in shapes.items() if name.endswith(("_q", "_q_proj"))}
    return SD3_TABLE if own or widths & SD3_WIDTHS else FLUX_TABLE


def _original_table(
    module: str, modules: Iterable[str], roles: Roles
) -> tuple[KeyTable, int | None]:
    """The table with the module's name, and the number of blocks as far as it counts."""
    if not any(name.startswith("joint_blocks.") for name in modules):
        chroma = any(name.startswith("distilled_guidance_layer.") for name in modules)
        table = CHROMA_TABLE if chroma else FLUX_TABLE
        return dataclasses.replace(table, rules=(_XLABS, *table.rules)), None
    number = re.match(r"joint_blocks\.(\d+)\.", module)
    # The last block alone has two vectors for the text: shift and scale.
    last = roles["up"].shape[0] == 2 * roles["down"].shape[1]
    return SD3_TABLE, int(number[1]) + (1 if last else 2) if number else None


def _originals(component: str, keys: Iterable[str]) -> dict[str, Parts]:
    """The tensors that a network has in the original code, by name."""
    keys = list(keys)
    if component == UNET:
        originals = ldm_writer.unet_to_ldm_keys(keys)
        return {name: Parts((key,), swapped=False) for key, name in originals.items()}
    table = table_of(keys) if component == TRANSFORMER else None
    return {} if table is None else table.originals(keys) | XLABS_TABLE.originals(keys)


def _torch_shapes(table: Mapping[str, Shape]) -> dict[str, Shape]:
    """PyTorch keys and shapes of a component's weights, biases and norms."""
    return {
        path_to_torch_key(path): torch_shape(shape, path)
        for path, shape in table.items()
        if path.endswith((".kernel", ".scale", ".bias"))
    }


def _together(shapes: list[Shape]) -> Shape:
    """The shape of arrays one after the other by rows."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _is_t5(module: str) -> bool:
    return module.startswith("encoder.block.")
