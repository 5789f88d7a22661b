"""Compiles a model for fast inference: bfloat16, channels_last, frozen weights.

    run = deploy(fold(params), (16, 3, 224, 224))
    logits = run(inputs)                        # (16, 3, 224, 224) to (16, 1000), float32
"""

import copy
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def native_bfloat16(device: torch.device | str) -> tuple[bool, str]:
    """Returns whether a device has bfloat16 arithmetic in hardware, and the reason as text."""
    device = torch.device(device)
    if device.type == 'cuda':
        capability = torch.cuda.get_device_capability(device)
        return capability >= (8, 0), 'compute capability {}.{}'.format(*capability)
    if device.type != 'cpu' or not hasattr(torch.cpu, 'get_capabilities'):
        return False, f'torch {torch.__version__} does not report features of {device.type}'
    capabilities = torch.cpu.get_capabilities()
    features = [name for name, present in capabilities.items() if 'bf16' in name and present]
    return bool(features), ', '.join(features) or 'a CPU without bfloat16'


def deploy(model: nn.Module, shape: Sequence[int],
           dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """Compiles a copy of a model, with constant weights, for inputs of one shape.

    model maps inputs to logits; it is usually the result of `diracnets.fold`. shape is the input
    shape (N, C, H, W). dtype is torch.bfloat16 or torch.float32, by default bfloat16 on a device
    with bfloat16 arithmetic. bfloat16 has 8 bits of precision: logits differ by about 1 % of the
    largest one.

    Returns a function of float32 inputs to float32 logits. It raises ValueError for inputs of
    another shape; call `deploy` again for each shape. Compilation takes seconds to a minute and, on
    the CPU, needs a C++ compiler. Raises ValueError for another dtype, for a model
    without parameters, and for one that torch.compile cannot compile as one graph.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError(f'{type(model).__name__} has no parameters: expected a PyTorch model')
    device = parameter.device
    if dtype is None:
        dtype = torch.bfloat16 if native_bfloat16(device)[0] else torch.float32
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f'dtype {dtype}: expected torch.bfloat16 or torch.float32')
    constant = copy.deepcopy(model).eval().requires_grad_(False)
    constant = constant.to(dtype, memory_format=torch.channels_last)
    compiled = torch.compile(with_own_code_object(constant), dynamic=False, fullgraph=True)

    @torch.inference_mode(False)  # a call in inference mode would compile again, without freezing
    @torch.no_grad()
    def run(inputs: Tensor) -> Tensor:
        if inputs.shape != tuple(shape):
            raise ValueError(f'inputs of shape {tuple(inputs.shape)}: expected {tuple(shape)}')
        inputs = inputs.clone() if inputs.is_inference() else inputs
        return compiled(inputs.to(dtype, memory_format=torch.channels_last)).float()

    # freezing converts the layout of the weights once, at compilation, instead of in each call
    try:
        with torch._inductor.config.patch(freezing=True):
            run(torch.zeros(shape, device=device))
    except torch._dynamo.exc.Unsupported as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f'{type(model).__name__} cannot be compiled as one graph ({reason}): its forward must '
            'not depend on the values of tensors'
        ) from error
    return run


def with_own_code_object(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns a function that calls a model and has a code object of its own.

    torch.compile limits recompilations per code object (8 by default) and then runs the code
    uncompiled. All models of a class share the code object of their forward.
    """
    def call(inputs):
        return model(inputs)

    return types.FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
