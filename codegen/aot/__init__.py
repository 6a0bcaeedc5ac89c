"""Ahead of time: the kernels compiled for Hopper as their launches do, on a machine without a GPU or a driver.

What the machine code shows, the tests hold: the tensor cores' 8-bit instructions are there, tiles come through the
copy engine, memory is read and written 16 bytes at a time, and no register lives in local memory.
"""
