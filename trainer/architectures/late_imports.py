"""The model code of `transformers` without what it loads for a function that training does not call."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_FUNCTIONS = {
    # Matches objects to what was detected.
    "scipy.optimize": ("linear_sum_assignment",),
    # Names quantized weights in files, and brings torch's inductor along.
    "torchao.prototype.safetensors.safetensors_support": ("flatten_tensor_state_dict", "unflatten_tensor_state_dict"),
}
"""By module, the functions that the model code takes from it by name while it is imported."""


def import_model_code() -> None:
    """Import what all models of `transformers` are made of.

    scipy and torchao, where they are installed, are imported when a function of theirs is called: for its own sake each
    would take a third of a second of every start. Whoever imports them otherwise, then or later, gets them whole.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    late = [_LateModule(name) for name in _FUNCTIONS if name not in sys.modules]
    sys.modules.update({module.__name__: module for module in late})
    try:
        import transformers.modeling_utils  # noqa: F401
    finally:
        for module in late:
            module.leave()


class _LateModule(ModuleType):
    """Stands for a module while another takes functions from it; asked for anything else, it is imported at once."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        for function in _FUNCTIONS[name]:
            setattr(self, function, self._imported_when_called(function))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # Whoever looks through all modules, as inspect does for a file's, asks for such.
            raise AttributeError(f"module {self.__name__!r} has not been imported yet: no {name}")
        return getattr(self._real(), name)

    def leave(self) -> None:
        """Make way for the real one."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]

    def _real(self) -> ModuleType:
        self.leave()
        return importlib.import_module(self.__name__)

    def _imported_when_called(self, function: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            return getattr(self._real(), function)(*arguments, **named)

        return call
