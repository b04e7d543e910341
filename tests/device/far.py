"""A second device for machines without a GPU: real values behind tensors that refuse what tensors of a card refuse.

`FAR` is a torch.device. Its tensors have no `.numpy()` and do not mix with tensors of the host, zero-dimensional ones
and indices aside. Importing this module changes torch for the whole process (see `_adapt_torch`), so import it in a
process of its own. Begin at `FarTensor`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("far")
FAR = torch.device("far", 0)
MAY_MIX = {"copy_", "_to_copy", "_copy_from", "index", "index_put", "index_put_", "_index_put_impl_"}
"""Operators of aten that take tensors of both devices on CUDA as well."""
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}
"""Operators whose result the host cannot know before the device has come so far."""
waits: list[str] = []
"""What the host has waited for until now: such operators, copies to the host, lists."""


class FarTensor(torch.Tensor):
    """Metadata alone; the values lie in a tensor of the host that only `execute` touches."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "FarTensor":
        outer: FarTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=FAR,
            requires_grad=False,
        )
        outer.values = values
        return outer

    def numpy(self, *_: Any, **__: Any) -> Any:
        """As torch refuses it for CUDA tensors."""
        raise TypeError("can't convert far:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        """Allowed on CUDA too, where it copies."""
        waits.append("tolist")
        return self.values.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"FarTensor({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, operator: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return execute(operator, args, kwargs or {})


def execute(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values, after the rules of devices were kept; results lie where CUDA would put them."""
    tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
    name = operator._schema.name.removeprefix("aten::")
    near = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, FarTensor) and tensor.dim()]
    if far and near and name not in MAY_MIX:
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} got far:0 and cpu {near}")
    device = kwargs.get("device")
    stays = bool(far) or not tensors if device is None else torch.device(device).type == "far"
    if (far and (name in WAITING or (name == "_to_copy" and not stays))) or _copies_to_far(name, args, kwargs, stays):
        waits.append(name)
    result = operator(*_mapped(_to_host, args), **_mapped(_to_host, kwargs))
    changed = _written_argument(operator, args, kwargs)
    if changed is not None:
        return changed
    known = {id(tensor.values): tensor for tensor in far}  # an operator may hand back its own argument

    def wrap(leaf: Any) -> Any:
        if type(leaf) is not torch.Tensor:
            return leaf
        return known[id(leaf)] if id(leaf) in known else FarTensor(leaf)

    return _mapped(wrap, result) if stays else result


def _leaves(tree: Any) -> Iterator[Any]:
    """What lies in the tuples, lists and dictionaries of an operator's arguments; torch's own walk takes ten times as
    long, which was a third of all that is done here."""
    if isinstance(tree, tuple | list | dict):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(branch)
    else:
        yield tree


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """The same tuples, lists and dictionaries with every leaf changed."""
    if isinstance(tree, dict):
        return {name: _mapped(change, branch) for name, branch in tree.items()}
    if isinstance(tree, tuple | list):
        branches = [_mapped(change, branch) for branch in tree]
        return branches if isinstance(tree, list) else tuple(branches)
    return change(tree)


def _copies_to_far(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], stays: bool) -> bool:
    """Whether values go from the host to the device and the host stands by; numbers go along with the call."""
    if name == "_to_copy":
        return stays and not isinstance(args[0], FarTensor) and not kwargs.get("non_blocking")
    if name == "copy_":
        near = not isinstance(args[1], FarTensor) and args[1].dim() > 0
        return isinstance(args[0], FarTensor) and near and not (kwargs.get("non_blocking") or args[2:3] == (True,))
    return False


def _written_argument(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument that an operator in place changes and returns, or None."""
    returns = operator._schema.returns
    if len(returns) != 1 or returns[0].alias_info is None or not returns[0].alias_info.is_write:
        return None
    for index, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return kwargs[argument.name] if argument.name in kwargs else args[index]
    return None


def _to_host(leaf: Any) -> Any:
    if isinstance(leaf, torch.device) and leaf.type == "far":
        return torch.device("cpu")
    return leaf.values if isinstance(leaf, FarTensor) else leaf


class _Factories(TorchFunctionMode):
    """torch.tensor and torch.as_tensor do not ask the dispatcher where to put what they make."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        device = given.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == "far":
            return func(*args, **{**given, "device": "cpu"}).to(FAR)
        return func(*args, **given)


def _keeping_ties(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Module._apply, which makes new parameters here: tied ones are tied again."""

    def apply(module: Any, *args: Any, **kwargs: Any) -> Any:
        before: dict[int, list[tuple[Any, str]]] = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    before.setdefault(id(parameter), []).append((part, name))
        alive = [parameter for part in module.modules() for parameter in part._parameters.values()]  # ids stay unique
        result = convert(module, *args, **kwargs)
        for (first, first_name), *others in before.values():
            for part, name in others:
                part._parameters[name] = first._parameters[first_name]
        del alive
        return result

    return apply


def _adapt_torch() -> None:
    """What torch's Python backend does not know of by itself.

    `inference_mode` fails on wrapped tensors; conversion of a module in place would change a wrapper's metadata and
    leave its values as they were.
    """
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda operator, *args, **kwargs: execute(operator, args, kwargs), "PrivateUse1")
    FarTensor.library = library  # type: ignore[attr-defined]  # lives as long as this module
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.nn.Module._apply = _keeping_ties(torch.nn.Module._apply)  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    torch.inference_mode = torch.no_grad  # type: ignore[misc,assignment]
    _Factories().__enter__()


_adapt_torch()
