"""Wrong arguments for functions of arrays: what they say of another rank, shape or dtype, traced and never compiled."""

import importlib
import inspect
import pkgutil
import re
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves_with_path

from wmjax.types import UsageError

KEY = jax.random.key(0)
ARRAYS = ("Array", "PyTree", "Latent", "Categorical", "Gaussian", "ReturnRange", "Assigned", "Record", "Trajectory")


def floats(*shape):
    return jnp.full(shape, 0.25)


def ints(*shape):
    return jnp.zeros(shape, jnp.int32)


def takes_arrays(function) -> bool:
    kinds = [
        str(p.annotation) for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_POSITIONAL
    ]
    return any(word in kind for kind in kinds for word in ARRAYS if "Callable" not in kind)


def public_functions(*names: str) -> set[str]:
    """Functions, and methods of classes, that take arrays and are defined in some modules, or packages of them."""
    modules = [importlib.import_module(f"wmjax.{name}") for name in names]
    for package in [module for module in modules if hasattr(module, "__path__")]:
        modules += [
            importlib.import_module(f"{package.__name__}.{i.name}") for i in pkgutil.iter_modules(package.__path__)
        ]
    found = set()
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
                continue
            path = f"{module.__name__.removeprefix('wmjax.')}.{name}"
            if inspect.isfunction(value):
                found |= {path} if takes_arrays(value) else set()
            elif inspect.isclass(value):
                methods = {
                    n: m for n, m in vars(value).items() if inspect.isfunction(m) and m.__module__ == module.__name__
                }
                methods = {n: m for n, m in methods.items() if takes_arrays(m) and (n == "__call__" or n[0] != "_")}
                methods.pop("everything", None)  # of a module, to initialize it: calls the others
                found |= {path if n == "__call__" else f"{path}.{n}" for n in methods}
    return found


def function_of(path: str):
    module, _, function = path.rpartition(".")
    return getattr(importlib.import_module(f"wmjax.{module}"), function)


def is_key(x) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def of_other_dtype(x):
    if is_key(x):
        return jax.random.PRNGKey(0)  # how keys looked before
    return x.astype(jnp.int32 if x.dtype == jnp.float32 else jnp.float32)


def of_other_shapes(x):
    if is_key(x):
        return [jax.random.split(KEY, 3)]
    return [jnp.zeros((), x.dtype), jnp.zeros((*x.shape, 9), x.dtype), jnp.zeros((9, *x.shape), x.dtype)]


def complaints(function, given, name, wrong):
    """What the function says, traced, of an argument whose every leaf is replaced."""
    try:
        trace(function, given | {name: wrong})
    except (AssertionError, UsageError) as error:
        return str(error)
    except Exception as error:
        return f"no contract but {type(error)}"
    return "nothing"


def trace(function, given):
    jax.eval_shape(lambda: [function(**given)] and 0)


def check_that_wrong_arguments_are_named(
    function, given, free=(), any_dtype=(), any_shape=(), names=MappingProxyType({})
):
    """Gives each array argument another dtype and other shapes; `free` ones, or those that are no arrays, stay.

    An argument of several arrays has a name for each, in `names` or as a tree has them.
    """
    trace(function, given)
    for argument, value in given.items():
        leaves = jax.tree.leaves(value)
        if argument in free or not all(isinstance(leaf, jax.Array) for leaf in leaves):
            continue
        paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in tree_leaves_with_path(value)]
        words = [argument, *names.get(argument, ()), *(word for path in paths for word in path.split(".")[-1:] if word)]
        named = lambda text, words=words: any(re.search(rf"\b{word}\b", text) for word in words)
        if argument not in any_dtype:
            said = complaints(function, given, argument, jax.tree.map(of_other_dtype, value))
            assert named(said), f"{argument} of another dtype: {said}"
        if argument not in any_shape:
            tries = zip(*map(of_other_shapes, leaves), strict=True)
            structure = jax.tree.structure(value)
            said = (complaints(function, given, argument, jax.tree.unflatten(structure, wrong)) for wrong in tries)
            assert any(map(named, said)), f"{argument} of another shape is not named"
