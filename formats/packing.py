"""Pack codes of 1 to 8 bits into bytes and unpack them: one bit stream, most significant bit first.

Code i takes bits i·bits … (i+1)·bits − 1 of the stream. At 4 bits this is bitsandbytes' layout (the even element in the
high nibble). At 8 bits each code is a byte, and at 3 bits eight codes share three bytes.
"""

from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad


def packed_bytes(n: int, bits: int) -> int:
    """Returns the number of bytes that hold `n` codes of `bits` bits."""
    return -(n * bits // -8)


def pack(codes: Tensor, bits: int, fill: int = 0) -> Tensor:
    """Pack uint8 `codes` [n], each below 2**bits, into uint8 [ceil(n·bits/8)]; `fill` is the code that pads the end."""
    if bits == 8:
        return codes
    n = codes.numel()
    group = 8 // gcd(8, bits)  # the fewest codes that fill whole bytes
    codes = pad(codes, (0, -n % group), value=fill).view(-1, group)
    word = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    for column in codes.unbind(1):
        word = (word << bits) | column
    width = group * bits // 8
    stream = torch.stack([(word >> 8 * (width - 1 - i)) & 0xFF for i in range(width)], 1).to(torch.uint8)
    return stream.reshape(-1)[: packed_bytes(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Returns the first `n` codes of the stream `packed`, as uint8 [n]."""
    if bits == 8:
        return packed[:n]
    group = 8 // gcd(8, bits)
    width = group * bits // 8
    stream = pad(packed, (0, -packed.numel() % width)).view(-1, width)
    word = torch.zeros(len(stream), dtype=torch.int64, device=packed.device)
    for column in stream.unbind(1):
        word = (word << 8) | column
    mask = (1 << bits) - 1
    codes = torch.stack([(word >> bits * (group - 1 - i)) & mask for i in range(group)], 1).to(torch.uint8)
    return codes.reshape(-1)[:n]
