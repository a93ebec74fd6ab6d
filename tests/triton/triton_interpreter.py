"""Triton's interpreter, made fast enough for tests. TRITON_INTERPRET=1 must be in the environment."""

from typing import Any

from triton import language
from triton.runtime import interpreter

call = interpreter.InterpretedFunction.__call__
patch_tensor = interpreter._patch_lang_tensor
patched: set[Any] = set()


def call_without_patching(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a function that a kernel calls.

    Triton patches its language at every such call, which takes 10 ms. But a kernel's launch has patched triton.language
    already, and triton.language.core stays patched once it is.
    """
    if language.core not in patched and language.core in self.fn.__globals__.values():
        patched.add(language.core)
        return call(self, *args, **kwargs)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = call_without_patching


def patch_tensor_for_numpy(tensor: Any, scope: Any) -> None:
    """Triton 3.6 takes int() of arrays of one number, which NumPy 2.4 refuses."""
    patch_tensor(tensor, scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = patch_tensor_for_numpy
