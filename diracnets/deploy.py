"""The fastest form of a network that is only used: bfloat16, channels last, compiled.

    run = deploy(fold(params), (16, 3, 224, 224))
    logits = run(inputs)                        # (16, 3, 224, 224) to (16, 1000), float32
"""

import copy
import types

import torch


def native_bfloat16(device):
    """Says whether a device computes in bfloat16 in hardware: (bool, what shows it)."""
    device = torch.device(device)
    if device.type == 'cuda':
        capability = torch.cuda.get_device_capability(device)
        return capability >= (8, 0), 'compute capability {}.{}'.format(*capability)
    if device.type != 'cpu' or not hasattr(torch.cpu, 'get_capabilities'):
        return False, f'torch {torch.__version__} does not tell for {device.type}'
    found = [name for name, has in torch.cpu.get_capabilities().items() if 'bf16' in name and has]
    return bool(found), ', '.join(found) or 'a CPU without bfloat16'


def deploy(network, shape, dtype=None):
    """Compiles a network, with its weights as constants, for inputs of one shape.

    network: an nn.Module, of inputs to logits, such as `diracnets.fold` returns; it stays as it
    is. shape: (N, C, H, W) of the inputs to come. dtype: torch.bfloat16 or torch.float32; without,
    bfloat16 where the device computes in it natively. In bfloat16, with 8 bits of precision, logits
    differ by about 1 % of the largest.

    Returns a function of inputs, float32, to logits, float32; it raises ValueError for inputs of
    another shape: each shape is one more call of this. Compiling takes seconds to a minute, and a
    C++ compiler on the CPU. Raises ValueError for a network that torch.compile cannot take whole.
    """
    device = next(network.parameters()).device
    if dtype is None:
        dtype = torch.bfloat16 if native_bfloat16(device)[0] else torch.float32
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f'dtype {dtype}: expected torch.bfloat16 or torch.float32')
    constant = copy.deepcopy(network).eval().requires_grad_(False)
    constant = constant.to(dtype, memory_format=torch.channels_last)
    compiled = torch.compile(_with_its_own_code(constant), dynamic=False, fullgraph=True)

    @torch.no_grad()
    def run(inputs):
        if inputs.shape != tuple(shape):
            raise ValueError(f'inputs of shape {tuple(inputs.shape)}: expected {tuple(shape)}')
        return compiled(inputs.to(dtype, memory_format=torch.channels_last)).float()

    # frozen: weights are laid out once, and not in each call
    try:
        with torch._inductor.config.patch(freezing=True):
            run(torch.zeros(shape, device=device))
    except torch._dynamo.exc.Unsupported as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f'{type(network).__name__} cannot be compiled whole ({reason}): expected a forward '
            'that does not depend on the values of tensors'
        ) from error
    return run


def _with_its_own_code(network):
    """A function that calls a network, and shares its code object with no other function.

    By code objects torch.compile counts what it compiled, and from the ninth on it runs the code
    uncompiled: all networks of a class share the one of their forward.
    """
    def call(inputs):
        return network(inputs)

    return types.FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
